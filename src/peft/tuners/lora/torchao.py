"""LoRA on linear layers whose weights torchao has quantised; see `peft.engine.backends.torchao` for these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...engine.backends.torchao import TorchaoBackend
from ...engine.layer import AdapterLayer, BaseTunerLayer, check_adapters_to_merge
from ...import_utils import is_torchao_available
from .config import LoraConfig
from .layer import Linear
from .quantized import dispatch_to


class TorchaoLoraLinear(Linear):
    """LoRA on a linear layer with a weight of torchao.

    Args:
        args: as `Linear`'s.
        get_apply_tensor_subclass: gives the configuration by which a merged weight is quantised again; without one, the
            weight's own attributes say how.
        kwargs: as `Linear`'s.
    """

    def __init__(self, *args: Any, get_apply_tensor_subclass: Callable[[], Any] | None = None, **kwargs: Any) -> None:
        if kwargs.get("quantization_backend") is None:
            kwargs["quantization_backend"] = TorchaoBackend(get_apply_tensor_subclass)
        super().__init__(*args, **kwargs)


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("torchao", "linear"): TorchaoLoraLinear}


def dispatch_torchao(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer with a weight of torchao, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(TorchaoLoraLinear, "torchao", target, adapter_name, config, **kwargs)


__all__ = [
    "BaseTunerLayer",
    "Linear",
    "LoraConfig",
    "TorchaoLoraLinear",
    "check_adapters_to_merge",
    "dispatch_torchao",
    "is_torchao_available",
]
