"""Whole or not at all: a log of how to take back what was done, run when the block it guards fails."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any


class Undo:
    """A context in which each change leaves word how to take it back; an exception takes back all, latest first."""

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def push(self, step: Callable[..., Any], *args: Any) -> None:
        """Call `step(*args)` if the block fails."""
        self._steps.append((step, args))

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for step, args in reversed(self._steps):
                step(*args)
        self._steps.clear()
