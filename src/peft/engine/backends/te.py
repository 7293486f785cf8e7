"""Layers of NVIDIA's TransformerEngine, which compute in 8-bit floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...utils.quantized import is_from
from . import register_backend
from .forward_only import ForwardOnlyQuantizationBackend


@register_backend
class TeBackend(ForwardOnlyQuantizationBackend):
    """Weights of `Linear`, `LayerNormLinear` and `LayerNormMLP`; those of `Linear` can be read, none can be written.

    In the other two, a normalisation comes first, or a whole network: there is no weight that their input is multiplied by.
    """

    backend_name = "te"

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> TeBackend | None:
        known = is_from(base_layer, "transformer_engine", "Linear", "LayerNormLinear", "LayerNormMLP")
        return cls() if known else None

    def features(self, base_layer: nn.Module) -> tuple[int, int]:
        if is_from(base_layer, "transformer_engine", "LayerNormMLP"):
            width = base_layer.layer_norm_weight.shape[0]
            return width, width
        return base_layer.in_features, base_layer.out_features

    def stored_weight(self, base_layer: nn.Module) -> torch.Tensor:
        name = next(iter(getattr(base_layer, "weight_names", ())), "fc1_weight")
        return getattr(base_layer, name)

    @torch.no_grad()
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """(out, in).

        Raises:
            FixedWeightError: there is no such weight.
        """
        if not is_from(base_layer, "transformer_engine", "Linear"):
            return super().get_base_weight(base_layer)
        parts = [getattr(base_layer, name).detach() for name in base_layer.weight_names]
        return torch.cat([part.dequantize() if hasattr(part, "_quantizer") else part for part in parts])
