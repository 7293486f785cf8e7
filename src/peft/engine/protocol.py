"""`BaseTunerLayer`: the protocol of a wrapped module, as client libraries know and call it."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from torch import nn

from ..utils.warning import PeftWarning
from .backends import QuantizationBackend
from .kinds import embed_scale
from .lifecycle import AdapterHolder
from .offload import execution_device, fetched


class BaseTunerLayer(AdapterHolder):
    """A module that holds adapters around `base_layer`; the protocol that client libraries know.

    A mixin, to be combined with `nn.Module`.
    """

    config_argument: ClassVar[str] = "config"
    """What the constructor calls the configuration."""
    quantization_backend: QuantizationBackend | None = None
    base_layer: nn.Module

    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped module."""
        layer = self.base_layer
        while isinstance(layer, BaseTunerLayer):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> torch.Tensor:
        layer = self.get_base_layer()
        if self.quantization_backend is not None:
            return self.quantization_backend.stored_weight(layer)
        return layer.qweight if hasattr(layer, "qweight") else layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.get_base_layer().bias

    def get_base_weight(self) -> torch.Tensor:
        """The base weight as a dense tensor in the layer's own layout, detached from autograd."""
        backend = self.quantization_backend
        if backend is not None:
            return backend.get_base_weight(self.get_base_layer())
        weight = self.weight
        return (fetched(self.get_base_layer(), weight) if weight.is_meta else weight).data

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Store a dense weight in the base layer.

        Args:
            weight_data: shape and dtype of `get_base_weight()`.
        """
        if self.quantization_backend is None:
            self.weight.data = weight_data
        else:
            self.quantization_backend.set_base_weight(self, weight_data)

    def _cast_input_dtype(self, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """`x` in the adapter's dtype, unless casting is switched off."""
        if x is None or x.dtype == dtype or not self.cast_input_dtype_enabled:
            return x
        return x.to(dtype)

    def _get_embed_scale(self) -> torch.Tensor | None:
        """The factor of a scaled embedding as a tensor, None if there is none that can be used."""
        layer = self.get_base_layer()
        scale = embed_scale(layer)
        if scale is None:
            if torch.is_tensor(getattr(layer, "embed_scale", None)):
                warnings.warn(
                    f"{self._label or type(layer).__name__}.embed_scale has {layer.embed_scale.numel()} elements; the "
                    "adapter's term follows only a scalar one and is left unscaled.",
                    PeftWarning,
                )
            return None
        return scale if torch.is_tensor(scale) else torch.tensor(scale)

    def _adapter_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        layer = self.get_base_layer()
        if isinstance(layer, nn.MultiheadAttention):
            layer = layer.out_proj
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        weight = next(
            (
                tensor
                for tensor in (getattr(layer, name, None) for name in ("weight", "qweight"))
                if torch.is_tensor(tensor)
            ),
            None,
        )
        if weight is None:
            weight = next(layer.parameters(), None)
        if weight is None:
            return None, None
        dtype = getattr(layer, "compute_dtype", None) or weight.dtype
        device = execution_device(layer) or weight.device if weight.is_meta else weight.device
        usable = dtype.is_floating_point or dtype.is_complex
        if self.quantization_backend is not None and dtype.itemsize == 1:  # codes that happen to be floating-point
            usable = False
        return device, dtype if usable else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Bring one adapter's tensors to the base weight's device and, if that is floating point, its dtype."""
        base_device, dtype = self._adapter_device_and_dtype()
        device = base_device if device is None else device
        if device is None or device.type == "meta":
            return
        for attribute in self.adapter_layer_names + self.other_param_names:
            container = self._modules.get(attribute)
            if container is not None and adapter_name in container:
                _move_entry(container, adapter_name, device, dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            f"{self._label or type(self).__name__} acts on activations and has no merged weight. Keep the adapter, or "
            "unload() it."
        )


def _move_entry(container: nn.Module, name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    entry = container[name]

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        # A tensor without storage takes on the dtype only; loading decides where it goes.
        wanted = dtype if tensor.is_floating_point() or tensor.is_complex() else None
        return tensor.to("meta" if tensor.is_meta else device, wanted)

    if isinstance(entry, nn.Module):
        if not all(_is_there(tensor, device, dtype) for tensor in [*entry.parameters(), *entry.buffers()]):
            entry._apply(moved)
    elif not _is_there(entry, device, dtype):
        is_parameter = isinstance(entry, nn.Parameter)
        container[name] = nn.Parameter(moved(entry.data), entry.requires_grad) if is_parameter else moved(entry)


def _is_there(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> bool:
    in_dtype = dtype is None or tensor.dtype == dtype or not (tensor.is_floating_point() or tensor.is_complex())
    return in_dtype and (tensor.device == device or tensor.is_meta)


def check_adapters_to_merge(module: AdapterHolder, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters that a call of `merge` is to fold in: the given or active ones that are not merged yet.

    Raises:
        TypeError: a string instead of a list.
    """
    if isinstance(adapter_names, str):
        raise TypeError(
            f"adapter_names must be a list of names, got the string {adapter_names!r}; pass [{adapter_names!r}]."
        )
    names = module.active_adapters if adapter_names is None else list(adapter_names)
    if not module.merged_adapters:
        return names
    fresh = [name for name in names if name not in module.merged_adapters]
    if fresh:
        warnings.warn(f"Merging {fresh} on top of {module.merged_adapters}, which are merged already.")
    else:
        warnings.warn(f"All of {names} are merged already; nothing is done.")
    return fresh
