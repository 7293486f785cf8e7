"""Weights that several modules of a model share, most of all those tied to its input embedding."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from .layer import AdapterLayer
from .lifecycle import modules_of
from .matching import embedding_involved, is_suffix

if TYPE_CHECKING:
    from .tuner import BaseTuner


def _input_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        return getter()
    except NotImplementedError:  # a model without word embeddings, as transformers' vision models say it
        return None


def input_embedding_name(model: nn.Module, default: str | None = None) -> str | None:
    """Dotted name of the model's input embedding.

    Args:
        model: any model; only one with `get_input_embeddings` says.
        default: what to give back for the others.
    """
    embedding = _input_embedding(model)
    if embedding is None:
        return default
    return next((name for name, module in modules_of(model) if module is embedding), default)


def _plain(module: nn.Module) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def tied_module_names(model: nn.Module) -> list[str]:
    """Sorted names of the modules whose weight the model declares tied to its input embedding."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "tie_word_embeddings", None) is False:
        return []
    declared: set[str] = set()
    for prefix, module in modules_of(model):
        keys = getattr(module, "_tied_weights_keys", None) or ()
        declared |= {f"{prefix}.{key}".lstrip(".") for key in keys}
    embedding = input_embedding_name(model)
    names = {key.rpartition(".")[0] for key in declared if key.endswith(".weight")} - {embedding}
    existing = dict(model.named_modules(remove_duplicate=False))
    return sorted(name for name in names if name in existing and hasattr(_plain(existing[name]), "weight"))


def check_tied_weights(tuner: BaseTuner, config: Any, model: nn.Module) -> None:
    """Prepare a configuration for tied embeddings if it asks for that, and warn where it should have.

    Args:
        tuner: the method's tuner; it may keep the ties (`ties_modules_to_save`, `ties_targets`).
        config: changed in place.
        model: the base model.
    """
    tied = tied_module_names(model)
    in_saved, in_targets = embedding_involved(config)
    ensure = getattr(config, "ensure_weight_tying", None)
    if ensure:
        if not tied:
            warnings.warn("ensure_weight_tying is set, but the model ties no module to its input embedding.")
        elif in_saved:
            tuner._add_modules_to_save_to_tie(config, tied)
        elif in_targets:
            tuner._add_targets_to_tie(config, tied)
        else:
            warnings.warn(
                "ensure_weight_tying is set, but neither modules_to_save nor target_modules has an embedding layer."
            )
    elif tied and (in_saved or in_targets) and not getattr(tuner, "keeps_ties_itself", False):
        where = "modules_to_save" if in_saved else "target_modules"
        remedy = (
            "set ensure_weight_tying=True to keep them tied"
            if ensure is False
            else f"{type(config).__name__} cannot keep them tied"
        )
        warnings.warn(f"{tied} are tied to the input embedding, and {where} has one of them: {remedy}.")


def save_tied_copies(config: Any, tied: list[str], embedding: str) -> None:
    """Make a configuration copy the embedding, and copies of what is tied to it share the weight (in place)."""
    names = [entry for entry in config.modules_to_save if not any(is_suffix(name, entry) for name in tied)]
    if embedding not in names:
        names.append(embedding)
    config.modules_to_save = names
    config.modules_to_tie = tied


def note_shared_weights(model: nn.Module, layers: Iterable[Any]) -> None:
    """Tell layers which of their base tensors other modules of the model use too, so that merging leaves those alone.

    Args:
        model: the model.
        layers: tuner layers in it.
    """
    users: Counter[int] = Counter()
    own: dict[int, dict[str, nn.Parameter]] = {}
    for _, module in modules_of(model):
        users.update(map(id, module._parameters.values()))
        if isinstance(module, AdapterLayer) and module.lent:
            users.update(map(id, module.lent.values()))
            own.setdefault(id(module.get_base_layer()), {}).update(module.lent)
    for layer in layers:
        if isinstance(layer, AdapterLayer) and not layer.shares_merged_weight:
            base_layer = layer.get_base_layer()
            tensors = base_layer._parameters | own.get(id(base_layer), {})
            layer.__dict__["_shared"] = frozenset(
                key for key, value in tensors.items() if value is not None and users[id(value)] > 1
            )
