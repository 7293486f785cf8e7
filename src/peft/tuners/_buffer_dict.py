"""Public import path of `BufferDict`."""

from ..utils.buffer_dict import BufferDict

__all__ = ["BufferDict"]
