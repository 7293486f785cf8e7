"""What all adapter-holding modules of a model know in common.

A `Roster` lets a single layer, called by a client that walks the model in its own way, answer for the whole: whether a
name is known, what would conflict, and which adapter to fall back to.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..utils.naming import near_misses
from .calls import CallInputs, MixedBatch

_rosters: weakref.WeakSet[Roster] = weakref.WeakSet()
"""Those of all models there are."""


@dataclass(eq=False)
class Roster:
    """What all adapter-holding modules of one model know in common. Holds names only, never modules."""

    holders: dict[str, set[str]] = field(default_factory=dict)
    """Adapter name -> labels of the modules that hold tensors of it."""
    exclusive: set[str] = field(default_factory=set)
    """Labels of modules that can use only one adapter at a time, since each replaces the module as a whole."""
    rows: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Label of a table -> adapter name -> the rows of it that the adapter replaces."""
    batch: MixedBatch | None = None
    inputs: CallInputs = field(default_factory=CallInputs)

    def __new__(cls, *args: Any, **kwargs: Any) -> Roster:
        """Be known from the start, also as a copy or unpickled."""
        roster = super().__new__(cls)
        _rosters.add(roster)
        return roster

    def elsewhere(self, adapter_names: Iterable[str]) -> set[str]:
        """Those of the names that are adapters of other models only."""
        return {
            name
            for name in set(adapter_names).difference(self.holders)
            if any(name in other.__dict__.get("holders", ()) for other in list(_rosters))
        }

    def join(self, adapter_name: str, label: str, exclusive: bool, rows: Iterable[int] = ()) -> None:
        self.holders.setdefault(adapter_name, set()).add(label)
        if exclusive:
            self.exclusive.add(label)
        if rows:
            self.rows.setdefault(label, {})[adapter_name] = tuple(rows)
        else:
            self.rows.get(label, {}).pop(adapter_name, None)

    def leave(self, adapter_name: str, label: str) -> None:
        labels = self.holders.get(adapter_name, set())
        labels.discard(label)
        self.rows.get(label, {}).pop(adapter_name, None)
        if not labels:
            self.holders.pop(adapter_name, None)

    def check(self, adapter_names: list[str], extra: Iterable[str] = ()) -> None:
        """Raise unless these adapters can be active together.

        Raises:
            ValueError: an unknown name, or two adapters that both replace one module or one row of a table.
        """
        self.check_known(adapter_names, extra)
        if len(adapter_names) > 1:
            self._check_copies(adapter_names)
            self._check_rows(adapter_names)

    def _check_copies(self, adapter_names: list[str]) -> None:
        contested: dict[str, list[str]] = {}
        for label in sorted(self.exclusive):
            rivals = [name for name in dict.fromkeys(adapter_names) if label in self.holders.get(name, ())]
            if len(rivals) > 1:
                contested[label] = rivals
        if contested:
            label, rivals = next(iter(contested.items()))
            others = f" (and {', '.join(map(repr, list(contested)[1:5]))})" if len(contested) > 1 else ""
            raise ValueError(
                f"The adapters {rivals} cannot be active together: each has its own copy of the module {label!r}{others}, "
                "and only one copy can be used at a time. Activate one of them, or train one of them without that module."
            )

    def _check_rows(self, adapter_names: list[str]) -> None:
        for label, by_adapter in sorted(self.rows.items()):
            taken: dict[int, str] = {}
            for name in dict.fromkeys(adapter_names):
                for row in by_adapter.get(name, ()):
                    rival = taken.setdefault(row, name)
                    if rival != name:
                        shared = sorted(set(by_adapter[rival]).intersection(by_adapter[name]))
                        rest = f" and {len(shared) - 10} more" if len(shared) > 10 else ""
                        raise ValueError(
                            f"The adapters {[rival, name]} cannot be active together: both train the rows of the tokens "
                            f"{shared[:10]}{rest} in {label or 'the embedding'!r}, and a row can only be one of theirs. "
                            "Activate one of them, or train one of them with other token indices."
                        )

    def check_known(self, adapter_names: Iterable[str], extra: Iterable[str] = ()) -> None:
        """Raise unless there are adapters of all these names.

        Raises:
            ValueError: an unknown name.
        """
        known = set(self.holders).union(extra)
        for name in adapter_names:
            if name not in known:
                near = near_misses(name, known)
                hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(f"There is no adapter {name!r}; known are {sorted(known)}.{hint}")

    def fallback(self, active: list[str], deleted: str) -> list[str]:
        """The adapters that are active once `deleted` is gone: the other active ones, else the first by name."""
        remaining = [name for name in active if name != deleted]
        if remaining or deleted not in active:
            return remaining
        others = sorted(set(self.holders) - {deleted})
        return others[:1]
