"""LoRA on linear layers of Intel Neural Compressor; see `peft.engine.backends.inc` for how these keep their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...import_utils import is_inc_available
from .config import LoraConfig
from .layer import Linear, LoraLayer
from .quantized import dispatch_to


class IncLoraLinear(Linear):
    """LoRA on a linear layer that Neural Compressor has put in the place of another."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("inc", "linear"): IncLoraLinear}


def dispatch_inc(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer of Intel Neural Compressor, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(IncLoraLinear, "inc", target, adapter_name, config, **kwargs)


__all__ = [
    "BaseTunerLayer",
    "IncLoraLinear",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "dispatch_inc",
    "is_inc_available",
]
