"""How the tasks of a batch choose among the skills of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

from ...utils.tensors import empty

if TYPE_CHECKING:
    from .config import PolyConfig

EPS = 1e-12


class Router(nn.Module, ABC):
    """Gives each row of a batch weights for the skills."""

    @abstractmethod
    def reset(self) -> None:
        """Start over."""

    @abstractmethod
    def forward(self, task_ids: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The weights.

        Args:
            task_ids: (batch,), long.
            input_ids: the layer's input.

        Returns:
            (batch, splits, skills).
        """


class PolyRouter(Router):
    """Each task has, for every split, a weight for each skill: a Bernoulli variable, relaxed to be trained.

    Args:
        poly_config: numbers of tasks, splits and skills.
    """

    def __init__(self, poly_config: PolyConfig) -> None:
        super().__init__()
        self.n_tasks, self.n_skills, self.n_splits = poly_config.n_tasks, poly_config.n_skills, poly_config.n_splits
        self.module_logits = nn.Parameter(empty(self.n_tasks, self.n_splits * self.n_skills, owner="Poly's router"))

    def reset(self) -> None:
        """Start with all skills weighted nearly the same."""
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)

    def forward(self, task_ids: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The weights of each row's task; drawn at random in training.

        Args:
            task_ids: (batch,), long.
            input_ids: of no effect.

        Returns:
            (batch, splits, skills), summing to 1 over the skills.

        Raises:
            ValueError: a task that there is not, or no tasks given.
        """
        check_task_ids(task_ids, self.n_tasks)
        return self.weights(task_ids)

    def weights(self, task_ids: torch.Tensor) -> torch.Tensor:
        """`forward` for ids that have been checked."""
        logits = self.module_logits[task_ids.to(self.module_logits.device)]
        logits = logits.view(len(task_ids), self.n_splits, self.n_skills)
        chosen = RelaxedBernoulli(temperature=1.0, logits=logits).rsample() if self.training else logits.sigmoid()
        return chosen / (chosen.sum(dim=-1, keepdim=True) + EPS)


ROUTERS: dict[str, type[Router]] = {"poly": PolyRouter}


def get_router(poly_config: PolyConfig) -> Router:
    """The router that a configuration asks for.

    Args:
        poly_config: its `poly_type` says which.

    Raises:
        ValueError: there is none of that name.
    """
    if poly_config.poly_type not in ROUTERS:
        raise ValueError(
            f"There is no poly_type {poly_config.poly_type!r}; supported is {', '.join(map(repr, ROUTERS))}."
        )
    return ROUTERS[poly_config.poly_type](poly_config)


def check_task_ids(task_ids: torch.Tensor | None, n_tasks: int, where: str = "Poly") -> None:
    """Raise unless each row of a batch is of one of the tasks.

    Args:
        task_ids: (batch,).
        n_tasks: how many tasks there are.
        where: what to name in the error.

    Raises:
        ValueError: a row is of none, or no tasks are given.
    """
    if task_ids is None:
        raise ValueError(
            f"{where} needs task_ids, the task of each row of the batch: pass task_ids=torch.tensor([...]), with numbers "
            f"below n_tasks={n_tasks}, to the model's forward or generate."
        )
    if torch.compiler.is_compiling() or not task_ids.numel():  # compiled code asks no values of tensors
        return
    lowest, highest = task_ids.aminmax()
    if lowest < 0 or highest >= n_tasks:
        raise ValueError(
            f"{where} has n_tasks={n_tasks}, so task_ids are from 0 to {n_tasks - 1}; got {task_ids.tolist()}."
        )


__all__ = ["EPS", "PolyRouter", "Router", "get_router"]
