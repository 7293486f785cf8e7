"""A module that holds buffers under names, as `nn.ParameterDict` holds parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


class BufferDict(nn.Module):
    """A dictionary of buffers that moves, casts and (if persistent) saves with the module it is part of.

    Args:
        buffers: name -> tensor, or pairs of these.
        persistent: whether the buffers are part of the state dict.
    """

    def __init__(self, buffers: Any = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def keys(self):
        """The names."""
        return self._buffers.keys()

    def values(self):
        """The tensors."""
        return self._buffers.values()

    def items(self):
        """Names with tensors."""
        return self._buffers.items()

    def pop(self, key: str) -> torch.Tensor:
        """Remove a buffer and return it."""
        buffer = self[key]
        del self[key]
        return buffer

    def clear(self) -> None:
        """Remove all buffers."""
        for key in list(self):
            del self[key]

    def update(self, buffers: Any) -> None:
        """Add or replace buffers.

        Args:
            buffers: a mapping (an unordered one is taken in the order of its names) or an iterable of pairs.

        Raises:
            TypeError: neither of these.
            ValueError: an element that is no pair.
        """
        if not isinstance(buffers, Iterable):
            raise TypeError(f"buffers must be a mapping or an iterable of pairs, got {type(buffers).__name__}.")
        if isinstance(buffers, (OrderedDict, BufferDict)):
            pairs = list(buffers.items())
        elif isinstance(buffers, Mapping):
            pairs = sorted(buffers.items())
        else:
            pairs = [_pair(position, element) for position, element in enumerate(buffers)]
        for key, buffer in pairs:
            self[key] = buffer

    def extra_repr(self) -> str:
        return "\n".join(f"({key}): {tensor.dtype} of shape {tuple(tensor.shape)}" for key, tensor in self.items())

    def __call__(self, input: Any) -> None:
        raise RuntimeError("A BufferDict holds tensors and cannot be called.")


def _pair(position: int, element: Any) -> tuple[str, torch.Tensor]:
    if not isinstance(element, Iterable):
        raise TypeError(f"Element {position} must be a (name, tensor) pair, got {type(element).__name__}.")
    parts = tuple(element)
    if len(parts) != 2:
        raise ValueError(f"Element {position} must be a (name, tensor) pair, got {len(parts)} parts.")
    return parts
