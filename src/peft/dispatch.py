"""Spreading a model anew that accelerate had put on several devices, or on disk, before it had an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import (
    OffloadedWeightsLoader,
    get_balanced_memory,
    offload_weight,
    set_module_tensor_to_device,
)
from torch import nn

from .engine.lifecycle import holders_of
from .engine.loading import to_base_device
from .engine.offload import forget_hook, offload_hook
from .engine.state import base_model_of

Index = dict[str, dict[str, str]]


def redispatch(model: nn.Module, options: dict[str, Any]) -> None:
    """Spread a model with an adapter as options ask for; without options it stays spread as it is.

    The adapter itself is never offloaded: it is where its layers compute, so that it can be switched and saved.

    Args:
        model: a `PeftModel` whose base model accelerate had dispatched.
        options: `device_map` (a strategy's name, or module name -> device), `max_memory`, `offload_folder` or
            `offload_dir`, `offload_index`.

    Raises:
        ValueError: a module is on disk in a file that is not safetensors, where it cannot be found by its new name; or
            one is to go to disk, and no folder is given.
    """
    if not options:
        return
    base = base_model_of(model)
    index = {**_disk_index(base), **(options.get("offload_index") or {})}
    for part in _hooked(base):
        remove_hook_from_module(part)
    device_map = options.get("device_map", "auto")
    if isinstance(device_map, str):
        device_map = _device_map(base, device_map, options.get("max_memory"))
    folder = options.get("offload_folder") or options.get("offload_dir")
    adapters = list(_adapter_tensors(base))
    index = _load_what_leaves_the_disk(base, index, device_map)
    _write_what_goes_to_disk(base, index, device_map, folder, {id(tensor) for _, _, tensor in adapters})
    dispatch_model(base, device_map=device_map, offload_dir=folder, offload_index=index or None)
    _put_back(base, adapters)


def _disk_index(base: nn.Module) -> Index:
    """Today's names of the tensors on disk, with the files and the names there."""
    index = {}
    for path, module in base.named_modules():
        weights_map = getattr(offload_hook(module), "weights_map", None)
        on_disk, prefix = (
            getattr(getattr(weights_map, "dataset", None), "index", {}),
            getattr(weights_map, "prefix", ""),
        )
        for name in [*module._parameters, *module._buffers]:
            info = on_disk.get(f"{prefix}{name}")
            if info is None:
                continue
            if not info.get("safetensors_file"):
                raise ValueError(
                    f"{path}.{name} is offloaded to a file that is not safetensors, so the model cannot be spread "
                    "anew with an adapter in it. Save the base model as safetensors, or leave the device map as it is."
                )
            index[f"{path}.{name}"] = {"weight_name": f"{prefix}{name}", **info}
    return index


def _hooked(module: nn.Module) -> list[nn.Module]:
    # By the module's own attributes: wrappers pass on those of modules inside them.
    return [part for part in module.modules() if "_hf_hook" in part.__dict__]


def _device_map(base: nn.Module, strategy: str, max_memory: Any) -> dict[str, Any]:
    whole = list(getattr(base, "_no_split_modules", None) or ())
    if strategy != "sequential":
        max_memory = get_balanced_memory(
            base, max_memory=max_memory, no_split_module_classes=whole, low_zero=strategy == "balanced_low_0"
        )
    return infer_auto_device_map(base, max_memory=max_memory, no_split_module_classes=whole)


def _load_what_leaves_the_disk(base: nn.Module, index: Index, device_map: dict[str, Any]) -> Index:
    """Read tensors from disk whose modules get a device now; the index of the others."""
    loader = OffloadedWeightsLoader(index=index)
    staying = {}
    for name, info in index.items():
        device = _device_of(name, device_map)
        if device == "disk":
            staying[name] = info
        else:
            set_module_tensor_to_device(base, name, device, value=loader[name])
    return staying


def _write_what_goes_to_disk(
    base: nn.Module, index: Index, device_map: dict[str, Any], folder: str | None, adapters: set[int]
) -> None:
    """Write tensors in memory whose modules go to disk now, and list them in the index."""
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) in adapters or name in index or _device_of(name, device_map) != "disk":
            continue
        if folder is None:
            raise ValueError(f"The device map puts {name} on disk; pass offload_folder to say where.")
        os.makedirs(folder, exist_ok=True)
        offload_weight(tensor.detach(), name, folder, index)


def _device_of(name: str, device_map: dict[str, Any]) -> Any:
    """The device of a tensor: that of the innermost module around it which the map names."""
    parts = name.split(".")
    enclosing = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next((device_map[module] for module in enclosing if module in device_map), None)


def _adapter_tensors(base: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for _, holder in holders_of(base):
        for _, container in holder.adapter_containers():
            for part in container.modules() if isinstance(container, nn.Module) else ():
                for attribute, tensor in [*part._parameters.items(), *part._buffers.items()]:
                    if tensor is not None:
                        yield part, attribute, tensor


def _put_back(base: nn.Module, tensors: list[tuple[nn.Module, str, torch.Tensor]]) -> None:
    """Let adapters hold their tensors again, without hooks, where their layers compute."""
    for part in {id(part): part for part, _, _ in tensors}.values():
        if "_hf_hook" in part.__dict__:
            forget_hook(part)
    for part, attribute, tensor in tensors:
        (part._parameters if attribute in part._parameters else part._buffers)[attribute] = tensor
    for _, holder in holders_of(base):
        for adapter in holder._get_available_adapters():
            to_base_device(holder, adapter)
        holder._plan = holder._make_plan()
