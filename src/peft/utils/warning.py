"""The warning category of the library."""

from __future__ import annotations


class PeftWarning(UserWarning):
    """Something works, but perhaps not as meant."""
