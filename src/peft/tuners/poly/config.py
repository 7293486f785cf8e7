"""The configuration of Poly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...config import PeftConfig
from ...utils.peft_types import PeftType


@dataclass
class PolyConfig(PeftConfig):
    """Polytropon (arXiv 2202.13914), and multi-head routing with several splits (arXiv 2211.03831).

    A layer has an inventory of low-rank skills. Each task mixes them by weights of its own, which are learned with them;
    a call says by `task_ids` which task each row of the batch is of.

    Args:
        r: rank of a skill.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        modules_to_save: modules of which the adapter trains and saves a copy.
        init_weights: true to start as the base model; false to start all skills at random.
        poly_type: how tasks choose skills; "poly" is the only way.
        n_tasks: number of tasks.
        n_skills: skills of a layer.
        n_splits: parts that the features are divided into, each with a mixture of its own.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.POLY
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


__all__ = ["PeftConfig", "PeftType", "PolyConfig"]
