"""LoRA on linear layers of bitsandbytes.

How their weights are read and written is the business of the engine's backends (`peft.engine.backends`): these classes are
`Linear` by another name, to be recognised by.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer, check_adapters_to_merge
from ...import_utils import is_bnb_4bit_available, is_bnb_available
from ...utils.integrations import dequantize_bnb_weight
from ...utils.tensors import transpose
from .config import LoraConfig
from .layer import VARIANT_KWARG_KEYS, Linear, LoraLayer
from .quantized import dispatch_to
from .variant import LoraVariant


class Linear8bitLt(Linear):
    """LoRA on a linear layer with 8-bit weights."""


class Linear4bit(Linear):
    """LoRA on a linear layer with 4-bit weights (QLoRA, arXiv 2305.14314)."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {
    ("bnb 8bit", "linear"): Linear8bitLt,
    ("bnb 4bit", "linear"): Linear4bit,
}


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer with 8-bit weights, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(Linear8bitLt, "bnb 8bit", target, adapter_name, config, **kwargs)


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer with 4-bit weights, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(Linear4bit, "bnb 4bit", target, adapter_name, config, **kwargs)


__all__ = [
    "VARIANT_KWARG_KEYS",
    "BaseTunerLayer",
    "Linear4bit",
    "Linear8bitLt",
    "LoraConfig",
    "LoraLayer",
    "LoraVariant",
    "check_adapters_to_merge",
    "dequantize_bnb_weight",
    "dispatch_bnb_4bit",
    "dispatch_bnb_8bit",
    "is_bnb_4bit_available",
    "is_bnb_available",
    "transpose",
]
