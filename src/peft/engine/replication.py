"""Stacking a model's decoder layers anew from ranges of them, weights shared (`layer_replication`)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module.

    Args:
        module: what to copy.
        share_weights: whether the copy has the same parameter objects, and is a module apart only to be adapted apart.
    """
    if not share_weights:
        return copy.deepcopy(module)
    shared = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, shared)


def _decoder_layers(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the list of decoder layers, and the list's attribute."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    if hasattr(model, "layers"):
        return model, "layers"
    if hasattr(getattr(model, "encoder", None), "layer"):
        return model.encoder, "layer"
    if hasattr(model, "h"):
        return model, "h"
    raise ValueError(
        f"layer_replication found no list of layers in {type(model).__name__}: looked for `layers`, `encoder.layer` and `h`."
    )


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Replace a model's layers by ranges of them, one after the other; repeated layers share their weights.

    Args:
        model: changed in place, with `config.num_hidden_layers`.
        layer_map: half-open ranges [start, end).

    Raises:
        ValueError: the model has no list of layers that is known.
    """
    owner, attribute = _decoder_layers(model)
    layers = getattr(owner, attribute)
    stacked: list[nn.Module] = []
    for start, end in layer_map:
        for index in range(start, end):
            layer = clone_module(layers[index], share_weights=True)
            stacked.append(layer)
    for index, layer in enumerate(stacked):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(owner, attribute, nn.ModuleList(stacked))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(stacked)
