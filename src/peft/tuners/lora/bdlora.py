"""BD-LoRA: one factor of each adapter is block-diagonal, so that tensor-parallel ranks multiply without communication.

A block-diagonal matrix of n blocks maps the j-th of n equal parts of its input to the j-th part of its output. It is
kept as its blocks below each other, (out, in / n).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...utils.tensors import product
from ...utils.warning import PeftWarning
from .variant import LoraVariant, register_variant

if TYPE_CHECKING:
    from .config import BdLoraConfig, LoraConfig
    from .layer import LoraLayer


def apply_blocks(x: torch.Tensor, weight: torch.Tensor, nblocks: int) -> torch.Tensor:
    """x·Wᵀ for a block-diagonal W.

    Args:
        x: (..., in).
        weight: the blocks below each other, (out, in / nblocks).
        nblocks: how many there are.

    Returns:
        (..., out).
    """
    blocks = weight.unflatten(0, (nblocks, -1))
    return torch.einsum("...ni,noi->...no", x.unflatten(-1, (nblocks, -1)), blocks).flatten(-2)


class BlockDiagonalLinear(nn.Module):
    """A linear layer without bias whose matrix is block-diagonal.

    Args:
        in_features: a multiple of `nblocks`.
        out_features: a multiple of `nblocks`.
        nblocks: number of blocks.
        init_zero: start as zero; otherwise uniform in ±sqrt(6·nblocks / in_features).
        dtype: of the weight.
        device: of the weight.

    Raises:
        ValueError: the features cannot be divided among the blocks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if nblocks < 1 or in_features % nblocks or out_features % nblocks:
            raise ValueError(
                f"{in_features} inputs and {out_features} outputs cannot be divided among {nblocks} equal blocks."
            )
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // nblocks, dtype=dtype, device=device))
        if init_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return apply_blocks(x, self.weight, self.nblocks)

    def weight_as_blockdiagonal_matrix(self) -> torch.Tensor:
        """The matrix in full, (out, in)."""
        return torch.block_diag(*self.weight.chunk(self.nblocks))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}"


def block_diagonal_factor(config: BdLoraConfig, name: str) -> str | None:
    """Which factor of a module's adapter is block-diagonal: "A", "B", or None for neither.

    Args:
        config: an entry of its lists matches a module if it is part of the module's name.
        name: the module's dotted name.

    Raises:
        ValueError: both lists match, or none does while `match_strict` is set.
    """
    lists = {"A": config.target_modules_bd_a, "B": config.target_modules_bd_b}
    found = {factor: [entry for entry in entries or () if entry in name] for factor, entries in lists.items()}
    if found["A"] and found["B"]:
        raise ValueError(
            f"{name} matches {found['A']} in target_modules_bd_a and {found['B']} in target_modules_bd_b; only one "
            "factor can be block-diagonal. Use longer entries."
        )
    if not found["A"] and not found["B"] and config.match_strict:
        raise ValueError(
            f"{name} matches neither target_modules_bd_a={config.target_modules_bd_a} nor "
            f"target_modules_bd_b={config.target_modules_bd_b}. Add it to one of them, leave it out of target_modules, or "
            "set match_strict=False to give it a plain adapter."
        )
    return next((factor for factor, entries in found.items() if entries), None)


def dense(factor: nn.Module) -> torch.Tensor:
    """A factor as a matrix in full."""
    return factor.weight_as_blockdiagonal_matrix() if isinstance(factor, BlockDiagonalLinear) else factor.weight


@register_variant("use_bdlora", kinds=("linear", "conv1d_transformers"))
class BdLoraLinearVariant(LoraVariant):
    """LoRA with a block-diagonal A or B, which of them by the module's name.

    A block-diagonal B has no bias, whatever `lora_bias` says.
    """

    can_be_padded = False

    @staticmethod
    def check(module: LoraLayer, adapter_name: str, r: int, config: LoraConfig, **kwargs: Any) -> None:
        nblocks = config.use_bdlora.nblocks
        factor = block_diagonal_factor(config.use_bdlora, module.called)
        side, features = ("inputs", module.in_features) if factor == "A" else ("outputs", module.out_features)
        if factor is not None and (nblocks < 1 or r % nblocks or features % nblocks):
            raise ValueError(
                f"{module.called}: {factor} of the adapter {adapter_name!r} is to have {nblocks} blocks, among which r={r} "
                f"and {features} {side} cannot be divided."
            )
        if factor == "B" and config.lora_bias:
            warnings.warn(
                f"{module.called}: B of the adapter {adapter_name!r} is block-diagonal and has no bias; lora_bias is of no "
                "effect there.",
                PeftWarning,
            )

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        factor = block_diagonal_factor(config.use_bdlora, module.called)
        A, B = module.factors(adapter_name)
        like = {"nblocks": config.use_bdlora.nblocks, "dtype": A.dtype, "device": A.device}
        if factor == "A":
            module.lora_A[adapter_name] = BlockDiagonalLinear(A.shape[1], A.shape[0], **like)
        elif factor == "B":
            module.lora_B[adapter_name] = BlockDiagonalLinear(B.shape[1], B.shape[0], init_zero=True, **like)
            module.lora_bias[adapter_name] = False

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return result + module.term(x, active_adapter)

    @staticmethod
    def delta_weight(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        A, B = dense(module.lora_A[active_adapter]), dense(module.lora_B[active_adapter])
        return module.scaling[active_adapter] * product(B, A)
