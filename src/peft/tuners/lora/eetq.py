"""LoRA on linear layers of EETQ; see `peft.engine.backends.eetq` for how these keep their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...import_utils import is_eetq_available
from .config import LoraConfig
from .layer import Linear, LoraLayer
from .quantized import dispatch_to


class EetqLoraLinear(Linear):
    """LoRA on a linear layer of EETQ."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("eetq", "linear"): EetqLoraLinear}


def dispatch_eetq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer of EETQ, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(EetqLoraLinear, "eetq", target, adapter_name, config, **kwargs)


__all__ = [
    "BaseTunerLayer",
    "EetqLoraLinear",
    "LoraConfig",
    "LoraLayer",
    "dispatch_eetq",
    "is_eetq_available",
]
