"""Configuration of multitask prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from ...utils.peft_types import PeftType
from ..prompt_tuning.config import PromptTuningConfig, PromptTuningInit


class MultitaskPromptTuningInit(str, enum.Enum):
    """Where the prompt starts: at a text, at noise, or at what was learned from source tasks."""

    RANDOM = "RANDOM"
    TEXT = "TEXT"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"
    """The prompt that the source tasks share."""
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    """That, and the factors of one of them."""
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    """That, and the mean of their factors."""


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (arXiv 2303.02861): a prompt that tasks share, times a matrix of low rank for each task.

    It is learned on several source tasks, and then a target task starts from it: train with `num_tasks` source tasks,
    save, and name the weights in the configuration for the target. Every call says by `task_ids` which task each row
    of the batch is of.

    Args:
        prompt_tuning_init: "RANDOM", "TEXT" or "SAMPLE_VOCAB" as for prompt tuning; or from source tasks:
            "AVERAGE_SOURCE_TASKS" (the shared prompt, and the mean of their matrices' factors), "EXACT_SOURCE_TASK"
            (with the factors of one of them) or "ONLY_SOURCE_SHARED" (the shared prompt alone). All target tasks start
            alike.
        prompt_tuning_init_state_dict_path: the weights of the source tasks, a `.safetensors` file or one of
            `torch.save`.
        prompt_tuning_init_task: which of the source tasks "EXACT_SOURCE_TASK" starts from.
        num_ranks: the rank of each task's matrix.
        num_tasks: how many tasks there are.

    Raises:
        ValueError: an unknown start, or a number of ranks or tasks below 1.
    """

    starts: ClassVar = (*MultitaskPromptTuningInit, PromptTuningInit.SAMPLE_VOCAB)

    prompt_tuning_init: MultitaskPromptTuningInit | str = field(
        default=MultitaskPromptTuningInit.RANDOM, metadata={"help": "Where the prompt starts"}
    )
    prompt_tuning_init_state_dict_path: str | None = field(
        default=None, metadata={"help": "The weights of the source tasks"}
    )
    prompt_tuning_init_task: int | None = field(default=0, metadata={"help": "The source task to start from"})
    num_ranks: int | None = field(default=1, metadata={"help": "The rank of each task's matrix"})
    num_tasks: int | None = field(default=1, metadata={"help": "How many tasks there are"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING
        for name in ("num_ranks", "num_tasks"):
            if not getattr(self, name) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}.")
