"""Writing files whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Give the name of a new file beside `path` to write to; it takes the place of `path` when the block succeeds.

    Args:
        path: the file to make or replace; its folder exists.

    Yields:
        The name to write under. If the block raises, that file is removed and `path` is as it was.
    """
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
