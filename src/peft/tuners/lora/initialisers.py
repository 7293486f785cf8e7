"""How A and B start: a table of initialisers by name, chosen by `init_lora_weights`.

An initialiser is a function (layer, adapter_name, value). Add one with `@initialiser("name")`; one that needs more than
a screen has a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...utils.naming import near_misses

if TYPE_CHECKING:
    from .layer import LoraLayer

Initialiser = Callable[["LoraLayer", str, "bool | str"], None]
INITIALISERS: dict[str, Initialiser] = {}


def initialiser(name: str) -> Callable[[Initialiser], Initialiser]:
    """Register the initialiser for `init_lora_weights=name`."""

    def register(function: Initialiser) -> Initialiser:
        INITIALISERS[name] = function
        return function

    return register


def initialise(layer: LoraLayer, adapter: str, value: bool | str) -> None:
    """Start an adapter's factors as `init_lora_weights` says.

    Raises:
        ValueError: no such initialiser.
    """
    if next(parameters_of(layer, adapter)).is_meta:
        return  # its values will be loaded
    if adapter in layer.lora_embedding_A:
        _start_embedding(layer, adapter, value)
        return
    _draw_defaults(layer, adapter)
    if value is False:
        return
    if value is True:
        uniform_a(layer, adapter)
    elif isinstance(value, str):
        find_initialiser(value)(layer, adapter, value)
    else:
        raise ValueError(f"init_lora_weights must be True, False or a name, got {value!r}.")


def parameters_of(layer: LoraLayer, adapter: str) -> Iterator[nn.Parameter]:
    """The factors of an adapter."""
    return (parameter for _, _, _, parameter in layer.adapter_parameters([adapter]))


def find_initialiser(value: str) -> Initialiser:
    """The initialiser of that name; what follows an underscore may be its parameter (`pissa_niter_4`)."""
    name = value.lower()
    if name not in INITIALISERS:
        name = name.partition("_")[0]
    if name not in INITIALISERS:
        near = near_misses(value.lower(), INITIALISERS)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"init_lora_weights={value!r} is none of True, False, {', '.join(map(repr, sorted(INITIALISERS)))}.{hint}"
        )
    return INITIALISERS[name]


def _draw_defaults(layer: LoraLayer, adapter: str) -> None:
    """torch's own start of both factors. It is drawn even where it is overwritten, so that a seed gives one start."""
    for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
        if hasattr(factor, "reset_parameters"):
            factor.reset_parameters()


def uniform_a(layer: LoraLayer, adapter: str) -> None:
    """A uniform in ±1/sqrt(in), B zero."""
    nn.init.kaiming_uniform_(layer.lora_A[adapter].weight, a=math.sqrt(5))
    zero_b(layer, adapter)


def zero_b(layer: LoraLayer, adapter: str) -> None:
    """B, and its bias if it has one, zero: the adapter starts as the identity."""
    B = layer.lora_B[adapter]
    nn.init.zeros_(B.weight)
    if layer.lora_bias[adapter]:
        nn.init.zeros_(B.bias)


@initialiser("gaussian")
def gaussian(layer: LoraLayer, adapter: str, value: bool | str) -> None:
    """A normal with standard deviation 1/r, B zero."""
    nn.init.normal_(layer.lora_A[adapter].weight, std=1 / layer.r[adapter])
    zero_b(layer, adapter)


@torch.no_grad()
def _start_embedding(layer: LoraLayer, adapter: str, value: bool | str) -> None:
    A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    A.normal_()
    B.normal_()
    if value is False:
        return
    A.zero_()
    B.normal_()
