"""Layers whose weights are kept elsewhere until they are used: by accelerate, or in parts by other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .sharding import gathered


def offload_hook(module: nn.Module) -> Any | None:
    """accelerate's hook that fetches a module's own weights when it is called; None if they are in it."""
    hook = module.__dict__.get("_hf_hook")  # its own: wrappers pass on what modules inside them have
    hooks = getattr(hook, "hooks", (hook,))  # a sequence of hooks, or one
    return next((hook for hook in hooks if getattr(hook, "offload", False)), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module with offloaded weights computes; None if its weights are not offloaded."""
    hook = offload_hook(module)
    return None if hook is None else torch.device(hook.execution_device)


def fetched(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a module with its values: itself, or what the offload hook keeps for it, where the module computes."""
    hook = offload_hook(module) if tensor.is_meta else None
    if hook is None:
        return tensor
    name = next(name for name, parameter in module.named_parameters() if parameter is tensor)
    return hook.weights_map[name].to(execution_device(module))


def stored(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a model's state dict with its values: itself, or what an offload hook keeps for it.

    Args:
        model: the model.
        name: the tensor's name in its state dict.
        tensor: what is there.
    """
    owner, _, attribute = name.rpartition(".")
    hook = offload_hook(model.get_submodule(owner)) if tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[attribute]


def call_with(module: nn.Module, tensors: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
    """`torch.func.functional_call`, for a module with offloaded weights too: its hook would fetch what was replaced."""
    if offload_hook(module) is not None:
        others = {name: tensor for name, tensor in module.named_parameters(recurse=False) if name not in tensors}
        tensors = {**{name: fetched(module, tensor) for name, tensor in others.items()}, **tensors}
        bare = module.__new__(type(module))
        hooked = ("_hf_hook", "_old_forward", "forward")
        bare.__dict__.update((name, value) for name, value in module.__dict__.items() if name not in hooked)
        module = bare
    return torch.func.functional_call(module, tensors, args, kwargs)


def forget_hook(module: nn.Module) -> None:
    """Take accelerate's hook off a module, and leave its tensors as they are."""
    from accelerate.hooks import remove_hook_from_module

    del module._hf_hook  # before it is asked to give back the tensors
    remove_hook_from_module(module)


@contextmanager
def onload_layer(layer: nn.Module, store: bool = True) -> Iterator[None]:
    """Have a layer's weights at hand for the duration, and write changes back.

    Offloaded ones come to their execution device; of those that are spread over processes, each gets the whole.

    Args:
        layer: a tuner layer; one whose weights are all here is left alone.
        store: False if nothing is going to be changed.
    """
    hooked = list(_offloaded(layer))
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        with gathered(layer, store):
            yield
    finally:
        for module, hook in hooked:
            if store:
                _store(module, hook.weights_map)
            hook.post_forward(module, None)


def _offloaded(layer: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """The modules in a layer whose weights a hook keeps, with the hook, outermost first."""
    # Not by modules(), which costs as much as what is done to the layer: hardly any has a hook.
    modules = [layer]
    for module in modules:
        modules.extend(child for child in module._modules.values() if child is not None)
    for module in dict.fromkeys(module for module in modules if "_hf_hook" in module.__dict__):
        hook = offload_hook(module)
        if hook is not None:
            yield module, hook


def _store(module: nn.Module, weights_map: Any) -> None:
    """Let the hook's copy of the weights be what the module holds now."""
    for name, parameter in module.named_parameters():
        if parameter.device.type != "meta":
            _set_in_map(weights_map, name, parameter.data.to("cpu"))


def _set_in_map(weights_map: Any, name: str, value: Any) -> None:
    dataset, prefix = getattr(weights_map, "dataset", None), getattr(weights_map, "prefix", "")
    if dataset is None:
        weights_map[name] = value
    elif hasattr(dataset, "state_dict"):
        # An accelerate loader: what it has in memory wins over its index of files on disk.
        dataset.state_dict[f"{prefix}{name}"] = value
        dataset.index.pop(f"{prefix}{name}", None)
        dataset.all_keys = sorted({*dataset.state_dict, *dataset.index})
    else:
        dataset[f"{prefix}{name}"] = value
