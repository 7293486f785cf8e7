"""Reports on the adapters of a model: by layer, and in sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .lifecycle import AdapterHolder, holders_of

Irregular = Literal["irregular"]
IRREGULAR: Irregular = "irregular"


@dataclass
class TunerLayerStatus:
    """The adapters of one layer."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The adapters of a model; "irregular" where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def _tuner_of(model: nn.Module) -> nn.Module:
    """The module that the names in a report are relative to.

    Raises:
        TypeError: a model whose adapters are not in its layers.
    """
    from .tuner import BaseTuner  # the tuner is above the layers that it reports on

    base = model.__dict__.get("_modules", {}).get("base_model") if hasattr(model, "peft_type") else None
    if base is None or getattr(model, "is_mixed", False):
        if getattr(model, "is_mixed", False):
            raise TypeError(f"A {type(model).__name__} mixes methods and has no status of one.")
        return model
    if not isinstance(base, BaseTuner):
        raise TypeError(
            f"The adapters of this {type(model).__name__} are not in layers of the model (prompt learning), so there is no "
            "status of its layers."
        )
    return base


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The adapters of each layer, modules to save included.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        TypeError: prompt learning, which adapts no layers, or a mixed model.
        ValueError: the model has no adapters.
    """
    tuner = _tuner_of(model)
    report = [
        _layer_status(name, holder) for name, holder in holders_of(tuner) if not hasattr(holder, "token_adapter")
    ]
    if not report:
        raise ValueError("The model has no adapter layers.")
    return report


def _layer_status(name: str, holder: AdapterHolder) -> TunerLayerStatus:
    flags: dict[str, set[bool]] = {}
    devices: dict[str, set[str]] = {}
    for adapter, _, _, parameter in holder.adapter_parameters():
        flags.setdefault(adapter, set()).add(parameter.requires_grad)
        devices.setdefault(adapter, set()).add(parameter.device.type)
    for adapter, device in _buffer_devices(holder):
        devices.setdefault(adapter, set()).add(device)
    backend = getattr(holder, "quantization_backend", None)
    return TunerLayerStatus(
        name=name,
        module_type=repr(holder).partition("(")[0],
        enabled=not holder.disable_adapters,
        active_adapters=holder.active_adapters,
        merged_adapters=list(holder.merged_adapters),
        requires_grad={adapter: _common(values) for adapter, values in flags.items()},
        available_adapters=sorted(holder._get_available_adapters()),
        devices={adapter: sorted(types) for adapter, types in devices.items()},
        quantization_backend=None if backend is None else backend.backend_name,
    )


def _buffer_devices(holder: AdapterHolder) -> Iterable[tuple[str, str]]:
    for attribute in holder.adapter_layer_names + holder.other_param_names:
        container = holder._modules.get(attribute)
        if isinstance(container, nn.Module):
            for adapter in container.keys():
                tensors = (
                    container[adapter].buffers() if isinstance(container[adapter], nn.Module) else [container[adapter]]
                )
                yield from ((adapter, tensor.device.type) for tensor in tensors if torch.is_tensor(tensor))


def _common(values: Iterable[Any]) -> Any:
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else IRREGULAR


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters.

    Args:
        model: any model; 4-bit parameters count as what they stand for, partitioned ones in full.
    """
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            storage = getattr(parameter, "quant_storage", None)
            itemsize = storage.itemsize if storage is not None else parameter.element_size()
            count *= 2 * itemsize
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The adapters of a model in sum.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        TypeError: prompt learning, which adapts no layers, or a mixed model.
        ValueError: the model has no adapters.
    """
    tuner = _tuner_of(model)
    layers = get_layer_status(model)
    wrapped = tuner is not model
    base = tuner.model if wrapped else model
    is_pretrained = any(cls.__name__ == "PreTrainedModel" for cls in type(base).__mro__)
    trainable, total = count_parameters(model)
    configs = model.peft_config if wrapped else {}
    return TunerModelStatus(
        base_model_type=type(base).__name__ if wrapped or is_pretrained else "other",
        adapter_model_type=type(tuner).__name__ if wrapped else "None",
        peft_types={name: str(config.peft_type).partition(".")[2] for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad=_flags(layers),
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices=_devices(layers),
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    for layer in layers:
        if any(name in layer.available_adapters and name not in layer.merged_adapters for name in merged):
            return IRREGULAR
    return merged


def _flags(layers: list[TunerLayerStatus]) -> dict[str, bool | Irregular]:
    flags: dict[str, list[Any]] = {}
    for layer in layers:
        for adapter, flag in layer.requires_grad.items():
            flags.setdefault(adapter, []).append(flag)
    return {adapter: _common(values) for adapter, values in flags.items()}


def _devices(layers: list[TunerLayerStatus]) -> dict[str, list[str]]:
    devices: dict[str, set[str]] = {}
    for layer in layers:
        for adapter, types in layer.devices.items():
            devices.setdefault(adapter, set()).update(types)
    return {adapter: sorted(types) for adapter, types in devices.items()}
