"""LoRA on linear layers of GPTQModel for weights of AWQ; see `peft.engine.backends.awq` for how these keep their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...import_utils import is_gptqmodel_available
from ...utils.quantized import is_gptqmodel_awq_layer
from .config import LoraConfig
from .layer import Linear, LoraLayer
from .quantized import dispatch_to


class AwqLoraLinear(Linear):
    """LoRA on a linear layer quantised by AWQ."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("awq", "linear"): AwqLoraLinear}


def dispatch_awq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer quantised by AWQ, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(AwqLoraLinear, "awq", target, adapter_name, config, **kwargs)


__all__ = [
    "AwqLoraLinear",
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "dispatch_awq",
    "is_gptqmodel_available",
    "is_gptqmodel_awq_layer",
]
