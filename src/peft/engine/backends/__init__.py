"""Weight backends: how the weight of a base layer is read and written, whatever form it is kept in.

A backend is one file in this package: a subclass of `QuantizationBackend` under `@register_backend`. Layers that no
backend claims hold a dense weight. Methods never see which backend a layer has. No file imports the package that it is
for: a layer can only be of its sort if somebody has imported it already, so that types are told apart by name.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import sys
from abc import ABC
from typing import Any

import torch
from torch import nn

from ...utils.error import FixedWeightError
from ..lifecycle import modules_of
from ..offload import fetched

_BACKENDS: list[type[QuantizationBackend]] = []
_loaded = False


class QuantizationBackend(ABC):  # noqa: B024  (client libraries know it as one)
    """Reads and writes the weight of layers that do not keep it as a plain floating-point parameter."""

    backend_name: str = ""
    supports_merge: bool = False
    layer_type: str = "linear"
    """Name of the kind of layer (see `kinds`)."""
    blocks_gradients_of: str = ""
    """The package, if `make_trainable` has something to do for its layers."""

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> QuantizationBackend | None:
        """A backend for this layer, None if it is not of this sort.

        Args:
            base_layer: an innermost base layer.
            options: what the tuner knows about the model's quantisation.
        """
        return None

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The weight as a dense floating-point tensor in the layer's own layout."""
        raise NotImplementedError

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        """Store a dense weight in the base layer of a tuner layer, in the form that it is kept in.

        Raises:
            TypeError: the form can only be read or only be applied.
        """
        raise self.unwritable(peft_layer._label or type(peft_layer).__name__)

    def unwritable(self, label: str) -> FixedWeightError:
        """The error that says that a weight cannot be written.

        Args:
            label: what messages call the layer.
        """
        return FixedWeightError(
            f"{label}: its weight is kept by {self.backend_name or type(self).__name__}, which can only be read: nothing "
            "can be merged into it. Keep the adapter beside it, or merge it into the model before that is quantised."
        )

    def features(self, base_layer: nn.Module) -> tuple[int, int]:
        """Input and output features, of a layer that is none of torch's kinds."""
        return base_layer.in_features, base_layer.out_features

    def stored_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The tensor in which the weight is kept, or the largest of several."""
        for name in ("qweight", "weight"):
            stored = getattr(base_layer, name, None)
            if torch.is_tensor(stored):
                return stored
        return max((*base_layer.parameters(), *base_layer.buffers()), key=torch.numel)

    def write(self, base_layer: nn.Module, weight: torch.Tensor, label: str) -> None:
        """Store a dense weight in a layer that stays the module that it is; arguments and errors as `ParameterBackend`'s."""
        raise self.unwritable(label)

    def snapshot(self, base_layer: nn.Module) -> Any:
        """Whatever `restore` needs to bring the stored weight back bit for bit; by default all tensors of the layer."""
        return {name: tensor.detach().clone() for name, tensor in base_layer.state_dict(keep_vars=True).items()}

    def restore(self, peft_layer: nn.Module, snapshot: Any) -> None:
        """Bring the weight of `snapshot` back."""
        current = peft_layer.get_base_layer().state_dict(keep_vars=True)
        for name, tensor in snapshot.items():
            current[name].data.copy_(tensor)

    def weight_in(self, base_layer: nn.Module, snapshot: Any) -> torch.Tensor:
        """The dense weight that a layer had when the snapshot was taken, as `get_base_weight` gives it."""
        layer = copy.copy(base_layer)
        layer._parameters, layer._buffers = dict(base_layer._parameters), dict(base_layer._buffers)
        for held in (layer._parameters, layer._buffers):
            held.update({name: tensor for name, tensor in snapshot.items() if name in held})
        return self.get_base_weight(layer)

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of the base layer's output where an in-place sum onto it would break its backward."""
        return x

    def make_trainable(self, base_layer: nn.Module, label: str) -> None:  # noqa: B027  (most have nothing to do)
        """See that gradients flow through a layer from now on, which some kernels do not give its input.

        Args:
            base_layer: the layer.
            label: what messages call it.
        """


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


def _is_dense(layer: nn.Module) -> bool:
    """A quick answer for most layers: torch's own, with a parameter of torch's own."""
    return type(layer) in _DENSE and type(layer._parameters.get("weight")) is nn.Parameter


def make_trainable(model: nn.Module) -> None:
    """See that gradients flow through all quantised layers of a model, of which not all need be adapted.

    Args:
        model: one of which something is going to be trained, adapters or prompts.
    """
    _load_all()
    concerned = [cls for cls in _BACKENDS if cls.blocks_gradients_of in sys.modules]
    if not concerned:  # which saves a walk through the model at each switch of adapters
        return
    for name, module in modules_of(model):
        for cls in concerned:
            backend = cls.claims(module, {})
            if backend is not None:
                backend.make_trainable(module, name.removesuffix(".base_layer"))


def dense_weight(base_layer: nn.Module, **options: Any) -> torch.Tensor:
    """The weight of a base layer as a dense tensor, whatever form it is kept in.

    Args:
        base_layer: an innermost base layer.
        options: as `resolve_quantization_backend`.
    """
    backend = resolve_quantization_backend(base_layer, **options)
    return fetched(base_layer, base_layer.weight) if backend is None else backend.get_base_weight(base_layer)


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """The backend of a base layer, None if its weight is dense.

    Args:
        base_layer: an innermost base layer.
        kwargs: what the tuner knows about the model's quantisation.
    """
    if _is_dense(base_layer):
        return None
    _load_all()
    for cls in _BACKENDS:
        backend = cls.claims(base_layer, kwargs)
        if backend is not None:
            return backend
    return None
