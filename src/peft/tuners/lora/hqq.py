"""LoRA on linear layers of HQQ; see `peft.engine.backends.hqq` for how these keep their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer, check_adapters_to_merge
from ...import_utils import is_hqq_available
from ...utils.tensors import transpose
from .config import LoraConfig
from .layer import Linear, LoraLayer
from .quantized import dispatch_to
from .variant import LoraVariant


class HqqLoraLinear(Linear):
    """LoRA on an `HQQLinear`, whose weight is quantised again when an adapter is merged."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("hqq", "linear"): HqqLoraLinear}


def dispatch_hqq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer of HQQ, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(HqqLoraLinear, "hqq", target, adapter_name, config, **kwargs)


__all__ = [
    "BaseTunerLayer",
    "HqqLoraLinear",
    "LoraConfig",
    "LoraLayer",
    "LoraVariant",
    "check_adapters_to_merge",
    "dispatch_hqq",
    "is_hqq_available",
    "transpose",
]
