"""What a test needs of the packages around it, said in one way."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.version import Version


def lacking(package: str, oldest: str, why: str) -> str | None:
    """Why a test cannot run here, None if it can.

    Args:
        package: that the test uses.
        oldest: the first release with what it uses.
        why: what that is, as the end of a sentence: "has no quantised weights in bfloat16".
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    if Version(found) >= Version(oldest):
        return None
    return f"{package} {found} {why}; {oldest} or newer is needed"


def is_at_least(package: str, version: str) -> bool:
    """Whether a package is of this release or a later one, where tests expect other numbers of it."""
    return Version(importlib.metadata.version(package)) >= Version(version)


def needs(package: str, oldest: str, why: str) -> pytest.MarkDecorator:
    """A mark that skips a test where a package is missing or too old.

    Args:
        package: that the test uses.
        oldest: the first release with what it uses.
        why: what older ones lack, as the end of a sentence: "does not save optimizers of two groups".
    """
    reason = lacking(package, oldest, why)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def skip_file(package: str, oldest: str, why: str) -> None:
    """Skip the whole of the test file that calls this, where a package is missing or too old.

    Args:
        package: that the tests use.
        oldest: the first release with what they use.
        why: what older ones lack, as the end of a sentence.
    """
    reason = lacking(package, oldest, why)
    if reason is not None:
        pytest.skip(reason, allow_module_level=True)
