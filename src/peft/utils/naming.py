"""Names: which ones an adapter may have, and what somebody probably meant by one that does not exist."""

from __future__ import annotations

import difflib
import functools
import unicodedata
from collections.abc import Iterable

from torch import nn

# Categories that break file names, state dict keys or terminals: controls, lone surrogates, line and paragraph ends.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BASE_MODEL = "__base__"  # stands for "no adapter" in a mixed batch


@functools.cache
def reserved_names() -> frozenset[str]:
    """What torch's containers and dictionaries already call an attribute, and the name of the bare model."""
    return frozenset({*dir(nn.ModuleDict()), *dir(nn.ParameterDict()), *dir(dict), _BASE_MODEL})


def check_adapter_name(name: str) -> str:
    """Refuse a name that cannot be an adapter's.

    A name is a component of parameter names, a key of torch containers and a folder: it must be safe as each of these.

    Args:
        name: the name somebody chose.

    Returns:
        The same name.

    Raises:
        TypeError: it is not a string.
        ValueError: it is empty, has a character it must not have, or is reserved.
    """
    if not isinstance(name, str):
        raise TypeError(f"An adapter name is a string, got {type(name).__name__}: {name!r}.")
    problem = _problem_with(name)
    if problem:
        raise ValueError(f"{name!r} can't be the name of an adapter: {problem}.")
    return name


def _problem_with(name: str) -> str | None:
    if not name.strip():
        return "it is empty" if not name else "it is blank"
    for character in "./\\":
        if character in name:
            return f"it contains {character!r}; try {_cleaned(name)!r}"
    if any(unicodedata.category(character) in _UNPRINTABLE for character in name):
        return "it contains a control character"
    if name in reserved_names():
        return f"that name is reserved; try {name.strip('_') + '_adapter'!r}"
    return None


def _cleaned(name: str) -> str:
    parts = name.replace("\\", "/").replace(".", "/").split("/")
    return "_".join(part for part in parts if part) or "default"


def brief(text: str, limit: int = 200) -> str:
    """A text in quotes for a message, cut if it is a long one.

    Args:
        text: the text.
        limit: how many characters of it to show.
    """
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def near_misses(name: str, choices: Iterable[str], n: int = 3) -> list[str]:
    """The choices that look most like a name, best first.

    Args:
        name: what was asked for.
        choices: what there is; the case of letters does not count.
        n: how many to give at most.
    """
    if len(name) > 200:  # nobody's misspelling, and the time to compare grows with its square
        return []
    by_folded: dict[str, str] = {}
    for choice in choices:
        by_folded.setdefault(choice.casefold(), choice)
    return [by_folded[close] for close in difflib.get_close_matches(name.casefold(), by_folded, n=n)]


def did_you_mean(name: str, choices: Iterable[str], n: int = 3) -> str:
    """A sentence to append to an error: " Did you mean 'a' or 'b'?", or nothing when no choice comes close."""
    close = near_misses(name, choices, n)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
