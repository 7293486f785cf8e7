"""Layers whose weights accelerate keeps elsewhere until they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Bring a tuner layer's offloaded weights to their execution device for the duration, and write changes back.

    Args:
        layer: a tuner layer; one without offload hooks is left alone.
    """
    hooked = _offloaded_modules(layer)
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            _store(module)
            module._hf_hook.post_forward(module, None)


def _offloaded_modules(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if getattr(getattr(module, "_hf_hook", None), "offload", False)]


def _store(module: nn.Module) -> None:
    """Let the hook's copy of the weights be what the module holds now."""
    weights_map: Any = module._hf_hook.weights_map
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
