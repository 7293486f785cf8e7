"""Whether a value read from JSON can be what a dataclass field is annotated to be."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

_SEQUENCES = (list, tuple, set, frozenset)


def type_problem(config_cls: type, name: str, value: Any) -> str | None:
    """What is wrong with a field's value, or None.

    JSON knows fewer types than Python: collections of any kind are interchangeable, so are whole and fractional
    numbers, an enum is its value, and a nested dataclass is a dictionary. None is right where the default is None.

    Args:
        config_cls: a dataclass.
        name: the field; one that the class does not have is no problem here.
        value: what JSON gave.
    """
    hint = _hints(config_cls).get(name, Any)
    if _fits(hint, value) or (value is None and _default(config_cls, name) is None):
        return None
    return f"expected {_words(hint)}, found {type(value).__name__} {value!r}{_near(hint, value)}"


@functools.cache
def _hints(config_cls: type) -> dict[str, Any]:
    """The annotations that can be resolved here; a name imported for type checkers only cannot, and is not checked."""
    hints: dict[str, Any] = {}
    for base in reversed(config_cls.__mro__):
        scope = {**vars(typing), **vars(sys.modules.get(base.__module__, typing))}
        for name, annotation in inspect.get_annotations(base).items():
            try:
                hints[name] = eval(annotation, scope) if isinstance(annotation, str) else annotation
            except NameError:
                hints[name] = Any
    return hints


def _default(config_cls: type, name: str) -> Any:
    return next((entry.default for entry in dataclasses.fields(config_cls) if entry.name == name), dataclasses.MISSING)


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in arguments)
    if origin is Literal:  # which values there are is the configuration's own business, of newer versions too
        return any(_fits(type(option), value) for option in arguments)
    if origin in _SEQUENCES or hint in _SEQUENCES:
        return isinstance(value, _SEQUENCES) and _all_fit(arguments, value)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping) and all(_fits(arguments[1], item) for item in value.values() if arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping | hint)
    return True


def _all_fit(arguments: tuple[Any, ...], values: Any) -> bool:
    """Whether a collection's elements fit; of a tuple's element types it is enough to fit one."""
    return not arguments or all(any(_fits(argument, value) for argument in arguments) for value in values)


def _words(hint: Any) -> str:
    """An annotation as one would write it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(_words, arguments))
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(repr, arguments))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)


def _near(hint: Any, value: Any) -> str:
    """For an enum: the member that was probably meant."""
    options = [hint, *typing.get_args(hint)]
    members = [member.value for option in options if isinstance(option, enum.EnumMeta) for member in option]
    close = difflib.get_close_matches(str(value).upper(), members, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
