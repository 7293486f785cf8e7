"""Which modules and parameters of a model a configuration selects.

A `TargetMatcher` compiles a configuration once and answers name by name; it counts what each entry hit, so that an
entry that hit nothing can be named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..utils.constants import (
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
)
from ..utils.error import PatternError
from ..utils.naming import brief, near_misses
from .backends import resolve_quantization_backend
from .kinds import CONV1D_TRANSFORMERS, LINEAR, kind_of
from .layer import BaseTunerLayer
from .lifecycle import modules_of


class _ExcludedModule:
    """A falsy answer: the module would not be targeted whatever `target_modules` says."""

    def __bool__(self) -> bool:
        return False


EXCLUDED = _ExcludedModule()


def match_target_against_key(target_pattern: str, key: str) -> re.Match | None:
    """Match a whole module name against a regular expression."""
    return expression(target_pattern).fullmatch(key)


# A pattern per module is asked of every module, and re itself remembers 512 only.
_compiled = functools.lru_cache(maxsize=2**14)(re.compile)


def expression(text: str, within: str = "{}") -> re.Pattern:
    """A regular expression that a user wrote.

    Args:
        text: what was written.
        within: the expression that it is a part of, with `{}` in its place.

    Raises:
        PatternError: it is no regular expression.
    """
    try:
        return _compiled(within.replace("{}", text))
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"{brief(text)} in the configuration is no regular expression: {error}.") from error


def suffixes(name: str) -> Iterator[str]:
    """The dotted suffixes of a name, shortest first: "c", "b.c", "a.b.c"."""
    at = name.rfind(".")
    while at != -1:
        yield name[at + 1 :]
        at = name.rfind(".", 0, at)
    yield name


def is_suffix(name: str, entry: str) -> bool:
    """Whether an entry names a module by its whole name or by its last dotted parts."""
    return name == entry or name.endswith(f".{entry}")


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str, within: str = r"(.*\.)?({})$") -> str:
    """The first pattern that matches the end of a name, the name itself if none does.

    Args:
        pattern_keys: regular expressions for the last dotted parts of a name, in order of precedence.
        key_to_match: a dotted name.
        within: the expression that a pattern is a part of, with `{}` in its place; it is matched from the start.
    """
    for pattern in pattern_keys:
        if expression(pattern, within).match(key_to_match):
            return pattern
    return key_to_match


class NameSet:
    """A `target_modules`-like value: a regular expression over whole names, or a collection of names and suffixes."""

    def __init__(self, entries: str | Iterable[str] | None) -> None:
        self.pattern = expression(entries) if isinstance(entries, str) else None
        self.entries = frozenset() if entries is None or self.pattern else frozenset(entries)
        self.hits: dict[str, int] = dict.fromkeys([entries] if self.pattern else sorted(self.entries), 0)

    def __bool__(self) -> bool:
        return self.pattern is not None or bool(self.entries)

    def find(self, name: str) -> str | None:
        """The entry that selects a name, the most specific of several; None if none does."""
        if self.pattern is not None:
            return self.pattern.pattern if self.pattern.fullmatch(name) else None
        found = None
        for suffix in suffixes(name):
            if suffix in self.entries:
                found = suffix
        return found


class LayerFilter:
    """`layers_to_transform` and `layers_pattern`: which numbered layers a suffix match counts in."""

    def __init__(self, layers: int | list[int] | None, patterns: str | list[str] | None) -> None:
        self.layers = None if layers is None or layers == [] else {layers} if isinstance(layers, int) else set(layers)
        patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
        patterns = [pattern for pattern in patterns if pattern]
        expressions = [expression(pattern, r"(?:^|.*?\.){}\.(\d+)\.") for pattern in patterns]
        self.expressions = expressions or [re.compile(r".*?\.[^.]*\.(\d+)\.")]

    def allows(self, name: str) -> bool:
        if self.layers is None:
            return True
        match = next(filter(None, (each.match(name) for each in self.expressions)), None)
        return match is not None and int(match.group(1)) in self.layers


class TargetMatcher:
    """A configuration's selection of modules, compiled.

    Args:
        config: anything with `target_modules` and, optionally, `exclude_modules`, `modules_to_save`,
            `target_parameters`, `layers_to_transform`, `layers_pattern`.
    """

    def __init__(self, config: Any) -> None:
        self.targets = NameSet(getattr(config, "target_modules", None))
        self.excludes = NameSet(getattr(config, "exclude_modules", None))
        self.layer_filter = LayerFilter(
            getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
        )
        saved = getattr(config, "modules_to_save", None)
        self.saved = (
            re.compile("|".join(rf"(?:^|.*\.)(?:{re.escape(entry)})(?:$|\..*)" for entry in saved)) if saved else None
        )
        self.targets_nothing = (
            getattr(config, "target_modules", None) is None and getattr(config, "target_parameters", None) is not None
        )

    def check(self, name: str) -> bool | _ExcludedModule:
        """True for a target, `EXCLUDED` for a module that must not be one, False otherwise."""
        if self.excludes and (entry := self.excludes.find(name)) is not None:
            self.excludes.hits[entry] += 1
            return EXCLUDED
        if self.saved is not None and self.saved.match(name):
            return EXCLUDED
        if self.targets_nothing:
            return False
        entry = self.targets.find(name)
        if entry is None:
            return False
        if self.targets.pattern is None and entry != name and not self.layer_filter.allows(name):
            return False
        self.targets.hits[entry] += 1
        return True


def check_target_module_exists(config: Any, key: str) -> bool | _ExcludedModule:
    """Whether a configuration targets the module of that name.

    Args:
        config: a configuration with `target_modules`.
        key: the module's dotted name in the base model.

    Returns:
        True; False; or a falsy `_ExcludedModule` if `exclude_modules` or `modules_to_save` rule it out.
    """
    return TargetMatcher(config).check(key)


def without_hits(entries: NameSet, names: Iterable[str]) -> list[str]:
    """A line for each entry that selected nothing, with the nearest names there are; one for all after the first ten."""
    names = list(names)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    missed = [entry for entry, count in entries.hits.items() if count == 0]
    lines = []
    for entry in missed[:10]:
        shown = brief(entry)
        if entries.pattern and any(is_suffix(name, entry) for name in names):
            lines.append(f"{shown} (a string is a regular expression for whole names; for their ends, pass [{shown}])")
        else:
            near = near_misses(entry.rsplit(".", 1)[-1], leaves)
            lines.append(shown + (f" (nearest: {', '.join(near)})" if near else ""))
    return lines + ([f"{len(missed) - 10} more"] if len(missed) > 10 else [])


# ------------------------------------------------------------------------------------------------------ all-linear, lists


def all_linear_names(model: nn.Module, task_type: str | None) -> set[str]:
    """Full names of the linear layers of a model but its output layer; layers adapted already count as themselves."""
    names: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in modules_of(model):
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (f"{name}.",)
            if "Linear" in type(module).__name__:
                names.add(name)
        elif LINEAR.matches(module) or CONV1D_TRANSFORMERS.matches(module) or _is_quantised_linear(module):
            names.add(name)
    return names - _head_names(model, names, task_type)


def _is_quantised_linear(module: nn.Module) -> bool:
    backend = resolve_quantization_backend(module)
    return backend is not None and kind_of(module) is None and backend.layer_type == LINEAR.name


def _head_names(model: nn.Module, names: set[str], task_type: str | None) -> set[str]:
    # Only a transformers model says which of its layers is the output.
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return set()
    head = model.get_output_embeddings()
    if head is not None:
        return {name for name, module in modules_of(model) if module is head}
    if task_type == "SEQ_CLS":
        for attribute in SEQ_CLS_HEAD_NAMES:
            head = getattr(model, attribute, None)
            if head is not None:
                return {name for name, module in modules_of(model) if module is head}
    return set()


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Replace the shorthand "all-linear" in a configuration by the names that it stands for."""
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        peft_config.target_modules = all_linear_names(model, peft_config.task_type)
    return peft_config


def condensed(targets: set[str], names: Iterable[str]) -> set[str]:
    """The fewest suffixes that select exactly these full names out of all names; what selects none stays as it is.

    Args:
        targets: full names or suffixes.
        names: all module names of the model.
    """
    names = list(names)
    chosen = {name for name in names if any(suffix in targets for suffix in suffixes(name))}
    others = {suffix for name in names if name not in chosen for suffix in suffixes(name)}
    result: set[str] = set()
    for name in sorted(chosen, key=lambda name: (name.count("."), name)):
        options = list(suffixes(name))
        if any(option in result for option in options):
            continue
        free = next((option for option in options if option not in others), None)
        if free is None:
            return targets
        result.add(free)
    result |= targets.difference(suffix for name in names for suffix in suffixes(name))
    return result if len(result) < len(targets) else targets


def maybe_condense(config: Any, names: Iterable[str]) -> None:
    """Shorten a long list of targets in a configuration, as generated ones are, without changing what it selects."""
    targets = getattr(config, "target_modules", None)
    if getattr(config, "layers_to_transform", None) is not None:
        return  # full names are exempt from the layer filter, suffixes would not be
    if isinstance(targets, (list, set)) and len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        config.target_modules = condensed(set(targets), names)


def embedding_involved(config: Any) -> tuple[bool, bool]:
    """Whether an embedding (or the head tied to it) is among `modules_to_save`, and among `target_modules`."""

    def named(entries: Any) -> bool:
        if isinstance(entries, str):
            return any(expression(entries).fullmatch(name) for name in EMBEDDING_LAYER_NAMES)
        return any(entry.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES for entry in entries or ())

    return named(getattr(config, "modules_to_save", None)), named(getattr(config, "target_modules", None))
