"""What one call of a model gives its layers beside their own input: the adapter of each row, and inputs by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


class RowGroups(dict):
    """The rows of a mixed batch by adapter: name -> their indices, as a tensor.

    Args:
        adapter_names: the adapter of each row.
        held: the adapters that the layer at hand has; rows of others are left out.
        device: where the indices are to be.
    """

    def __init__(self, adapter_names: list[str], held: Iterable[str], device: torch.device) -> None:
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            if name in held:
                rows.setdefault(name, []).append(row)
        indices = torch.tensor([row for index in rows.values() for row in index], dtype=torch.int64, device=device)
        super().__init__(zip(rows, indices.split([len(index) for index in rows.values()])))
        self.complete = sum(map(len, rows.values())) == len(adapter_names)
        """Whether every row has an adapter here."""
        self.names = list(adapter_names) if self.complete else [name for name in rows for _ in rows[name]]
        """The adapter of each row; if not complete, of each index in `flat`."""

    def without(self, adapters: Iterable[str]) -> RowGroups:
        """The groups but those of some adapters."""
        groups = RowGroups((), (), torch.device("cpu"))
        groups.update((name, index) for name, index in self.items() if name not in adapters)
        groups.complete = False
        groups.names = [name for name, index in groups.items() for _ in range(len(index))]
        return groups

    @property
    def flat(self) -> torch.Tensor:
        """All indices, one adapter after the other."""
        return torch.cat(list(self.values()))


@dataclass
class MixedBatch:
    """Which adapter each row of the current batch uses; rows repeat per beam during generation."""

    adapter_names: list[str]
    _groups: dict[tuple, RowGroups] = field(default_factory=dict, repr=False)

    def groups(self, adapter_names: list[str], held: frozenset[str], device: torch.device) -> RowGroups:
        """The rows by adapter, found once for all layers with the same adapters.

        Args:
            adapter_names: the adapter of each row that the layer sees.
            held: the adapters of the layer.
            device: where its input is.
        """
        key = (len(adapter_names), held, device)
        if key not in self._groups:
            self._groups[key] = RowGroups(adapter_names, held, device)
        return self._groups[key]


@dataclass
class CallInputs:
    """What one call of a model gives its layers beside their own input, such as the task of each row.

    A layer that autograd computes again in the backward pass (gradient checkpointing) is given what the call gave.
    """

    current: dict[str, Any] | None = None
    recomputable: list[dict[str, Any]] = field(default_factory=list)
    """Inputs of the calls that may be computed again; the last two, which tells whether they are one."""
    recomputed: bool = False

    @contextmanager
    def given(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Context in which a call gives these."""
        before, self.current = self.current, inputs
        try:
            yield
        finally:
            self.current = before

    def remember(self, inputs: dict[str, Any]) -> None:
        """Keep a call's inputs for its backward pass."""
        kept = [] if self.recomputed else self.recomputable[-1:]
        self.recomputable, self.recomputed = [*kept, inputs], False

    def get(self, name: str) -> Any:
        """What the running call gives under that name, None for nothing.

        Raises:
            ValueError: a layer is computed again, and two calls gave different things since the last backward pass.
        """
        if self.current is not None:
            return self.current.get(name)
        if not self.recomputable or not in_backward():
            return None
        self.recomputed = True
        values = [inputs.get(name) for inputs in self.recomputable]
        if not all(_same(value, values[-1]) for value in values):
            raise ValueError(
                f"The model was called twice with different {name} before backward(), and gradient checkpointing cannot "
                "tell which call it computes again. Call backward() after each forward, or switch checkpointing off."
            )
        return values[-1]


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a is b or bool(a == b)


def rows_of(value: Any, index: torch.Tensor, rows: int) -> Any:
    """The entries of a per-row input for some rows of the batch.

    Args:
        value: a tensor or sequence with an entry per row, or per equal number of rows that follow each other.
        index: the rows.
        rows: how many the batch has.
    """
    if value is None or torch.is_tensor(value):
        return None if value is None else value[index]
    each = max(rows // max(len(value), 1), 1)
    return type(value)(value[row // each] for row in index[::each].tolist())
