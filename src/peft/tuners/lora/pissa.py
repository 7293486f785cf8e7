"""PiSSA (arXiv 2404.02948): A and B are the principal singular vectors of the base weight, which keeps the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...utils.naming import brief
from .base_weight import Factors, start_by_decomposition
from .initialisers import initialiser

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


MOST_ITERATIONS = 1000


@initialiser("pissa", changes_base=True)
@initialiser("pissa_niter_N", changes_base=True)
def pissa(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """Split the base weight into its principal part, which trains, and the rest.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        value: "pissa", or "pissa_niter_N" for a randomised decomposition by N subspace iterations.
        config: of no effect.

    Raises:
        TypeError: the base weight has a dtype that cannot be decomposed.
        ValueError: this base weight cannot be changed, or N is too large.
    """
    number = value.rpartition("_")[2]
    niter = int(number[:9]) if number.isdecimal() else None
    if niter is not None and niter > MOST_ITERATIONS:
        raise ValueError(
            f"{layer.called}: init_lora_weights={brief(value)} of the adapter {adapter!r} asks for more than "
            f"{MOST_ITERATIONS} iterations; a few are enough."
        )
    rank, scaling = layer.r[adapter], layer.scaling[adapter]
    start_by_decomposition(layer, adapter, value, lambda W: principal_factors(W, rank, scaling, niter))


def principal_factors(W: torch.Tensor, rank: int, scaling: float, niter: int | None = None) -> Factors:
    """A = √S·Vᵀ and B = U·√S, such that s·B·A is the best approximation of W of that rank.

    Args:
        W: (..., out, in).
        rank: r.
        scaling: s.
        niter: iterations of the randomised decomposition; None for the full one.

    Returns:
        (..., r, in) and (..., out, r); r is lower if the smaller side of W is.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=rank, niter=niter)
        Vh = V.mT
    root = (S[..., :rank] / scaling).sqrt()
    return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)
