"""Whether a value read from JSON can be what a dataclass field is annotated to be."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import inspect
import reprlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

from .error import ConfigValueError

_SEQUENCES = (list, tuple, set, frozenset)
_LARGEST, _LARGEST_FLOAT = 2**63, 2.0**128  # what a number must stay below to be one of torch's
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80


def type_problem(config_cls: type, name: str, value: Any) -> str | None:
    """What is wrong with a field's value, or None.

    JSON knows fewer types than Python: collections of any kind are interchangeable, so are whole and fractional
    numbers, an enum is its value, and a nested dataclass is a dictionary, whose values are looked at too. None is right
    where the default is None. Numbers are finite.

    Args:
        config_cls: a dataclass.
        name: the field; one that the class does not have is no problem here.
        value: what JSON gave.
    """
    hint = _hints(config_cls).get(name, Any)
    if _fits(hint, value) or (value is None and _default(config_cls, name) is None):
        return _problem_inside(hint, value) or _unusable_number(config_cls, name, value)
    return f"expected {_words(hint)}, found {type(value).__name__} {_brief.repr(value)}{_near(hint, value)}"


def _problem_inside(hint: Any, value: Any) -> str | None:
    """What is wrong with a field of a nested dataclass, or None."""
    if not isinstance(value, Mapping):
        return None
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option):
            problems = ((key, type_problem(option, key, item)) for key, item in value.items())
            return next((f"in {key!r}: {problem}" for key, problem in problems if problem), None)
    return None


def check_numbers(config: Any) -> None:
    """Raise unless the fields of a configuration that are numbers, and its patterns' values, can be calculated with.

    Values of types that no file has, such as numpy's, are left to those who use them.

    Args:
        config: a configuration, from a file or made by hand, or one nested in it.

    Raises:
        ConfigValueError: one cannot; the message names the field.
    """
    cls = type(config)
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name, None)
        if dataclasses.is_dataclass(value):
            check_numbers(value)
        problem = _unusable_number(cls, entry.name, value)
        if problem is None and isinstance(value, str | list | dict) and _only_numbers(_hints(cls)[entry.name]):
            problem = f"expected {_words(_hints(cls)[entry.name])}, found {type(value).__name__} {_brief.repr(value)}."
        if problem:
            raise ConfigValueError(f"{cls.__name__}: field {entry.name!r}: {problem}")
    for name in getattr(cls, "module_patterns", ()):
        _check_pattern_values(config, name)


def _check_pattern_values(config: Any, name: str) -> None:
    whole = name not in config.fractional
    for pattern, value in (getattr(config, name, None) or {}).items():
        if isinstance(value, str | list | dict | type(None)) or _no_number(value, whole):
            raise ConfigValueError(
                f"{type(config).__name__}: field {name!r}: expected a {'whole ' if whole else ''}number for {pattern!r}, "
                f"found {_brief.repr(value)}."
            )


def _only_numbers(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return bool({int, float} & set(options)) and set(options) <= {int, float, type(None)}


def _unusable_number(config_cls: type, name: str, value: Any) -> str | None:
    """What is wrong with a field's number or list of numbers, or None; also for what is neither."""
    options = set(_parts(_hints(config_cls).get(name, Any)))
    if not options & {int, float}:
        return None
    whole = float not in options and name not in getattr(config_cls, "fractional", ())
    for number in value if isinstance(value, list) else [value]:
        problem = _no_number(number, whole)
        if name.endswith("dropout") and isinstance(number, int | float) and not 0 <= number <= 1:
            problem = "a probability"
        if problem:
            return f"expected {problem}, found {_brief.repr(number)}."
    return None


def _parts(hint: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield hint
    for argument in typing.get_args(hint):
        yield from _parts(argument)


def _no_number(value: Any, whole: bool) -> str | None:
    """What was expected instead of a number, None if it is what it should be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not _is_finite(value):
        return "a finite number"
    return "a whole number" if whole and isinstance(value, float) else None


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
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if hint in (str, bool):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping | hint)
    return True


def _is_finite(value: int | float) -> bool:
    return abs(value) < (_LARGEST_FLOAT if isinstance(value, float) else _LARGEST)


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
