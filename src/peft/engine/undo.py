"""Whole or not at all: a log of how to take back what was done, run when the block it guards fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any

_running: ContextVar[Undo | None] = ContextVar("running", default=None)


class Undo:
    """A context in which each change leaves word how to take it back; an exception takes back all, latest first.

    Within another one, what succeeds is still taken back if the other one fails.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._last: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def push(self, step: Callable[..., Any], *args: Any) -> None:
        """Call `step(*args)` if the block fails."""
        self._steps.append((step, args))

    def __enter__(self) -> Undo:
        self._around = _running.get()
        _running.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.set(self._around)
        last, self._last = self._last, []
        if kind is not None:
            for step, args in reversed(self._steps):
                step(*args)
        elif self._around is not None:
            self._around._steps += self._steps
            self._around._last += last
        else:
            for step, args in last:
                step(*args)
        self._steps.clear()


def when_done(step: Callable[..., Any], *args: Any) -> None:
    """Call `step(*args)` when nothing can fail any more: at the end of the outermost block, if all of it succeeds.

    For what can be put off and is dear to take back; without a block that is running, it is done at once.
    """
    block = _running.get()
    if block is None:
        step(*args)
    else:
        block._last.append((step, args))


def put_off(step: Callable[..., Any]) -> Iterator[tuple[Any, ...]]:
    """The arguments of each call of `step` that `when_done` has put off so far, in the order in which they will be made."""
    blocks = []
    block = _running.get()
    while block is not None:
        blocks.append(block)
        block = block._around
    return (args for block in reversed(blocks) for other, args in block._last if other is step)
