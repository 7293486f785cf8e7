"""Weight backends: how the weight of a base layer is read and written, whatever form it is kept in.

A backend is one file in this package: a subclass of `QuantizationBackend` under `@register_backend`. Layers that no
backend claims hold a dense weight. Methods never see which backend a layer has.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch
from torch import nn

from ..offload import fetched

_BACKENDS: list[type[QuantizationBackend]] = []
_loaded = False


class QuantizationBackend:
    """Reads and writes the weight of layers that do not keep it as a plain floating-point parameter."""

    backend_name: str = ""
    supports_merge: bool = False
    layer_type: str = "linear"

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> QuantizationBackend | None:
        """A backend for this layer, None if it is not of this sort.

        Args:
            base_layer: an innermost base layer.
            options: what the tuner knows about the model's quantisation.
        """
        raise NotImplementedError

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The weight as a dense floating-point tensor in the layer's own layout."""
        raise NotImplementedError

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        """Store a dense weight in the base layer of a tuner layer, in the form that it is kept in.

        Raises:
            TypeError: the form can only be read or only be applied.
        """
        raise TypeError(f"A weight kept by {self.backend_name or type(self).__name__} cannot be written.")

    def snapshot(self, base_layer: nn.Module) -> Any:
        """Whatever `restore` needs to bring the stored weight back bit for bit; by default all tensors of the layer."""
        return {name: tensor.detach().clone() for name, tensor in base_layer.state_dict(keep_vars=True).items()}

    def restore(self, peft_layer: nn.Module, snapshot: Any) -> None:
        """Bring the weight of `snapshot` back."""
        current = peft_layer.get_base_layer().state_dict(keep_vars=True)
        for name, tensor in snapshot.items():
            current[name].data.copy_(tensor)

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of the base layer's output where an in-place sum onto it would break its backward."""
        return x


def register_backend(cls: type[QuantizationBackend]) -> type[QuantizationBackend]:
    _BACKENDS.append(cls)
    return cls


def _load_all() -> None:
    global _loaded
    if not _loaded:
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
        _loaded = True


_DENSE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dense_weight(base_layer: nn.Module, **options: Any) -> torch.Tensor:
    """The weight of a base layer as a dense tensor, whatever form it is kept in.

    Args:
        base_layer: an innermost base layer.
        options: as `resolve_quantization_backend`.
    """
    backend = None if type(base_layer) in _DENSE else resolve_quantization_backend(base_layer, **options)
    return fetched(base_layer, base_layer.weight) if backend is None else backend.get_base_weight(base_layer)


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The backend of a base layer, None if its weight is dense.

    Args:
        base_layer: an innermost base layer.
        kwargs: what the tuner knows about the model's quantisation.
    """
    _load_all()
    for cls in _BACKENDS:
        backend = cls.claims(base_layer, kwargs)
        if backend is not None:
            return backend
    return None
