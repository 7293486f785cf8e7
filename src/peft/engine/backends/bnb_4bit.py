"""Layers of bitsandbytes with 4-bit weights (arXiv 2305.14314): two codes a byte, and a scale for every block."""

from __future__ import annotations

import torch
from torch import nn

from ...utils.integrations import bnb_4bit_in_order, dequantize_4bit_blocks, get_bnb_param_type
from . import register_backend
from .parameter import ParameterBackend

_PACKS = "support_avx512bf16_for_cpu"
"""Name of the attribute by which a layer may pack its codes; embeddings and older releases do not."""


@register_backend
class Bnb4bitBackend(ParameterBackend):
    """Weights of `Linear4bit` and `Embedding4bit`, and of what derives from them.

    A layer that is not on its device yet has no codes: its weight is read and written as it is.
    """

    backend_name = "bnb 4bit"
    blocks_gradients_of = "bitsandbytes"

    @classmethod
    def holds(cls, weight: torch.Tensor) -> bool:
        return get_bnb_param_type(weight) == "4bit"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        # A wrapper around parameters, such as FSDP's, may have lost the state; the layer has it too.
        state = getattr(base_layer.weight, "quant_state", None) or getattr(base_layer, "quant_state", None)
        return base_layer.weight.data if state is None else dequantize_4bit_blocks(base_layer.weight.data, state)

    def quantised(self, base_layer: nn.Module, weight: torch.Tensor, label: str) -> nn.Parameter:
        from bitsandbytes.nn import Params4bit

        old = base_layer.weight
        new = Params4bit(
            weight,
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=base_layer,
        )
        return new.to(weight.device) if old.bnb_quantized else new

    def weight_in(self, base_layer: nn.Module, snapshot: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = snapshot["weight"]
        return weight.data if weight.quant_state is None else dequantize_4bit_blocks(weight.data, weight.quant_state)

    def _put(self, base_layer: nn.Module, weight: nn.Parameter) -> None:
        super()._put(base_layer, weight)
        base_layer.quant_state = weight.quant_state
        if not getattr(base_layer, _PACKS, True):  # of old, it may be packed
            self.make_trainable(base_layer, label="")

    def make_trainable(self, base_layer: nn.Module, label: str) -> None:
        """See that the layer keeps its codes in their ordinary order, also in eval mode.

        On some CPUs it packs them, at the first call in eval mode, for a kernel that gives no gradient to the layer's input.
        """
        if hasattr(base_layer, _PACKS):
            setattr(base_layer, _PACKS, False)
        weight = base_layer.weight
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = bnb_4bit_in_order(weight.data, state)
            base_layer.quant_state = weight.quant_state

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()
