"""Hadamard products of two low-rank tensors, as pure functions of their factors.

A low-rank tensor is P·Q here, P (out, r) and Q (r, in, *window). The Hadamard product of two of them is a low-rank
tensor again, of rank r², which is how it can be applied without being formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def low_rank(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """P·Q.

    Args:
        p: (out, r).
        q: (r, in, *window).

    Returns:
        (out, in, *window).
    """
    return torch.tensordot(p, q, 1)


def window_factors(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P and Q of the product of a core with a matrix on either side, as of a convolution: Σᵢⱼ t[i,j]·a[i]·b[j].

    Args:
        t: (r, r, *window).
        a: (r, out).
        b: (r, in).

    Returns:
        (out, r) and (r, in, *window).
    """
    return a.T, torch.einsum("ij...,jc->ic...", t, b)


def hadamard_factors(
    p1: torch.Tensor, q1: torch.Tensor, p2: torch.Tensor, q2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """P and Q of (P₁·Q₁) ⊙ (P₂·Q₂): row by row and column by column, the outer products of what was there.

    Args:
        p1: (out, r).
        q1: (r, in, *window).
        p2: (out, r).
        q2: (r, in, *window).

    Returns:
        (out, r²) and (r², in, *window).
    """
    return (p1.unsqueeze(2) * p2.unsqueeze(1)).flatten(1), (q1.unsqueeze(1) * q2.unsqueeze(0)).flatten(0, 1)


def hadamard(w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor) -> torch.Tensor:
    """(w1a·w1b) ⊙ (w2a·w2b).

    Args:
        w1a: (out, r), and so is `w2a`.
        w1b: (r, in), and so is `w2b`.

    Returns:
        (out, in).
    """
    return low_rank(w1a, w1b) * low_rank(w2a, w2b)


def hadamard_cp(
    t1: torch.Tensor, w1a: torch.Tensor, w1b: torch.Tensor, t2: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor
) -> torch.Tensor:
    """The Hadamard product of two tensors that are given by a core and a matrix on either side of it.

    Args:
        t1: (r, r, *window), and so is `t2`.
        w1a: (r, out), and so is `w2a`.
        w1b: (r, in), and so is `w2b`.

    Returns:
        (out, in, *window).
    """
    return low_rank(*window_factors(t1, w1a, w1b)) * low_rank(*window_factors(t2, w2a, w2b))


def _gradients(
    product: Callable[..., torch.Tensor], factors: tuple[torch.Tensor, ...], scaled: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of the factors from the product's, which is computed once more for it."""
    leaves = [factor.detach().requires_grad_() for factor in factors]
    with torch.enable_grad():
        result = product(*leaves)
    return torch.autograd.grad(result, leaves, scaled.to(result.dtype))


class HadaWeight(torch.autograd.Function):
    """`hadamard` times a scale, remembering the factors only: neither product is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx,
        w1a: torch.Tensor,
        w1b: torch.Tensor,
        w2a: torch.Tensor,
        w2b: torch.Tensor,
        scale: torch.Tensor | float = torch.tensor(1),  # noqa: B008  (never written to)
    ) -> torch.Tensor:
        """As `hadamard`; the scale gets no gradient."""
        ctx.save_for_backward(w1a, w1b, w2a, w2b)
        ctx.scale = scale
        return hadamard(w1a, w1b, w2a, w2b) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the four factors."""
        return *_gradients(hadamard, ctx.saved_tensors, grad_out * ctx.scale), None


class HadaWeightCP(torch.autograd.Function):
    """`hadamard_cp` times a scale, remembering the factors only."""

    @staticmethod
    def forward(
        ctx,
        t1: torch.Tensor,
        w1a: torch.Tensor,
        w1b: torch.Tensor,
        t2: torch.Tensor,
        w2a: torch.Tensor,
        w2b: torch.Tensor,
        scale: torch.Tensor | float = torch.tensor(1),  # noqa: B008  (never written to)
    ) -> torch.Tensor:
        """As `hadamard_cp`; the scale gets no gradient."""
        ctx.save_for_backward(t1, w1a, w1b, t2, w2a, w2b)
        ctx.scale = scale
        return hadamard_cp(t1, w1a, w1b, t2, w2a, w2b) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the two cores and the four matrices."""
        return *_gradients(hadamard_cp, ctx.saved_tensors, grad_out * ctx.scale), None


class HadamardProduct(torch.autograd.Function):
    """scale·(P₁·Q₁) ⊙ (P₂·Q₂) of matrices, which keeps neither product; its backward can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        p1: torch.Tensor, q1: torch.Tensor, p2: torch.Tensor, q2: torch.Tensor, scale: torch.Tensor | float
    ) -> torch.Tensor:
        """As `hadamard`; the scale gets no gradient."""
        return (p1 @ q1).mul_(p2 @ q2).mul_(scale)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        """Remember the factors."""
        *factors, ctx.scale = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the four factors."""
        p1, q1, p2, q2 = ctx.saved_tensors
        scaled = grad_out * ctx.scale
        first, second = scaled * (p2 @ q2), scaled * (p1 @ q1)
        return first @ q1.T, p1.T @ first, second @ q2.T, p2.T @ second, None


def make_weight(
    w1a: torch.Tensor, w1b: torch.Tensor, w2a: torch.Tensor, w2b: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """scale·(w1a·w1b) ⊙ (w2a·w2b), for training that forms it: the backward pass keeps no product in memory.

    Args:
        w1a: (out, r), and so is `w2a`.
        w1b: (r, in), and so is `w2b`.
        scale: a number; it gets no gradient.

    Returns:
        (out, in).
    """
    return HadaWeight.apply(w1a, w1b, w2a, w2b, scale)


def make_weight_cp(
    t1: torch.Tensor,
    w1a: torch.Tensor,
    w1b: torch.Tensor,
    t2: torch.Tensor,
    w2a: torch.Tensor,
    w2b: torch.Tensor,
    scale: torch.Tensor | float,
) -> torch.Tensor:
    """As `make_weight`, of tensors with a core over the window of a convolution; shapes as in `hadamard_cp`.

    Returns:
        (out, in, *window).
    """
    return HadaWeightCP.apply(t1, w1a, w1b, t2, w2a, w2b, scale)
