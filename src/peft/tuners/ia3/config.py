"""The configuration of (IA)³."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import PeftConfig
from ...utils.peft_types import PeftType


@dataclass
class IA3Config(PeftConfig):
    """(IA)³ (arXiv 2205.05638): one learned vector per layer rescales what goes out of it, or what goes into it.

    Args:
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        feedforward_modules: those of the targets whose input is rescaled instead of the output. A string is a regular
            expression for whole names. Of a collection, an entry means every target whose name ends with that text,
            also in the middle of a word; that is how existing adapters read it. `[]` for none.
        fan_in_fan_out: whether the base layers store their weights (in, out); corrected by layer.
        modules_to_save: modules of which the adapter trains and saves a copy.
        init_ia3_weights: start at ones, so that nothing changes at first; False for random numbers, as for tests.

    Raises:
        ValueError: an entry of `feedforward_modules` is not among `target_modules`.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        targets, feedforward = self.target_modules, self.feedforward_modules
        if isinstance(targets, set) and isinstance(feedforward, set) and not feedforward <= targets:
            raise ValueError(
                f"feedforward_modules says which of the target_modules rescale their input, but "
                f"{sorted(feedforward - targets)} are not among {sorted(targets)}."
            )


__all__ = ["IA3Config", "PeftConfig", "PeftType"]
