"""Orthogonal start: A and B are both not zero, but their product is, since they use halves of one orthonormal basis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base_weight import Factors, place_factors
from .initialisers import initialiser

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


@initialiser("orthogonal")
@torch.no_grad()
def orthogonal(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """Start with B·A = 0, up to rounding.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        value: "orthogonal".
        config: of no effect.

    Raises:
        ValueError: the rank is odd, or the layer is a grouped convolution.
    """
    rank = layer.r[adapter]
    about = f"{layer.called}: init_lora_weights={value!r} of the adapter {adapter!r}"
    if rank % 2:
        raise ValueError(f"{about} splits the rank in halves, so it must be even, got r={rank}; use {rank + 1}.")
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise ValueError(f"{about} is not for grouped convolutions, in which B mixes only channels of its group.")
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    fan_in, fan_out = A[0].numel(), len(B)
    experts = len(A) // rank
    pairs = [disjoint_factors(fan_in, fan_out, rank) for _ in range(experts)]
    if experts == 1:
        place_factors(layer, adapter, *pairs[0])
    else:
        place_factors(layer, adapter, *map(torch.stack, zip(*pairs)))


def disjoint_factors(fan_in: int, fan_out: int, rank: int) -> Factors:
    """Random A whose columns lie in one half of a random orthonormal basis, and random B whose rows lie in the other.

    Args:
        fan_in: columns of A.
        fan_out: rows of B.
        rank: r, even.

    Returns:
        (r, in) and (out, r).
    """
    basis, _ = torch.linalg.qr(torch.randn(rank, rank))
    A = torch.randn(fan_in, rank // 2) @ basis[0::2]
    B = torch.randn(rank // 2, fan_out).T @ basis[1::2]
    return A.T / 10, B / 10
