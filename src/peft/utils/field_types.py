"""Whether a value read from JSON can be what a dataclass field is annotated to be."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import inspect
import operator
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
    """Make the numbers of a configuration plain ones, in place, and raise unless all can be calculated with.

    What training scripts have in the place of a number is taken as what it means: numbers of numpy and torch, their
    arrays where a list is asked for, a whole number that is written 8.0, and False for 0.

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
        elif value is not None and _is_numeric(cls, entry.name):
            value = _plain(value, _is_whole(cls, entry.name))
            problem = type_problem(cls, entry.name, value)
            if problem:
                raise ConfigValueError(f"{cls.__name__}: field {entry.name!r}: {problem}")
            setattr(config, entry.name, value)
    for name in getattr(cls, "module_patterns", ()):
        if getattr(config, name, None) is not None:
            setattr(config, name, _checked_pattern(cls, name, getattr(config, name)))


def _checked_pattern(cls: type, name: str, patterns: Any) -> Mapping:
    if not isinstance(patterns, Mapping):
        raise ConfigValueError(f"{cls.__name__}: field {name!r}: expected dict, found {_brief.repr(patterns)}.")
    whole = name not in cls.fractional
    patterns = _plain(patterns, whole)
    for pattern, value in patterns.items():
        if not isinstance(value, int | float) or _no_number(value, whole):
            raise ConfigValueError(
                f"{cls.__name__}: field {name!r}: expected a {'whole ' if whole else ''}number for {pattern!r}, found "
                f"{_brief.repr(value)}."
            )
    return patterns


def _plain(value: Any, whole: bool) -> Any:
    """A number, or a collection of numbers, in Python's own types; the same object if it is that already."""
    if isinstance(value, Mapping):
        items = {key: _plain(item, whole) for key, item in value.items()}
        return value if all(items[key] is item for key, item in value.items()) else items
    if isinstance(value, _SEQUENCES):
        items = [_plain(item, whole) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    if isinstance(value, range):
        return list(value)
    if hasattr(value, "tolist"):  # of numpy or torch
        return _plain(value.tolist(), whole)
    if isinstance(value, bool) or (whole and isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


def _is_numeric(config_cls: type, name: str) -> bool:
    return bool({int, float} & set(_parts(_hints(config_cls).get(name, Any))))


def _is_whole(config_cls: type, name: str) -> bool:
    fractional = getattr(config_cls, "fractional", ())
    return float not in set(_parts(_hints(config_cls).get(name, Any))) and name not in fractional


def _unusable_number(config_cls: type, name: str, value: Any) -> str | None:
    """What is wrong with a field's number or one of its numbers, or None; also for what is neither."""
    if not _is_numeric(config_cls, name):
        return None
    whole = _is_whole(config_cls, name)
    for number in _numbers_in(value):
        problem = _no_number(number, whole)
        if name.endswith("dropout") and not 0 <= number <= 1:
            problem = "a probability"
        if problem:
            return f"expected {problem}, found {_brief.repr(number)}."
    return None


def _numbers_in(value: Any) -> Iterator[int | float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, _SEQUENCES):
        for item in value:
            yield from _numbers_in(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _parts(hint: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield hint
    for argument in typing.get_args(hint):
        yield from _parts(argument)


def _no_number(value: int | float, whole: bool) -> str | None:
    """What was expected instead of a number, None if it is what it should be."""
    if not _is_finite(value):
        return "a finite number"
    return "a whole number" if whole and isinstance(value, float) and not value.is_integer() else None


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
