"""How A and B start: a table of initialisers by name, chosen by `init_lora_weights`.

An initialiser is a function (layer, adapter name, value, configuration). Add one with `@initialiser("name")`; one that
needs more than a screen has a file of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...utils.naming import near_misses

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer

Start = Callable[["LoraLayer", str, str, "LoraConfig | None"], None]


@dataclass(frozen=True)
class Initialiser:
    """A way for A and B to start."""

    start: Start
    changes_base: bool
    """Whether it takes something out of the base weight, so that it must run again when the adapter is loaded."""
    embeddings: bool
    """Whether it is for embeddings too; on those the others leave A zero and B normal."""


INITIALISERS: dict[str, Initialiser] = {}


def initialiser(name: str, *, changes_base: bool = False, embeddings: bool = False) -> Callable[[Start], Start]:
    """Register the initialiser for `init_lora_weights=name`, in upper or lower case.

    Args:
        name: in lower case; an N at the end stands for a number.
        changes_base: whether it changes the base weight.
        embeddings: whether it is for embeddings too.
    """

    def register(function: Start) -> Start:
        INITIALISERS[name] = Initialiser(function, changes_base, embeddings)
        return function

    return register


def find_initialiser(value: str) -> Initialiser:
    """The initialiser of that name.

    Raises:
        ValueError: there is none.
    """
    from . import corda, eva, loftq, loraga, mica, olora, orthogonal, pissa  # noqa: F401  (they register themselves)

    name = re.sub(r"(?<=_)\d+$", "N", value.lower())
    if name not in INITIALISERS:
        near = near_misses(value.lower(), INITIALISERS)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"init_lora_weights={value!r} is none of True, False, {', '.join(map(repr, sorted(INITIALISERS)))}.{hint}"
        )
    return INITIALISERS[name]


def changes_base(value: Any) -> bool:
    """Whether a value of `init_lora_weights` makes an adapter start by changing the base weight."""
    return isinstance(value, str) and find_initialiser(value).changes_base


def initialise(layer: LoraLayer, adapter: str, value: bool | str | None, config: LoraConfig | None = None) -> None:
    """Start an adapter's factors as `init_lora_weights` says.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        value: as in `LoraConfig`.
        config: the adapter's configuration, with settings that some initialisers have.

    Raises:
        ValueError: no such initialiser, or one that does not go with this kind of layer.
    """
    if value and not isinstance(value, str | bool):
        raise ValueError(f"init_lora_weights must be True, False or a name, got {value!r}.")
    chosen = find_initialiser(value) if value and isinstance(value, str) else None
    on_embedding = adapter in (layer._modules.get("lora_embedding_A") or ())  # not to make an empty one
    if on_embedding and chosen is not None and not chosen.embeddings:
        value, chosen = True, None
    if next(parameters_of(layer, adapter)).is_meta and not (chosen is not None and chosen.changes_base):
        return  # its values will be loaded
    if on_embedding:
        _start_embedding(layer, adapter, value)
    else:
        _draw_defaults(layer, adapter)
    if chosen is not None:
        chosen.start(layer, adapter, value, config)
    elif value and not on_embedding:
        uniform_a(layer, adapter)


def parameters_of(layer: LoraLayer, adapter: str) -> Iterator[nn.Parameter]:
    """The factors of an adapter."""
    return (parameter for _, _, _, parameter in layer.adapter_parameters([adapter]))


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
def gaussian(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """A normal with standard deviation 1/r, B zero."""
    nn.init.normal_(layer.lora_A[adapter].weight, std=1 / layer.r[adapter])
    zero_b(layer, adapter)


@torch.no_grad()
def _start_embedding(layer: LoraLayer, adapter: str, value: bool | str | None) -> None:
    A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    A.normal_()
    B.normal_()
    if value:
        A.zero_()
        B.normal_()
