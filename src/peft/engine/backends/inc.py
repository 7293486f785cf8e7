"""Linear layers of Intel Neural Compressor: in 8-bit floating point, or with integer codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...utils.quantized import is_from
from . import register_backend
from .forward_only import ForwardOnlyQuantizationBackend

_FP8 = "PatchedLinear"
_INTEGERS = "INCWeightOnlyLinear"


@register_backend
class IncBackend(ForwardOnlyQuantizationBackend):
    """Weights of linear layers that Neural Compressor has put in the place of others; they can be read, but not written.

    `PatchedLinear` keeps its weight in 8-bit floating point, (in, out), and while it measures the ranges of values as the
    layer that it replaces has it; `INCWeightOnlyLinear` keeps integers with scales, and knows how to recover the weight.
    """

    backend_name = "inc"

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> IncBackend | None:
        return cls() if is_from(base_layer, "neural_compressor", _FP8, _INTEGERS) else None

    @torch.no_grad()
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """(out, in)."""
        if is_from(base_layer, "neural_compressor", _INTEGERS):
            recovered = getattr(base_layer, "weight", None)  # kept since the first forward
            return base_layer.recover() if recovered is None else recovered.detach()
        weight = base_layer.weight.detach()
        if not hasattr(base_layer, "quant_input"):  # it measures
            return weight
        if base_layer.use_qdq:
            return base_layer.dequant_weights(weight).T
        if base_layer.fake_quant:
            return base_layer.qdq_weights(weight).T
        return (weight.to(base_layer.hp_dtype) * base_layer.scale_weight).T
