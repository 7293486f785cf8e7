"""Configuration of LN tuning."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import PeftConfig
from ...utils.peft_types import PeftType


@dataclass
class LNTuningConfig(PeftConfig):
    """Training of normalisation layers (arXiv 2312.11420): each adapter has its own copy of the targeted modules.

    Args:
        target_modules: names or dotted suffixes of the modules to train, of any type; a string is a regular expression
            for whole names. By default the normalisation layers of known architectures.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        modules_to_save: further modules of which the adapter trains and saves a copy.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LN_TUNING
