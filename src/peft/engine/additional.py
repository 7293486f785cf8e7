"""Wrapping the modules that train beside a tuner: `modules_to_save`, tied copies, `trainable_token_indices`."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from ..utils.naming import near_misses
from .auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from .layer import BaseTunerLayer
from .lifecycle import AdapterHolder, holders_of, roster_of
from .matching import is_suffix
from .roster import Roster
from .sharding import gathered, is_sharded
from .tying import input_embedding_name, tied_module_names
from .undo import Undo


def set_additional_trainable_modules(
    model: nn.Module,
    peft_config: Any,
    model_config: dict[str, Any],
    adapter_name: str,
    activate_adapter: bool = True,
    roster: Roster | None = None,
    undo: Undo | None = None,
) -> list[AdapterHolder]:
    """Wrap what a configuration wants trained beside the tuner.

    Args:
        model: the base model, tuner layers in place.
        peft_config: the adapter's configuration.
        model_config: the model's configuration as a dictionary.
        adapter_name: the adapter.
        activate_adapter: whether the adapter is the active one.
        roster: what the model's holders share; found by default.
        undo: where to leave word how to take changes back.

    Returns:
        The new wrappers, and the token layers inside them.

    Raises:
        ValueError: an entry cannot be combined with another, or names nothing where something is needed.
    """
    wrap = Wrapping(model, adapter_name, peft_config, roster or roster_of(model), undo or Undo(), activate_adapter)
    saved = list(dict.fromkeys(getattr(peft_config, "modules_to_save", None) or []))
    wrap.all(saved, ModulesToSaveWrapper)
    to_tie = getattr(peft_config, "modules_to_tie", None)
    if to_tie:
        embedding = model.get_input_embeddings()
        source = embedding.modules_to_save[adapter_name] if isinstance(embedding, ModulesToSaveWrapper) else embedding
        wrap.all(to_tie, ModulesToSaveWrapper, tied_module=source)
    indices = getattr(peft_config, "trainable_token_indices", None)
    if indices is not None:
        _wrap_tokens(wrap, model, peft_config, indices)
    return wrap.made


class Wrapping:
    """Puts the wrappers of one adapter in place."""

    def __init__(
        self, model: nn.Module, adapter_name: str, config: Any, roster: Roster, undo: Undo, activate: bool
    ) -> None:
        self.model, self.adapter_name, self.roster, self.undo = model, adapter_name, roster, undo
        self.inference_mode = bool(getattr(config, "inference_mode", False))
        self.activate = activate
        self.peer = next((holder for _, holder in holders_of(model)), None)
        self.made: list[AdapterHolder] = []

    def matches(self, entry: str) -> list[str]:
        """Names of the modules that an entry means: whole dotted suffixes, nothing inside a holder or a match."""
        found: list[str] = []
        inside = ""
        for name, module in self.model.named_modules(remove_duplicate=False):
            if inside and name.startswith(inside):
                continue
            hit = bool(name) and is_suffix(name, entry)
            if hit:
                found.append(name)
            if hit or isinstance(module, AuxiliaryTrainingWrapper):
                inside = f"{name}."
        return found

    def all(
        self, entries: list[str], wrapper_cls: type[AuxiliaryTrainingWrapper], strict: bool = False, **options: Any
    ) -> list[AuxiliaryTrainingWrapper]:
        """Wrap every module that the entries name."""
        wrapped: list[AuxiliaryTrainingWrapper] = []
        done: dict[str, None] = {}
        for entry in entries:
            names = self.matches(entry)
            if not names:
                self._report_missing(entry, strict)
            for name in names:
                if not any(name == other or name.startswith(f"{other}.") for other in done):
                    done[name] = None
                    wrapped += filter(None, [self.one(name, wrapper_cls, **options)])
        return wrapped

    def _report_missing(self, entry: str, strict: bool) -> None:
        names = [name for name, _ in self.model.named_modules() if name]
        if any(is_suffix(name, entry) for name in names):
            warnings.warn(
                f"modules_to_save: {entry!r} is inside another module that is saved as a whole, and part of it."
            )
            return
        near = near_misses(entry, names) or near_misses(entry, {name.rsplit(".", 1)[-1] for name in names})
        hint = f" Nearest: {', '.join(near)}." if near else ""
        message = f"No module of the model is called {entry!r} (adapter {self.adapter_name!r}).{hint}"
        if strict:
            raise ValueError(message)
        if entry not in DEFAULT_HEADS:
            warnings.warn(f"modules_to_save: {message}")

    def one(self, name: str, wrapper_cls: type[AuxiliaryTrainingWrapper], **options: Any) -> Any:
        """Wrap one module, or add the adapter to the wrapper it has already."""
        parent_name, _, attribute = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        target = getattr(parent, attribute)
        if isinstance(parent, BaseTunerLayer) or _inside_layer(self.model, parent_name):
            raise ValueError(
                f"{name!r} is part of an adapted layer and cannot be saved as a whole. Name the layer itself in "
                "modules_to_save and take it out of target_modules."
            )
        if isinstance(target, wrapper_cls):
            self.undo.push(_take_out_of_wrapper, target, self.adapter_name)
            with self._at_hand(target):
                target.update(self.adapter_name, inference_mode=self.inference_mode, **options)
            target.join_roster(self.roster, target._label or name)
            return None
        with self._at_hand(target):
            wrapper = wrapper_cls(target, self.adapter_name, **options)
        for owner, child_name in _references(self.model, target):
            self.undo.push(setattr, owner, child_name, target)
            setattr(owner, child_name, wrapper)
        wrapper.train(target.training)
        self._take_state(wrapper, name)
        return wrapper

    def _at_hand(self, target: nn.Module) -> AbstractContextManager[None]:
        return gathered(target) if is_sharded(self.model) else nullcontext()

    def _take_state(self, wrapper: AuxiliaryTrainingWrapper, name: str) -> None:
        wrapper.join_roster(self.roster, name)
        core: AdapterHolder = getattr(wrapper, "token_adapter", wrapper)
        self.made += [wrapper] if core is wrapper else [wrapper, core]
        if self.peer is not None and self.peer is not wrapper:
            core._active_adapter = list(self.peer.active_adapters)
            core._disable_adapters = self.peer.disable_adapters
            core._inference = self.peer._inference
        elif not self.activate:
            core._active_adapter = []
        if self.inference_mode:
            core._inference |= {self.adapter_name}
        wrapper.refresh()


DEFAULT_HEADS = ("classifier", "score", "qa_outputs")
"""Entries that task types add for whichever head the model has; that one of them names nothing is no mistake."""


def _inside_layer(model: nn.Module, name: str) -> bool:
    module = model
    for part in filter(None, name.split(".")):
        if isinstance(module, BaseTunerLayer):
            return True
        module = getattr(module, part)
    return isinstance(module, BaseTunerLayer)


def _references(model: nn.Module, target: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place where the model refers to a module, so that a shared one is used with its adapters everywhere."""
    return [
        (owner, name)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if child is target and not isinstance(owner, AdapterHolder)
    ]


def _take_out_of_wrapper(wrapper: AuxiliaryTrainingWrapper, adapter_name: str) -> None:
    wrapper.forget(adapter_name)
    wrapper.roster.leave(adapter_name, wrapper._label)
    wrapper.refresh(())


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: list[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> list[AuxiliaryTrainingWrapper] | None:
    """Wrap the named modules for an adapter.

    Args:
        model: the base model.
        adapter_name: the adapter.
        module_names: whole names or dotted suffixes.
        inference_mode: use the wrapped parts, but train nothing.
        strict_module_check: raise if a name is not found instead of warning.
        wrapper_cls: `ModulesToSaveWrapper` by default.
        activate_adapter: whether the adapter is the active one.
        wrapper_kwargs: arguments of the wrapper.

    Returns:
        The wrappers that are new, None if no names were given.
    """
    if not module_names:
        return None
    with Undo() as undo:
        wrapping = Wrapping(model, adapter_name, None, roster_of(model), undo, activate_adapter)
        wrapping.inference_mode = inference_mode
        wrapped = wrapping.all(
            list(dict.fromkeys(module_names)),
            wrapper_cls or ModulesToSaveWrapper,
            strict=strict_module_check,
            **wrapper_kwargs,
        )
        for _, holder in holders_of(model):
            if activate_adapter and adapter_name in holder._get_available_adapters():
                holder.activate([adapter_name], inference_mode)
    return wrapped


# -------------------------------------------------------------------------------------------------------------- token rows


def _wrap_tokens(wrap: Wrapping, model: nn.Module, config: Any, indices: Any) -> None:
    if not isinstance(indices, dict):
        indices = {input_embedding_name(model, "embed_tokens"): list(indices)}
    saved = set(getattr(config, "modules_to_save", None) or ())
    clash = sorted(saved & set(indices))
    if clash:
        raise ValueError(
            f"{clash} are in modules_to_save and in trainable_token_indices; a module trains as a whole or by rows."
        )
    tied = tied_module_names(model)
    embedding_name = input_embedding_name(model, None)
    groups = _tied_groups(indices, tied, embedding_name, getattr(config, "ensure_weight_tying", False))
    for name, rows in groups.items():
        _wrap_one_table(wrap, name, rows)
    if tied and embedding_name and any(is_suffix(embedding_name, name) for name in groups):
        _tie_tokens(wrap, model, tied, indices)


def _tied_groups(
    indices: dict[str, list[int]], tied: list[str], embedding: str | None, ensure: bool
) -> dict[str, list[int]]:
    """The tables to wrap on their own; one that is tied to the embedding and lists the same rows follows it."""
    if not tied or embedding is None:
        return dict(indices)
    own = {name: rows for name, rows in indices.items() if not any(is_suffix(other, name) for other in tied)}
    source = next((rows for name, rows in own.items() if is_suffix(embedding, name)), None)
    for name, rows in indices.items():
        if name in own:
            continue
        if source is not None and list(rows) == list(source):
            continue
        if ensure:
            raise ValueError(
                f"ensure_weight_tying is set, but {name!r} trains the rows {rows} and the embedding it is tied to "
                f"trains {source}. Give both the same rows, or name the embedding alone."
            )
        own[name] = rows
    return own


def _wrap_one_table(wrap: Wrapping, name: str, rows: list[int]) -> None:
    for found in wrap.matches(name):
        target = wrap.model.get_submodule(found)
        if isinstance(target, BaseTunerLayer) and not isinstance(target, TrainableTokensWrapper):
            raise TypeError(
                f"{found!r} is adapted by a {type(target).__name__} already, so its rows cannot be trained by "
                "trainable_token_indices as well."
            )
    wrap.all([name], TrainableTokensWrapper, strict=True, token_indices=rows, tied_adapter=None)


def _tie_tokens(wrap: Wrapping, model: nn.Module, tied: list[str], indices: dict[str, list[int]]) -> None:
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, TrainableTokensWrapper):
        return
    source = embedding.token_adapter
    rows = source.token_indices[wrap.adapter_name]
    for name in tied:
        target = model.get_submodule(name)
        if target is embedding or any(
            is_suffix(name, entry) and list(other) != list(rows) for entry, other in indices.items()
        ):
            continue
        wrap.all([name], TrainableTokensWrapper, token_indices=rows, tied_adapter=source)
