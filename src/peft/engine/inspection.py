"""Questions about a model: what a configuration matched, where a module is, on which devices it lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .lifecycle import AdapterHolder
from .matching import TargetMatcher

if TYPE_CHECKING:
    from .tuner import BaseTuner


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, Any]:
    """What an adapter's configuration selects.

    Args:
        tuner: the tuner.
        adapter_name: the adapter.

    Returns:
        `matched` and `unmatched` module names, and under `hits` how many modules each entry of `target_modules`
        selects.
    """
    matcher = TargetMatcher(tuner.peft_config[adapter_name])
    names = [name for name, _ in tuner.model.named_modules() if name]
    matched = [name for name in names if matcher.check(name)]
    chosen = set(matched)
    return {
        "matched": matched,
        "unmatched": [name for name in names if name not in chosen],
        "hits": dict(matcher.targets.hits),
    }


def plain_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules, by the names that they have without adapters.

    Args:
        module: a base model, with adapters or without.
        prefix: what the names start with.
    """
    for name, child in module.named_children():
        while isinstance(child, AdapterHolder):
            child = child.base_layer
        yield prefix + name, child
        yield from plain_modules(child, f"{prefix}{name}.")


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Dotted name of a module in a model, the empty string if it is not there."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Module name -> device; the empty name for a model that is all in one place."""
    mapped = getattr(model, "hf_device_map", None)
    return mapped if mapped else {"": next(model.parameters()).device}
