"""OLoRA (arXiv 2406.01775): A and B are the first rows and columns of the QR decomposition of the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base_weight import Factors, start_by_decomposition
from .initialisers import initialiser

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


@initialiser("olora", changes_base=True)
def olora(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """Start with an orthonormal basis; the base weight keeps W - s·B·A. A quantised one is quantised again.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        value: "olora".
        config: of no effect.

    Raises:
        TypeError: the base weight has a dtype that cannot be decomposed.
        ValueError: this base weight cannot be changed.
    """
    rank = layer.r[adapter]
    start_by_decomposition(layer, adapter, value, lambda W: orthonormal_factors(W, rank), quantised=True)


def orthonormal_factors(W: torch.Tensor, rank: int) -> Factors:
    """A = the first rows of R and B = the first columns of Q, where W = Q·R.

    Args:
        W: (..., out, in).
        rank: r.

    Returns:
        (..., r, in) and (..., out, r); r is lower if the smaller side of W is.
    """
    Q, R = torch.linalg.qr(W)
    return R[..., :rank, :], Q[..., :rank]
