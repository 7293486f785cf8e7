"""LoRA layers that clients know by the sort of weight that they adapt; they compute as the others do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ...engine.backends import resolve_quantization_backend
from ...engine.layer import BaseTunerLayer

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


def dispatch_to(
    layer_cls: type[LoraLayer],
    backend_name: str,
    target: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    **kwargs: Any,
) -> LoraLayer | None:
    """A LoRA layer for a linear layer whose weight one backend keeps, None for another target.

    Args:
        layer_cls: the class of the layer.
        backend_name: the backend.
        target: the module to adapt, possibly a tuner layer already.
        adapter_name: the adapter.
        config: its configuration.
        kwargs: the layer's constructor arguments, among them what `resolve_quantization_backend` needs to know.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    backend = resolve_quantization_backend(base, **kwargs)
    if backend is None or (backend.backend_name, backend.layer_type) != (backend_name, "linear"):
        return None
    return layer_cls(target, adapter_name, config=config, **{**kwargs, "quantization_backend": backend})
