"""Merging task tensors: arithmetic, pruning, and the election of signs.

A task tensor is what fine-tuning added to one weight (or one factor of it); all tensors of a merge have one shape, and
`weights` holds one number per task.

Sources: task arithmetic, https://arxiv.org/abs/2212.04089; TIES, https://arxiv.org/abs/2306.01708;
DARE, https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .naming import did_you_mean
from .warning import PeftWarning

SignMethod = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Give the weights as many dimensions as the tensors, so that they broadcast from the left.

    Args:
        task_tensors: (tasks, ...).
        weights: (tasks,).

    Returns:
        (tasks, 1, ..., 1).
    """
    return weights.reshape(weights.shape + (1,) * (task_tensors.ndim - weights.ndim))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Keep the int(density * numel) entries of largest magnitude, zero the others.

    Args:
        tensor: any shape.
        density: the share to keep, in [0, 1].
    """
    kept = int(density * tensor.numel())
    flat = tensor.reshape(-1)
    largest = flat.abs().topk(kept, sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view_as(tensor)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Keep each entry with probability `density`.

    Args:
        tensor: any shape.
        density: the probability of keeping an entry, in [0, 1].
        rescale: divide what is kept by the density, which keeps the expectation.
    """
    pruned = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return pruned / density if rescale and density > 0 else pruned


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """Zero all but a share of a tensor's entries.

    Args:
        tensor: any shape.
        density: the share to keep. 1 or more keeps everything, with a warning.
        method: `"magnitude"` keeps the largest entries, `"random"` a random choice.
        rescale: for `"random"`, divide what is kept by the density.

    Raises:
        ValueError: the density is negative or not a number, or there is no such method.
    """
    if density >= 1:
        warnings.warn(f"Nothing is pruned: the density is {density}, all entries are kept.", PeftWarning, stacklevel=2)
        return tensor
    if not density >= 0:
        raise ValueError(f"The density is the share of entries to keep and lies in [0, 1], got {density}.")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    methods = ("magnitude", "random")
    raise ValueError(f"Pruning is by one of {methods}, not by {method!r}.{did_you_mean(str(method), methods)}")


def calculate_majority_sign_mask(tensor: Tensor, method: SignMethod = "total") -> Tensor:
    """Where each task agrees with the sign that the tasks elect together.

    Args:
        tensor: (tasks, ...).
        method: `"total"` elects the sign of the sum, `"frequency"` the sign that more tasks have. A tie is positive.

    Returns:
        Boolean, (tasks, ...). An entry that is zero agrees with nobody.

    Raises:
        RuntimeError: there is no such method.
    """
    sign = tensor.sign()
    if method == "total":
        votes = tensor.sum(dim=0)
    elif method == "frequency":
        votes = sign.sum(dim=0)
    else:
        methods = ("total", "frequency")
        hint = did_you_mean(str(method), methods)
        raise RuntimeError(f"A sign is elected by one of {methods}, not by {method!r}.{hint}")
    elected = torch.where(votes >= 0, 1, -1)
    return sign == elected


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Average, entry by entry, the tasks that the mask admits; 0 where it admits none.

    Args:
        task_tensors: (tasks, ...).
        majority_sign_mask: boolean, (tasks, ...).

    Returns:
        (...)
    """
    admitted = (task_tensors * majority_sign_mask).sum(dim=0)
    return admitted / majority_sign_mask.sum(dim=0).clamp(min=1)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of the tasks.

    Args:
        task_tensors: one tensor per task, all of one shape.
        weights: (tasks,).
    """
    return _weighted(_stacked(task_tensors, weights), weights).sum(dim=0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of the largest entries of each task.

    Args:
        task_tensors: one tensor per task, all of one shape.
        weights: (tasks,).
        density: the share of entries that each task keeps.
    """
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """TIES: trim each task, elect a sign per entry, average what agrees with it.

    Args:
        task_tensors: one tensor per task, all of one shape.
        weights: (tasks,). They scale what is averaged and have no say in the election.
        density: the share of entries that each task keeps.
        majority_sign_method: as in `calculate_majority_sign_mask`.
    """
    trimmed = [prune(tensor, density, "magnitude") for tensor in task_tensors]
    return _elect_and_merge(trimmed, weights, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE: drop entries at random and rescale the rest, then the weighted sum.

    Args:
        task_tensors: one tensor per task, all of one shape.
        weights: (tasks,).
        density: the probability with which an entry is kept.
    """
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """DARE's random drop in the place of TIES' trimming.

    Args:
        task_tensors: one tensor per task, all of one shape.
        weights: (tasks,).
        density: the probability with which an entry is kept.
        majority_sign_method: as in `calculate_majority_sign_mask`.
    """
    dropped = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _elect_and_merge(dropped, weights, majority_sign_method)


def _elect_and_merge(task_tensors: list[Tensor], weights: Tensor, majority_sign_method: SignMethod) -> Tensor:
    stacked = _stacked(task_tensors, weights)
    mask = calculate_majority_sign_mask(stacked, majority_sign_method)
    return disjoint_merge(_weighted(stacked, weights), mask)


def _weighted(stacked: Tensor, weights: Tensor) -> Tensor:
    return stacked * reshape_weight_task_tensors(stacked, weights)


def _stacked(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in task_tensors}
    if len(shapes) != 1:
        raise ValueError(f"Task tensors of one shape are merged, got {len(task_tensors)} of shapes {sorted(shapes)}.")
    if tuple(weights.shape) != (len(task_tensors),):
        raise ValueError(
            f"One weight per task is needed, that is shape ({len(task_tensors)},), got {tuple(weights.shape)}."
        )
    return torch.stack(tuple(task_tensors))
