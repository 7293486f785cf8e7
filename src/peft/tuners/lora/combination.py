"""The mathematics of combining LoRA adapters into one: pure functions of factors and updates.

Several adapters with weights w_i, scalings s_i and updates ΔW_i = s_i·B_i·A_i become one adapter B·A with scaling 1:

    cat                    the factors side by side, which is Σ w_i·ΔW_i exactly, of rank Σ r_i
    linear, ties, ...      an operator on the A_i and the same on the B_i, which approximates the sum, of rank r
    svd, ties_svd, ...     the operator on the ΔW_i, and what comes out decomposed to any rank

Factors here have the rank in dimension 1: A is (groups, r / groups, in...), B is (out, r / groups, ...). A layer without
groups has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties


@dataclass(frozen=True)
class Operator:
    """A function (tensors, weights, options...) of `peft.utils.merge_utils`.

    Args:
        function: the function.
        options: the options that it takes.
    """

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float], **options: Any) -> Tensor:
        """One tensor out of several of one shape; of the options those are used that the function takes."""
        weight = torch.tensor(tuple(weights), dtype=tensors[0].dtype, device=tensors[0].device)
        return self.function(list(tensors), weight, **{name: options[name] for name in self.options})


OPERATORS = {
    "linear": Operator(task_arithmetic),
    "ties": Operator(ties, ("density", "majority_sign_method")),
    "dare_linear": Operator(dare_linear, ("density",)),
    "dare_ties": Operator(dare_ties, ("density", "majority_sign_method")),
    "magnitude_prune": Operator(magnitude_prune, ("density",)),
}
"""The combination types that act on the factors."""

UPDATE_OPERATORS = {"svd" if name == "linear" else f"{name}_svd": operator for name, operator in OPERATORS.items()}
"""The combination types that act on the updates."""

COMBINATION_TYPES = ("cat", *OPERATORS, *UPDATE_OPERATORS)


def concatenated(A: Sequence[Tensor], B: Sequence[Tensor], coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The factors of Σ c_i·B_i·A_i: all A_i below one another, all B_i beside one another.

    Args:
        A: (groups, r_i / groups, ...) each.
        B: (out, r_i / groups, ...) each.
        coefficients: c_i.
    """
    return torch.cat([c * a for c, a in zip(coefficients, A)], dim=1), torch.cat(tuple(B), dim=1)


def combined_factors(
    operator: Operator, A: Sequence[Tensor], B: Sequence[Tensor], coefficients: Sequence[float], **options: Any
) -> tuple[Tensor, Tensor]:
    """The operator on either factor, each of which takes a root of the coefficients c_i; A takes their signs.

    Args:
        operator: one of `OPERATORS`.
        A: of one shape.
        B: of one shape.
        coefficients: c_i.
        options: the operator's.
    """
    roots = [abs(c) ** 0.5 for c in coefficients]
    signed = [-root if c < 0 else root for root, c in zip(roots, coefficients)]
    return operator(A, signed, **options), operator(B, roots, **options)


def decomposed(
    update: Tensor, rank: int, full_matrices: bool = False, driver: str | None = None
) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of an update by a rank, the singular values in B.

    Args:
        update: (..., out, in).
        rank: at most the smaller of these.
        full_matrices: as in `torch.linalg.svd`; it does not change the factors.
        driver: as in `torch.linalg.svd`.

    Returns:
        A (..., rank, in) and B (..., out, rank).
    """
    U, S, Vh = torch.linalg.svd(update, full_matrices=full_matrices, driver=driver)
    return Vh[..., :rank, :], U[..., :rank] * S[..., None, :rank]


def decomposed_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What `decomposed(B @ A, rank)` gives, without forming B·A: its singular values are those of a matrix (r, r).

    Args:
        B: (..., out, r).
        A: (..., r, in).
        rank: at most r, out and in.
    """
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.mT)
    inner_A, inner_B = decomposed(R_out @ R_in.mT, rank)
    return inner_A @ Q_in.mT, Q_out @ inner_B


def clamped(A: Tensor, B: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Both factors limited to ±q, where q is the quantile of all their entries that a share of them stays below.

    Args:
        A: any shape.
        B: any shape.
        share: in (0, 1].
    """
    limit = quantile(torch.cat([B.flatten(), A.flatten()]), share)
    return A.clamp(-limit, limit), B.clamp(-limit, limit)


def quantile(values: Tensor, share: float) -> Tensor:
    """The linearly interpolated quantile, as `torch.quantile` has it, of any number of values."""
    ordered = values.sort().values
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
