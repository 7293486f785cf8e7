"""Linear layers of EETQ: 8-bit codes, in an order that only its kernels know, and a scale for each output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...utils.quantized import is_from
from . import register_backend
from .forward_only import ForwardOnlyQuantizationBackend
from .packed import weight_by_applying


@register_backend
class EetqBackend(ForwardOnlyQuantizationBackend):
    """Weights of EETQ's own layers and of those that transformers makes with its kernels; they can be read, not written."""

    backend_name = "eetq"

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> EetqBackend | None:
        own = is_from(base_layer, "eetq", "EetqLinear", "W8A16Linear")
        return cls() if own or is_from(base_layer, "transformers", "EetqLinear") else None

    def features(self, base_layer: nn.Module) -> tuple[int, int]:
        fan_in, fan_out = self.stored_weight(base_layer).shape
        return fan_in, fan_out

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """(out, in) in the dtype of the scales."""
        scales = base_layer.weight_scales
        return weight_by_applying(base_layer, self.features(base_layer)[0], scales.dtype, scales.device)
