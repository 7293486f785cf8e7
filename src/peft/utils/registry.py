"""The table of methods: filled by the methods themselves, read by everyone else."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .naming import near_misses


@dataclass(frozen=True)
class Method:
    """What one call of `register_peft_method` said."""

    peft_type: Any
    config_cls: type
    model_cls: type
    prefix: str
    is_mixed_compatible: bool


METHODS: dict[Any, Method] = {}


def _package_of(peft_type: str) -> str:
    # A method called X lives in the package peft.tuners.x: this convention is the only list of methods there is.
    return f"peft.tuners.{getattr(peft_type, 'value', peft_type).lower()}"


def method(peft_type: str) -> Method:
    """The method of that type; its package is imported on the first request.

    Raises:
        KeyError: there is no such method.
    """
    if peft_type not in METHODS:
        name = getattr(peft_type, "value", peft_type)
        if not (isinstance(name, str) and name.isidentifier() and importlib.util.find_spec(_package_of(name))):
            raise KeyError(_unknown(name))
        importlib.import_module(_package_of(name))
    return METHODS[peft_type]


def _unknown(name: Any) -> str:
    from .peft_types import PeftType  # lazy: peft_types imports this module

    if name in PeftType.__members__:
        return f"The PEFT method {name} is not part of this version of the library."
    near = near_misses(str(name).upper(), PeftType.__members__)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"There is no PEFT method {name!r}.{hint}"


def all_methods() -> dict[Any, Method]:
    """Every method of the library, imported."""
    from .peft_types import PeftType  # lazy: peft_types imports this module

    for peft_type in PeftType:
        if peft_type not in METHODS and importlib.util.find_spec(_package_of(peft_type.value)):
            importlib.import_module(_package_of(peft_type.value))
    return METHODS


def config_class(peft_type: str) -> type:
    """The configuration class of a method."""
    return method(peft_type).config_cls


class MethodTable(dict):
    """A dictionary over all methods that imports a method when it is first asked for."""

    def __init__(self, value: Callable[[Method], Any], include: Callable[[Method], bool] = lambda entry: True) -> None:
        super().__init__()
        self._value, self._include = value, include

    def _load(self) -> MethodTable:
        for peft_type, entry in all_methods().items():
            if self._include(entry):
                super().setdefault(peft_type, self._value(entry))
        return self

    def __missing__(self, key: Any) -> Any:
        entry = method(key)
        if not self._include(entry):
            raise KeyError(key)
        super().__setitem__(entry.peft_type, self._value(entry))
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self.get(key, self) is not self

    def __iter__(self) -> Iterator[Any]:
        return dict.__iter__(self._load())

    def __len__(self) -> int:
        return dict.__len__(self._load())

    def keys(self):
        return dict.keys(self._load())

    def values(self):
        return dict.values(self._load())

    def items(self):
        return dict.items(self._load())

    def __repr__(self) -> str:
        return dict.__repr__(self._load())
