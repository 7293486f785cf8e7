"""Linear layers of HQQ (half-quadratic quantization): codes with a scale and a zero point for each group."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...utils.quantized import is_from
from . import QuantizationBackend, register_backend


@register_backend
class HqqBackend(QuantizationBackend):
    """Weights of `HQQLinear`, which are quantised again with the layer's own settings when one is written."""

    backend_name = "hqq"
    supports_merge = True

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> HqqBackend | None:
        return cls() if is_from(base_layer, "hqq", "HQQLinear") else None

    def stored_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return base_layer.W_q

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return base_layer.dequantize().detach()

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        layer = peft_layer.get_base_layer()
        self.write(layer, weight_data, peft_layer._label or type(layer).__name__)

    @torch.no_grad()
    def write(self, base_layer: nn.Module, weight: torch.Tensor, label: str) -> None:
        config = {**copy.deepcopy(base_layer.quant_config), "offload_meta": base_layer.offload_meta}
        new = type(base_layer)(
            None, config, compute_dtype=base_layer.compute_dtype, device=base_layer.W_q.device, initialize=False
        )
        new.quantize(weight, **new.quant_config)
        self._put(base_layer, new.W_q.data, new.meta)

    def _put(self, base_layer: nn.Module, codes: torch.Tensor, meta: dict[str, Any]) -> None:
        base_layer.W_q.data, base_layer.meta = codes, meta

    def snapshot(self, base_layer: nn.Module) -> dict[str, Any]:
        """Codes, scales and bias themselves, whose place others take."""
        bias = base_layer.bias
        return {
            "W_q": base_layer.W_q.data,
            "meta": dict(base_layer.meta),
            "bias": None if bias is None else bias.data,
        }

    def restore(self, peft_layer: nn.Module, snapshot: dict[str, Any]) -> None:
        layer = peft_layer.get_base_layer()
        self._put(layer, snapshot["W_q"], snapshot["meta"])
        if snapshot["bias"] is not None:
            layer.bias.data = snapshot["bias"]

    def weight_in(self, base_layer: nn.Module, snapshot: dict[str, Any]) -> torch.Tensor:
        layer = copy.copy(base_layer)
        layer._parameters = {**base_layer._parameters, "W_q": nn.Parameter(snapshot["W_q"], requires_grad=False)}
        layer.meta = dict(snapshot["meta"])
        return self.get_base_weight(layer)
