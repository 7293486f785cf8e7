"""The mathematics of HRA: products of Householder reflections in compact form, H = I - U·S·Uᵀ.

U is (d, r) with the unit directions as columns and S is (r, r). H is applied in this form, in O(d·r) per vector, and
formed only for whoever asks for it.
"""

from __future__ import annotations

import torch


def product_of_reflections(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U and S of (I - 2ũ₀ũ₀ᵀ)(I - 2ũ₁ũ₁ᵀ)⋯, where ũ are the columns of `u`, normalised.

    S is the inverse of the upper triangle of UᵀU with its diagonal halved (Joffrain et al. 2006, the UT transform).

    Args:
        u: (d, r), float32 or float64.
    """
    U = u / u.norm(dim=0)
    identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    return U, torch.linalg.solve_triangular(torch.triu(U.mT @ U, 1) + identity / 2, identity, upper=True)


def orthogonal_reflection(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U and S of I - 2QQᵀ, where Q are the columns of `u` made orthonormal one after the other.

    A column that depends on those before it has no direction of its own. Its entry in Q is zero, so that it reflects
    nothing, instead of the noise that is left of it or a division by zero.

    Args:
        u: (d, r), float32 or float64.
    """
    negligible = 4 * torch.finfo(u.dtype).eps * len(u) ** 0.5 * u.norm(dim=0)
    rest, columns = u, []
    for i in range(u.shape[1]):
        column, later = rest[:, 0], rest[:, 1:]
        norm = column.norm()
        # `where` on both sides of the division keeps its gradient finite.
        kept = norm > negligible[i]
        q = torch.where(kept, column / torch.where(kept, norm, 1), 0)
        columns.append(q)
        rest = later - torch.outer(q, q @ later)
    Q = torch.stack(columns, dim=1)
    return Q, 2 * torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)


def reflect(vectors: torch.Tensor, U: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """v·H for rows v.

    Args:
        vectors: (..., d).
        U: (d, r).
        S: (r, r); transposed for v·Hᵀ, which is H·v for columns.
    """
    return vectors - ((vectors @ U) @ S) @ U.mT
