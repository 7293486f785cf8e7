"""The methods: one package each, found by looking, imported when asked for.

A package registers its method in its `__init__` and names what it makes public in `__all__`; both are all that it takes
to be part of the library.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

# Names that a method's package exports for its own users only: they would mean several things here.
_AMBIGUOUS = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"}


def _method_packages() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]


def _exports() -> dict[str, str]:
    """Public name -> package, over all methods."""
    exports: dict[str, str] = {}
    for package in _method_packages():
        module = importlib.import_module(f"{__name__}.{package}")
        exports.update(dict.fromkeys(set(module.__all__) - _AMBIGUOUS, package))
    return exports


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_exports())
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _method_packages():
        return importlib.import_module(f"{__name__}.{name}")
    for package in _likely_first(name):
        module = importlib.import_module(f"{__name__}.{package}")
        if name in module.__all__ and name not in _AMBIGUOUS:
            globals()[name] = getattr(module, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _likely_first(name: str) -> list[str]:
    """All packages, those first whose name the public name starts with: LoraConfig is found without the others."""
    return sorted(_method_packages(), key=lambda package: not name.lower().startswith(package.replace("_", "")))


def __dir__() -> list[str]:
    return sorted([*globals(), *_exports()])
