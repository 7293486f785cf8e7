"""Spreading a model anew that accelerate had put on several devices, or on disk, before it had an adapter."""

from __future__ import annotations

from typing import Any

from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader, get_balanced_memory, set_module_tensor_to_device
from torch import nn

from .engine.lifecycle import holders_of
from .engine.loading import to_base_device
from .engine.offload import offload_hook
from .engine.state import BASE_PREFIX, base_model_of


def redispatch(model: nn.Module, options: dict[str, Any]) -> None:
    """Spread a model with an adapter as options ask for; without options it stays spread as it is.

    The adapter itself is never offloaded: it is where its layers compute, so that it can be switched, trained and saved.

    Args:
        model: a `PeftModel` whose base model accelerate had dispatched.
        options: `device_map` (a strategy's name, or module name -> device), `max_memory`, `offload_folder` or
            `offload_dir`, `offload_index`.

    Raises:
        ValueError: a module is on disk in a file that is not safetensors, where it cannot be found by its new name.
    """
    if not options:
        return
    base = base_model_of(model)
    index = {**_disk_index(model), **(options.get("offload_index") or {})}
    remove_hook_from_submodules(model)
    device_map = _device_map(model, base, options.get("device_map", "auto"), options.get("max_memory"))
    index = _load_what_leaves_the_disk(model, index, device_map)
    folder = options.get("offload_folder") or options.get("offload_dir")
    dispatch_model(model, device_map=device_map, offload_dir=folder, offload_index=index or None)
    base.hf_device_map = {name.removeprefix(BASE_PREFIX): device for name, device in device_map.items()}
    _bring_adapters_back(model)


def _disk_index(model: nn.Module) -> dict[str, dict[str, str]]:
    """Today's names of the tensors on disk, with the files and the names there."""
    index = {}
    for path, module in model.named_modules():
        hook = offload_hook(module)
        dataset, prefix = (getattr(getattr(hook, "weights_map", None), name, None) for name in ("dataset", "prefix"))
        for name in [*module._parameters, *module._buffers]:
            info = getattr(dataset, "index", {}).get(f"{prefix}{name}")
            if info is None:
                continue
            if not info.get("safetensors_file"):
                raise ValueError(
                    f"{path}.{name} is offloaded to a file that is not safetensors, so the model cannot be spread anew "
                    "with the adapter in it. Save the base model as safetensors, or leave the device map as it is."
                )
            index[f"{path}.{name}"] = {"weight_name": f"{prefix}{name}", **info}
    return index


def _device_map(model: nn.Module, base: nn.Module, wanted: Any, max_memory: Any) -> dict[str, Any]:
    if not isinstance(wanted, str):
        names = dict(model.named_modules())
        return {name if name in names else BASE_PREFIX + name: device for name, device in wanted.items()}
    whole = list(getattr(base, "_no_split_modules", None) or ())
    if wanted != "sequential":
        max_memory = get_balanced_memory(
            model, max_memory=max_memory, no_split_module_classes=whole, low_zero=wanted == "balanced_low_0"
        )
    return infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)


def _load_what_leaves_the_disk(
    model: nn.Module, index: dict[str, dict[str, str]], device_map: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """Read tensors from disk whose modules get a device now; the index of the others."""
    loader = OffloadedWeightsLoader(index=index)
    staying = {}
    for name, info in index.items():
        device = next(device_map[above] for above in _enclosing(name) if above in device_map)
        if device == "disk":
            staying[name] = info
        else:
            set_module_tensor_to_device(model, name, device, value=loader[name])
    return staying


def _enclosing(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def _bring_adapters_back(model: nn.Module) -> None:
    for _, holder in holders_of(model):
        for _, container in holder.adapter_containers():
            if isinstance(container, nn.Module):
                remove_hook_from_submodules(container)
        for adapter in holder._get_available_adapters():
            to_base_device(holder, adapter)
        holder._plan = None
