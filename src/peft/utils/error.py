"""The errors that are more than a plain built-in one.

Each derives from every built-in class that callers may catch already, so that a clearer error breaks no `except`.
"""

from __future__ import annotations

import re


class PeftError(Exception):
    """Base of the errors that this library defines."""

    def __str__(self) -> str:
        # KeyError, which some subclasses also are, would show its message quoted and escaped.
        return Exception.__str__(self)


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The configuration selects no module of the model."""


class ConfigFileError(PeftError, ValueError, KeyError, TypeError):
    """An `adapter_config.json` cannot be used; the message names the file and, where there is one, the field."""


class ConfigValueError(PeftError, ValueError, TypeError):
    """A field of a configuration has a value that nothing can be done with; the message names the field."""


class SizeError(PeftError, ValueError, RuntimeError):
    """A tensor of an adapter would be larger than there is memory for, or than can be counted."""


class PatternError(PeftError, ValueError, re.error):
    """A string that is to be a regular expression is none; the message names it and the field that has it."""


class SaveLocationError(PeftError, ValueError, AssertionError):
    """A folder was asked for and something else is there."""


class TooFewExpertsError(PeftError, ValueError, RuntimeError):
    """A router is to give each token to more experts than there are."""


class UnsupportedTableError(PeftError, ValueError, AttributeError):
    """Rows of tokens are to be trained in a module that has no table of tokens."""


class SourceTasksError(PeftError, ValueError, RuntimeError, KeyError):
    """A file with the weights of source tasks does not fit the prompt that is to start from it."""


class TaskIdsError(PeftError, ValueError, IndexError, RuntimeError):
    """The rows of a batch are not each of one of an adapter's tasks."""


class FixedWeightError(PeftError, TypeError, NotImplementedError):
    """A weight is kept in a form that cannot be written, or not even read."""


class UnknownAdapterError(PeftError, ValueError, KeyError):
    """The model has no adapter of that name."""
