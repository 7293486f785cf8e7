"""Linear layers of GPTQModel for weights of AWQ (arXiv 2306.00978): codes along the outputs, and scales per group."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...import_utils import is_gptqmodel_available
from ...utils.quantized import is_gptqmodel_awq_layer
from . import register_backend
from .forward_only import ForwardOnlyQuantizationBackend
from .packed import keep_from_packing, unpacked, weight_by_applying

_IN_ORDER = ("AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear")
"""Classes whose kernel reads the codes as they are in a file of the GEMM format; others may keep them in their own order."""

_PLACE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word has the code of each of its eight columns, if codes have four bits."""


@register_backend
class AwqBackend(ForwardOnlyQuantizationBackend):
    """Weights of GPTQModel's layers for AWQ, whichever kernel these use; they can be read, but not written.

    The scales are chosen by the size of activations, which cannot be done again without calibration data.
    """

    backend_name = "awq"
    blocks_gradients_of = "gptqmodel"

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> AwqBackend | None:
        if not is_gptqmodel_awq_layer(base_layer):
            return None
        is_gptqmodel_available()  # which says so if it is too old
        return cls()

    def make_trainable(self, base_layer: nn.Module, label: str) -> None:
        keep_from_packing(base_layer, label)

    @torch.no_grad()
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """(out, in) in the dtype of the scales."""
        scales, bits = base_layer.scales, int(base_layer.bits)
        if type(base_layer).__name__ not in _IN_ORDER:
            return weight_by_applying(base_layer, base_layer.in_features, scales.dtype, scales.device)
        groups = torch.arange(base_layer.in_features, device=scales.device) // base_layer.group_size
        codes, zeros = (_codes(words, bits, scales.shape[1]) for words in (base_layer.qweight, base_layer.qzeros))
        return ((codes - zeros[groups]) * scales[groups]).T


def _codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    codes = unpacked(words, bits, columns, dim=1)
    return codes.unflatten(1, (-1, 8))[..., list(_PLACE_OF_COLUMN)].flatten(1) if bits == 4 else codes
