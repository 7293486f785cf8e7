"""Layers of bitsandbytes with 8-bit weights (arXiv 2208.07339): int8 codes and the largest magnitude of each row."""

from __future__ import annotations

import torch
from torch import nn

from ...utils.integrations import dequantize_int8_rows, get_bnb_param_type
from . import register_backend
from .parameter import ParameterBackend


@register_backend
class Bnb8bitBackend(ParameterBackend):
    """Weights of `Linear8bitLt` and `Embedding8bit`.

    A linear layer takes the codes and scales from its weight into its `state` at its first forward. One that keeps its
    weight in half precision, or is not on its device yet, has no codes: its weight is read and written as it is.
    """

    backend_name = "bnb 8bit"

    @classmethod
    def holds(cls, weight: torch.Tensor) -> bool:
        return get_bnb_param_type(weight) == "8bit"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        weight = base_layer.weight
        if weight.is_floating_point():
            return weight.data
        return dequantize_int8_rows(weight, getattr(base_layer, "state", None))

    def quantised(self, base_layer: nn.Module, weight: torch.Tensor, label: str) -> nn.Parameter:
        from bitsandbytes.functional import int8_vectorwise_quant
        from bitsandbytes.nn import Int8Params

        old = base_layer.weight
        if old.is_floating_point():
            return Int8Params(weight, requires_grad=old.requires_grad, has_fp16_weights=old.has_fp16_weights)
        codes, scales, _ = int8_vectorwise_quant(weight.half())
        return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)

    def snapshot(self, base_layer: nn.Module) -> dict[str, torch.Tensor]:
        weight = base_layer.weight
        if not weight.is_floating_point() and weight.SCB is None:
            # As before the first forward, so that the parameter has all that belongs to it.
            weight.CB, weight.SCB = weight.data, base_layer.state.SCB
        return super().snapshot(base_layer)

    def weight_in(self, base_layer: nn.Module, snapshot: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = snapshot["weight"]
        return weight.data if weight.is_floating_point() else dequantize_int8_rows(weight)

    def _put(self, base_layer: nn.Module, weight: nn.Parameter) -> None:
        super()._put(base_layer, weight)
        state = getattr(base_layer, "state", None)
        if state is not None:  # the next forward fills it
            state.CB = state.SCB = None
