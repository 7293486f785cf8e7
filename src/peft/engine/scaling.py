"""The factors of adapters' terms, as floats to everyone and as tensors to compiled code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


class Scaling(dict):
    """Adapter name -> factor of its term.

    A float that compiled code reads becomes a constant of it, so that each new value would compile it anew. Within
    compiled code an entry is therefore a tensor with the same value.

    Args:
        values: the factors, floats or tensors with one element.
        tensors: the tensors of a dictionary that this one takes the place of.
    """

    def __init__(
        self, values: Mapping[str, Any] | Iterable = (), tensors: dict[str, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.tensors = {} if tensors is None else tensors
        self.update(values)

    def __getitem__(self, adapter: str) -> Any:
        if torch.compiler.is_compiling():
            return self.tensors[adapter]
        return super().__getitem__(adapter)

    def __setitem__(self, adapter: str, value: Any) -> None:
        super().__setitem__(adapter, value)
        if torch.is_tensor(value):
            self.tensors[adapter] = value
        elif adapter in self.tensors:
            self.tensors[adapter].fill_(value)
        else:
            self.tensors[adapter] = torch.tensor(value, dtype=torch.float64)  # without a dimension it casts nothing up

    def __delitem__(self, adapter: str) -> None:
        super().__delitem__(adapter)
        self.tensors.pop(adapter, None)

    def pop(self, adapter: str, *default: Any) -> Any:
        self.tensors.pop(adapter, None)
        return super().pop(adapter, *default)

    def update(self, values: Mapping[str, Any] | Iterable = (), **more: Any) -> None:
        for adapter, value in dict(values, **more).items():
            self[adapter] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return Scaling, (dict(self), self.tensors)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)
