"""The encoder of multitask prompt tuning, and its start from the weights of source tasks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.checkpoint import torch_load
from ...engine.state import check_finite
from ...utils.error import SourceTasksError, TaskIdsError
from ...utils.naming import near_misses
from ..prompt_tuning.model import PromptEmbedding
from .config import MultitaskPromptTuningInit

if TYPE_CHECKING:
    from .config import MultitaskPromptTuningConfig

FACTORS = ("prefix_task_cols", "prefix_task_rows")


class MultitaskPromptEmbedding(PromptEmbedding):
    """A prompt P that tasks share, times a matrix of low rank for each: P ∘ (U_t V_t) for task t (arXiv 2303.02861).

    Args:
        config: the completed configuration.
        word_embeddings: the base model's, where P may start.

    Raises:
        ValueError: the weights of source tasks to start from are not given, or do not fit.
    """

    takes_task_ids = True
    prompts_decoder = True

    def __init__(self, config: MultitaskPromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__(config, word_embeddings)
        tokens, width = self.embedding.weight.shape
        tasks, rank = config.num_tasks, config.num_ranks
        self.prefix_task_cols = nn.Parameter(torch.normal(0.0, 0.02, (tasks, tokens, rank)))
        self.prefix_task_rows = nn.Parameter(torch.normal(0.0, 0.02, (tasks, rank, width)))
        if not config.inference_mode and config.prompt_tuning_init in _SOURCE_FACTORS:
            self._start_from(*source_of(config, tokens, width))

    @torch.no_grad()
    def _start_from(self, shared: torch.Tensor, factors: tuple[torch.Tensor, ...] | None) -> None:
        self.embedding.weight.copy_(shared)
        for name, value in zip(FACTORS, factors or ()):
            getattr(self, name).copy_(value)  # one for all tasks

    def prompt(self, indices: torch.Tensor, batch_size: int, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self(indices.expand(batch_size, -1), task_ids)

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of virtual tokens.

        Args:
            indices: (batch, tokens), long.
            task_ids: the task of each row, (batch,), long; or one for all, (1,).

        Returns:
            (batch, tokens, width).

        Raises:
            ValueError: no task is given, or none for each row, or a row is of none of the tasks.
        """
        task_ids = self._checked(task_ids, len(indices))
        cols, rows = self.prefix_task_cols[task_ids], self.prefix_task_rows[task_ids]
        return self.embedding(indices) * (cols @ rows)

    def _checked(self, task_ids: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        tasks = len(self.prefix_task_cols)
        if task_ids is None:
            raise TaskIdsError(
                "Multitask prompt tuning needs task_ids, the task of each row of the batch: pass task_ids="
                f"torch.tensor([...]), with numbers below num_tasks={tasks}, to the model's forward or generate."
            )
        task_ids = torch.as_tensor(task_ids, device=self.prefix_task_cols.device)
        if task_ids.shape not in ((batch_size,), (1,)):
            raise TaskIdsError(
                f"task_ids must name one task for each of {batch_size} rows, got the shape {tuple(task_ids.shape)}."
            )
        if torch.compiler.is_compiling():  # compiled code asks no values of tensors
            return task_ids
        lowest, highest = task_ids.aminmax()
        if lowest < 0 or highest >= tasks:
            raise TaskIdsError(f"With num_tasks={tasks}, task_ids are from 0 to {tasks - 1}; got {task_ids.tolist()}.")
        return task_ids

    # ----------------------------------------------------------------------------------------------------------- files

    def prompt_to_save(self, indices: torch.Tensor) -> torch.Tensor:
        return self.embedding(indices)

    def tensors_to_save(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**super().tensors_to_save(indices), **{name: getattr(self, name).detach() for name in FACTORS}}

    @classmethod
    def promised_shapes(cls, config: MultitaskPromptTuningConfig) -> dict[str, tuple[int, ...]]:
        shapes = super().promised_shapes(config)
        (tokens, width), tasks, rank = shapes["prompt_embeddings"], config.num_tasks, config.num_ranks
        return {**shapes, **dict(zip(FACTORS, ((tasks, tokens, rank), (tasks, rank, width))))}

    def saved_shapes(self) -> dict[str, torch.Size]:
        return {**super().saved_shapes(), **{name: getattr(self, name).shape for name in FACTORS}}

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        super()._load_adapter_state_dict(state_dict)
        for name in FACTORS:
            if name in state_dict:
                getattr(self, name).copy_(state_dict[name])


def _mean(factor: torch.Tensor, config: MultitaskPromptTuningConfig) -> torch.Tensor:
    return factor.mean(dim=0, keepdim=True)


def _of_task(factor: torch.Tensor, config: MultitaskPromptTuningConfig) -> torch.Tensor:
    task = config.prompt_tuning_init_task
    if task is None or not 0 <= task < len(factor):
        raise SourceTasksError(
            f"prompt_tuning_init_task={task!r} is none of the {len(factor)} tasks of "
            f"{config.prompt_tuning_init_state_dict_path!r}: they are 0 to {len(factor) - 1}."
        )
    return factor[task : task + 1]


_SOURCE_FACTORS: dict[str, Callable[[torch.Tensor, MultitaskPromptTuningConfig], torch.Tensor] | None] = {
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS: _mean,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK: _of_task,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED: None,
}
"""What a start takes of the factors of source tasks."""


def source_of(
    config: MultitaskPromptTuningConfig, tokens: int, width: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """Where a prompt starts that starts from source tasks; the file is checked whole before anything of it is used.

    Args:
        config: the configuration.
        tokens: number of virtual tokens.
        width: their width.

    Returns:
        The shared prompt (tokens, width), and the factors (1, tokens, rank) and (1, rank, width), or None if they
        start at random.

    Raises:
        ValueError: no file is named, it cannot be read, lacks a tensor, or one has another shape or is not finite.
    """
    path = config.prompt_tuning_init_state_dict_path
    if path is None:
        start = getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init)
        raise ValueError(
            f"prompt_tuning_init={start!r} needs prompt_tuning_init_state_dict_path, the file with the weights of the "
            "source tasks."
        )
    choose = _SOURCE_FACTORS[config.prompt_tuning_init]
    state, rank = read_tensors(path), config.num_ranks
    shapes = {"prompt_embeddings": (tokens, width)}
    if choose is not None:
        shapes.update(prefix_task_cols=("tasks", tokens, rank), prefix_task_rows=("tasks", rank, width))
    found = {name: _entry(state, name, shape, path) for name, shape in shapes.items()}
    check_finite(found)
    if choose is None:
        return found["prompt_embeddings"], None
    cols, rows = (found[name] for name in FACTORS)
    if len(cols) != len(rows):
        raise SourceTasksError(
            f"{path!r} has {len(cols)} tasks in prefix_task_cols and {len(rows)} in prefix_task_rows."
        )
    return found["prompt_embeddings"], (choose(cols, config), choose(rows, config))


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, on the CPU; nothing else is unpickled.

    Args:
        path: a file of safetensors if it ends so, otherwise one of `torch.save`.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch_load(path, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # both formats have many ways to be broken
        raise SourceTasksError(f"{os.fspath(path)!r} cannot be read as weights of source tasks: {error}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise SourceTasksError(f"{os.fspath(path)!r} is no dictionary of tensors.")
    return state


def _entry(state: dict[str, torch.Tensor], name: str, shape: tuple[int | str, ...], path: str) -> torch.Tensor:
    """A tensor of a file, with its shape checked; a word in the shape stands for any number but 0."""
    if name not in state:
        near = near_misses(name, state)
        raise SourceTasksError(
            f"{path!r} lacks {name!r}{f' (nearest: {near[0]!r})' if near else ''}. The weights of a multitask prompt "
            "are expected."
        )
    value = state[name]
    fits = value.dim() == len(shape) and all(
        size == wanted or (isinstance(wanted, str) and size) for size, wanted in zip(value.shape, shape)
    )
    if not fits or not value.is_floating_point():
        expected = ", ".join(map(str, shape))
        raise SourceTasksError(
            f"{name} in {path!r}: expected floating point numbers of the shape ({expected}), found {value.dtype} "
            f"{tuple(value.shape)}. Set num_virtual_tokens and num_ranks as for the source tasks, with the same base "
            "model."
        )
    return value
