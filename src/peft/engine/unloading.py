"""Taking adapters out of a model: the plain module inside each holder, and where it belongs."""

from __future__ import annotations

import warnings

from torch import nn

from .lifecycle import AdapterHolder, modules_of


def unloaded(holder: AdapterHolder, merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """The plain module inside a holder, the holders inside it unloaded too, with the adapters folded in if asked."""
    if hasattr(holder, "unload_and_optionally_merge_module"):
        return holder.unload_and_optionally_merge_module(merge, False, adapter_names)
    inner = holder.base_layer
    if isinstance(inner, AdapterHolder):
        plain = unloaded(inner, merge, adapter_names)
        holder.base_layer = plain
    if merge:
        holder.merge_for_good(adapter_names=adapter_names)
    elif holder.merged_adapters:
        holder.unmerge()
    return holder.get_base_layer()


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where a model refers to each of its modules, by the module's id; a shared one is in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, owner in modules_of(model):
        for name, child in owner._modules.items():
            places.setdefault(id(child), []).append((owner, name))
    return places


class TiedEmbeddings:
    """Whether a model's input and output embeddings shared their weight, and whether they still do."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def update_config(self) -> None:
        config = getattr(self.model, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            return
        embeddings = [getattr(self.model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
        weights = [getattr(module, "weight", None) for module in embeddings]
        if any(weight is None for weight in weights) or weights[0].data_ptr() == weights[1].data_ptr():
            return
        config.tie_word_embeddings = False
        warnings.warn(
            "The word embeddings are no longer tied after merging; config.tie_word_embeddings is set to False."
        )
