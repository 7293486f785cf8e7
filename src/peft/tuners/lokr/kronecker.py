"""Kronecker products, as pure functions: how sizes are split, and how a product is formed."""

from __future__ import annotations

import math

import torch


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split a size in two.

    A positive `factor` that divides the size is the first part, also where it is the larger one. Otherwise the first
    part is the largest divisor that is neither above the square root nor, if positive, above `factor`.

    Args:
        dimension: the size.
        factor: the first part that is wanted; -1 for as even a split as there is.

    Returns:
        (m, n) with m·n = dimension.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    bound = math.isqrt(dimension)
    if factor != -1:
        bound = max(1, min(bound, factor))
    m = next((divisor for divisor in range(bound, 0, -1) if dimension % divisor == 0), 1)
    return m, dimension // m


def kronecker(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """w1 ⊗ w2 over the first two axes: [i·k + p, j·n + q, ...] = w1[i, j] · w2[p, q, ...].

    Args:
        w1: (l, m).
        w2: (k, n, *window).

    Returns:
        (l·k, m·n, *window).
    """
    return torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.dim() - 2)), w2)


def make_kron(w1: torch.Tensor, w2: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The product as LoKr's files mean it: `kronecker`, except for a `w2` of three axes.

    A w2 (k, n, x) gives (k, l·n, m·x) with [p, i·n + q, j·x + t] = w1[i, j] · w2[p, q, t]: the full w2 of a `Conv1d`,
    whose adapters have been trained with this arrangement, read row by row as the weight.

    Args:
        w1: (l, m).
        w2: (k, n, *window).
        scale: what the result is multiplied by.
    """
    product = torch.kron(w1, w2) if w2.dim() == 3 else kronecker(w1, w2)
    return product * scale


def make_weight_cp(t: torch.Tensor, wa: torch.Tensor, wb: torch.Tensor) -> torch.Tensor:
    """The product of a core with a matrix on either side of it: Σᵢⱼ t[i, j] · wa[i] · wb[j].

    Args:
        t: (r, r, *window).
        wa: (r, out).
        wb: (r, in).

    Returns:
        (out, in, *window).
    """
    return torch.einsum("ij...,ip,jq->pq...", t, wa, wb)
