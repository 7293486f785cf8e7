"""A model's cache of keys and values in the arguments of a call: what it is called, where it is, how much is in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What versions of transformers call the argument, the newest first."""


def cache_argument(function: Callable[..., Any]) -> str | None:
    """The name that a forward (or the like) has for the cache among its parameters, None if it takes none.

    Args:
        function: for example `model.forward`.
    """
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, None if there is none.

    Args:
        arguments: by name.
    """
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cached_length(cache: Any) -> int | None:
    """How many tokens a cache holds; None if it holds some and does not tell how many.

    Args:
        cache: a cache object, a tuple of (keys, values) per layer, or None.
    """
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return cache[0][0].shape[-2] if cache else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # only recurrent states, which have no length
        seen = getattr(cache, "has_previous_state", False)
        return None if (seen() if callable(seen) else seen) else 0
