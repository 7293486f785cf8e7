"""LoRA on linear layers of TransformerEngine; see `peft.engine.backends.te` for how these keep their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...import_utils import is_te_pytorch_available
from ...utils.quantized import is_from
from .config import LoraConfig
from .layer import Linear, LoraLayer
from .quantized import dispatch_to
from .variant import VariantTable


class TeLinear(Linear):
    """LoRA on a linear layer of TransformerEngine, or on one with a normalisation before it, or on a whole network.

    The adapter's term is for the layer's own input and is added to its output, so that for the latter two it is no change of
    some weight; variants, which are, are refused there.
    """

    @property
    def lora_variants(self) -> VariantTable:
        return super().lora_variants if is_from(self.get_base_layer(), "transformer_engine", "Linear") else {}

    def _with_terms(self, x: torch.Tensor, result: Any, plan: tuple) -> Any:
        if isinstance(result, tuple):  # with a bias to be added later, or the normalised input
            return (super()._with_terms(x, result[0], plan), *result[1:])
        return super()._with_terms(x, result, plan)


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("te", "linear"): TeLinear}


def dispatch_transformer_engine(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    """The LoRA layer for a linear layer of TransformerEngine, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(TeLinear, "te", target, adapter_name, config, **kwargs)


__all__ = [
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "TeLinear",
    "dispatch_transformer_engine",
    "is_te_pytorch_available",
]
