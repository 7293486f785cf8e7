"""The mathematics of OFT: block-diagonal rotations made from skew-symmetric matrices, and the module that holds one.

T = blockdiag(R₁ … Rₙ) is never formed to be applied. All functions take vectors along the last axis; R is (n, s, s)
for n blocks of size s, or (1, s, s) if all blocks are the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def skew(w: torch.Tensor, size: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Skew-symmetric matrices from their entries above the diagonal.

    Args:
        w: (n, s(s-1)/2).
        size: s.
        rows: where each entry is, (s(s-1)/2,).
        columns: likewise.

    Returns:
        Q of shape (n, s, s) with Q = -Qᵀ.
    """
    upper = w.new_zeros(len(w), size, size)
    upper[:, rows, columns] = w
    return upper - upper.mT


def cayley(Q: torch.Tensor) -> torch.Tensor:
    """(I - Q)(I + Q)⁻¹, an exact rotation.

    Args:
        Q: (n, s, s), skew-symmetric.
    """
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(identity + Q, identity - Q, left=False)


def cayley_neumann(Q: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2(Q + … + Q^(N-2)) + Q^(N-1), an approximate rotation.

    The series belongs to (I + Q)(I - Q)⁻¹, which is the transpose of `cayley`.

    Args:
        Q: (n, s, s), skew-symmetric.
        terms: N. Trained adapters fix what it means below 4: 3 is the same as 4, 2 is I + 2Q, 1 is I.
    """
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if terms <= 1:
        return identity
    if terms == 2:
        return identity + 2 * Q
    power, total = Q, identity + 2 * Q
    for _ in range(max(terms, 4) - 3):
        power = power @ Q
        total = total + 2 * power
    return total + power @ Q


def within(w: torch.Tensor, eps: float) -> torch.Tensor:
    """The nearest entries whose skew matrices have a Frobenius norm of at most eps / √n each.

    Args:
        w: (n, s(s-1)/2).
        eps: the radius.
    """
    radius = eps / math.sqrt(len(w))
    norm = math.sqrt(2) * w.norm(dim=1, keepdim=True)
    return torch.where(norm > radius, w * (radius / norm), w)


def rotate(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """x·T, block by block.

    Args:
        x: (..., d).
        R: (n, s, s) with n·s = d, or (1, s, s) with s a divisor of d.
    """
    blocks = x.unflatten(-1, (-1, R.shape[-1]))
    turned = blocks @ R[0] if len(R) == 1 else torch.einsum("...ni,nij->...nj", blocks, R)
    return turned.reshape(x.shape)


def rotate_and_fold(x: torch.Tensor, R: torch.Tensor, kernel_size: tuple[int, int]) -> torch.Tensor:
    """An image whose patches were rotated and added up again, as versions before 0.22 did it.

    Two things about it look unintended: patches overlap, and their sum is not divided by how many there are; and the
    axis of the patches' positions stays before that of the pixels within a patch, while `fold` wants it last, which
    shuffles the values (not for 1 x 1 patches). Adapters of these versions were trained with it, so for them it stays.

    Args:
        x: (batch, C, H, W).
        R: rotations of C·k·k values.
        kernel_size: k, twice.
    """
    channels, size = x.shape[1], x.shape[2:]
    patches = rotate(F.unfold(x, kernel_size).mT, R)
    shuffled = patches.unflatten(-1, (channels, *kernel_size)).transpose(1, 2)
    return F.fold(shuffled.reshape(len(x), patches.shape[2], patches.shape[1]), size, kernel_size)


class MultiplicativeDropoutLayer(nn.Module):
    """In training, replaces rotations by the identity at random.

    Args:
        p: probability for each block.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Some of the blocks replaced.

        Args:
            x: (n, s, s).
        """
        if not self.training or self.p == 0:
            return x
        dropped = torch.rand(len(x), 1, 1, device=x.device) < self.p
        return torch.where(dropped, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), x)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class OFTRotationModule(nn.Module):
    """One rotation T with its parameters.

    Args:
        r: number of blocks with parameters of their own.
        n_elements: parameters of a block, s(s-1)/2.
        block_size: s.
        in_features: d, the size of T.
        coft: constrain the parameters; whenever they are used they are put back within the radius, in place.
        eps: the radius.
        block_share: the blocks are all the same, so `r` is 1.
        kernel_size: (0, 0), or the window for which 4-dimensional inputs are images to `rotate_and_fold`.
        use_cayley_neumann: the series instead of the exact transform.
        num_cayley_neumann_terms: its number of terms.
    """

    rows: torch.Tensor
    cols: torch.Tensor

    def __init__(
        self,
        r: int,
        n_elements: int,
        block_size: int,
        in_features: int,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        kernel_size: tuple[int, int] = (0, 0),
        use_cayley_neumann: bool = True,
        num_cayley_neumann_terms: int = 5,
    ) -> None:
        super().__init__()
        self.in_features, self.block_size = in_features, block_size
        self.r, self.n_elements, self.block_share = r, n_elements, block_share
        self.coft, self.eps = coft, eps
        self.use_cayley_neumann, self.num_cayley_neumann_terms = use_cayley_neumann, num_cayley_neumann_terms
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(r, n_elements))
        # On the CPU also where the weight is made without storage: nobody would load these.
        rows, cols = torch.triu_indices(block_size, block_size, 1, device="cpu")
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cols", cols, persistent=False)

    def forward(
        self, x: torch.Tensor, transposed: bool = False, dropout: MultiplicativeDropoutLayer | None = None
    ) -> torch.Tensor:
        """x·T in the dtype of `x`.

        Args:
            x: (..., d); with a kernel size also images (batch, C, H, W).
            transposed: x·Tᵀ instead.
            dropout: what drops blocks in training.
        """
        R = self.blocks()
        if dropout is not None and dropout.training and dropout.p:
            R = dropout(R.expand(self.in_features // self.block_size, -1, -1))
        R = R.to(x.dtype)
        if x.dim() == 4 and self.kernel_size[0] > 0:
            return rotate_and_fold(x, R, self.kernel_size).to(x.dtype)
        return rotate(x, R.mT if transposed else R).to(x.dtype)

    def blocks(self) -> torch.Tensor:
        """R of shape (r, s, s), in the weight's dtype; computed in float32 at least."""
        if self.coft:
            with torch.no_grad():
                self.weight.copy_(within(self.weight, self.eps))
        weight = self.weight
        w = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        Q = skew(w, self.block_size, self.rows, self.cols)
        R = cayley_neumann(Q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(Q)
        return R.to(weight.dtype)

    def get_weight(self) -> torch.Tensor:
        """T itself, (d, d)."""
        return torch.block_diag(*self.blocks().expand(self.in_features // self.block_size, -1, -1))

    def extra_repr(self) -> str:
        return f"blocks={self.in_features // self.block_size}, block_size={self.block_size}"
