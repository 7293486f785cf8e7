"""LoRA on linear layers of AQLM; see `peft.engine.backends.aqlm` for how these keep their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...import_utils import is_aqlm_available
from .config import LoraConfig
from .layer import Linear, LoraLayer
from .quantized import dispatch_to


class AqlmLoraLinear(Linear):
    """LoRA on a linear layer of AQLM."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("aqlm", "linear"): AqlmLoraLinear}


def dispatch_aqlm(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer of AQLM, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(AqlmLoraLinear, "aqlm", target, adapter_name, config, **kwargs)


__all__ = [
    "AqlmLoraLinear",
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "dispatch_aqlm",
    "is_aqlm_available",
]
