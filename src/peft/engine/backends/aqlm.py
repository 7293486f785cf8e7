"""Linear layers of AQLM (arXiv 2401.06118): each small block of a weight is a sum of vectors from learnt codebooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...utils.quantized import is_from
from . import register_backend
from .forward_only import ForwardOnlyQuantizationBackend


@register_backend
class AqlmBackend(ForwardOnlyQuantizationBackend):
    """Weights of `aqlm.QuantizedLinear`; they can be read, but not written: codebooks are learnt with calibration data."""

    backend_name = "aqlm"

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> AqlmBackend | None:
        return cls() if is_from(base_layer, "aqlm", "QuantizedLinear") else None

    def stored_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return base_layer.codes

    @torch.no_grad()
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """(out, in) in the dtype of the codebooks."""
        codebooks, codes = base_layer.codebooks, _codes(base_layer).long()
        entries = codebooks.shape[1]  # codes count from 0, and wrap round where a signed integer ends
        blocks = sum(book[codes[..., index] % entries] for index, book in enumerate(codebooks))
        return (blocks * base_layer.scales).transpose(1, 2).reshape(base_layer.out_features, base_layer.in_features)


def _codes(layer: Any) -> torch.Tensor:
    """(output blocks, input blocks, codebooks)."""
    # On a CPU, layers with codebooks of 256 entries swap the first two at their first forward.
    swapped = layer.gemv_op is not None and layer.codebook_size == 256 and not layer.codes.is_cuda
    return layer.codes.transpose(0, 1) if swapped else layer.codes
