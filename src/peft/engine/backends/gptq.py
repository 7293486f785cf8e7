"""Linear layers of GPTQModel (GPTQ, arXiv 2210.17323): codes along the inputs, with a scale and a zero point per group."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...import_utils import is_gptqmodel_available
from ...utils.quantized import is_gptqmodel_awq_layer, is_gptqmodel_quant_linear
from . import register_backend
from .forward_only import ForwardOnlyQuantizationBackend
from .packed import keep_from_packing, unpacked, weight_by_applying

_IN_ORDER = ("TorchLinear", "TorchQuantLinear", "TritonV2Linear", "TritonV2QuantLinear")
"""Classes whose kernel reads the codes as they are in the file; others may keep them in an order of their own."""


@register_backend
class GptqBackend(ForwardOnlyQuantizationBackend):
    """Weights of GPTQModel's layers, whichever kernel these use; they can be read, but not written.

    The codes are fitted to the layer's inputs one after another, which cannot be done again without calibration data.
    """

    backend_name = "gptq"
    blocks_gradients_of = "gptqmodel"

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> GptqBackend | None:
        if not is_gptqmodel_quant_linear(base_layer) or is_gptqmodel_awq_layer(base_layer):
            return None
        is_gptqmodel_available()  # which says so if it is too old
        return cls()

    def make_trainable(self, base_layer: nn.Module, label: str) -> None:
        keep_from_packing(base_layer, label)

    @torch.no_grad()
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """(out, in) in the dtype of the scales."""
        if not _is_in_order(base_layer):
            scales = getattr(base_layer, "scales", None)
            dtype = torch.float16 if scales is None else scales.dtype
            return weight_by_applying(base_layer, base_layer.in_features, dtype, self.stored_weight(base_layer).device)
        scales, groups, bits = base_layer.scales, base_layer.g_idx.long(), int(base_layer.bits)
        codes = unpacked(base_layer.qweight, bits, base_layer.in_features, dim=0)
        zeros = unpacked(base_layer.qzeros, bits, scales.shape[1], dim=1)
        return (scales[groups] * (codes - zeros[groups])).T


def _is_in_order(layer: Any) -> bool:
    rotated = getattr(layer, "online_full_had", False) or getattr(layer, "online_partial_had", False)
    in_planes = getattr(layer, "planar", False)
    return (
        type(layer).__name__ in _IN_ORDER and not rotated and not in_planes and len(layer.g_idx) == layer.in_features
    )
