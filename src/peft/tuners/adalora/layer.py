"""AdaLoRA on every kind of layer (arXiv 2303.10512): W' = W + (s/ρ)·B·(A ⊙ E), whose ranks are pruned during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...utils.tensors import product, transpose
from ..lora.layer import LoraLayer, check_adapters_to_merge
from .allocation import FACTORS, RankAllocator, ranks_of

if TYPE_CHECKING:
    from .config import AdaLoraConfig


class AdaLoraLayer(LoraLayer):
    """Holds the factors A, E and B of any number of adapters beside a base layer.

    The canonical weight is taken as a matrix: A is (r, in·window), E (r, 1), B (out, r). With groups, `in` are the
    channels that one group sees. ρ is `ranknum` + 1e-5, the rank that the adapter started with; it stays when ranks are
    pruned. Nothing of LoRA's variants, biases or initialisers is there.

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        # In this order, which is that of the parameters of an optimiser.
        self.lora_A, self.lora_B, self.lora_E = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.ranknum = nn.ParameterDict()
        self.present_ranks: dict[str, list[bool]] = {}
        """Adapter name -> for each rank that it started with whether the factors have it."""

    def _new_container(self, name: str) -> nn.Module:
        return nn.ParameterDict()

    # ----------------------------------------------------------------------------------------------------- adding

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: AdaLoraConfig, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            r: rank to start with.
            lora_alpha: the scaling s; the rank if it is not positive.
            config: everything else.
            kwargs: `present_ranks`, for each of the r ranks whether the factors have it, for an adapter that was pruned.

        Raises:
            ValueError: `r` is negative.
        """
        if r < 0:
            raise ValueError(
                f"The rank of {self._label or type(self).__name__} must not be negative, got r={r} for the adapter "
                f"{adapter_name!r}; the smallest is 0."
            )
        present = list(kwargs.get("present_ranks") or [True] * r)
        self.present_ranks[adapter_name] = present
        self.r[adapter_name] = sum(present)
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = self.initial_scaling(adapter_name)
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self._make_factors(adapter_name, sum(present), bias=False)
        # Drawn with the factors and then set; not saved, so it has its value even where those of the factors will be loaded.
        rank = torch.randn(1, device="cpu").fill_(r)
        self.ranknum[adapter_name] = nn.Parameter(rank, requires_grad=False)
        if config.init_lora_weights:
            self.reset_lora_parameters(adapter_name)
        self._settle(adapter_name, inference_mode=config.inference_mode)
        self.declare_frozen(adapter_name, "ranknum")

    def initial_scaling(self, adapter: str) -> float:
        alpha = self.lora_alpha[adapter]
        return alpha if alpha > 0 else float(self.initial_rank(adapter))

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        fan_out, *fan_in = self._canonical_shape()
        shapes = {"lora_A": (r, torch.Size(fan_in).numel()), "lora_E": (r, 1), "lora_B": (fan_out, r)}
        for name, shape in shapes.items():
            # Drawn even where it is overwritten, so that a seed gives one start.
            getattr(self, name)[adapter_name] = nn.Parameter(self.empty(*shape).normal_())

    def reset_lora_parameters(self, adapter_name: str) -> None:
        """Start A and B as normal with standard deviation 0.02, and E with zeros."""
        nn.init.zeros_(self.lora_E[adapter_name])
        nn.init.normal_(self.lora_A[adapter_name], std=0.02)
        nn.init.normal_(self.lora_B[adapter_name], std=0.02)

    def _drop(self, adapter_name: str) -> None:
        super()._drop(adapter_name)
        self.present_ranks.pop(adapter_name, None)

    # ------------------------------------------------------------------------------------------------------ ranks

    def initial_rank(self, adapter: str) -> int:
        """The rank that an adapter had before any of it was pruned."""
        return len(self.present_ranks[adapter])

    def in_initial_ranks(self, adapter: str, kept: Sequence[bool]) -> list[bool]:
        """Which of an adapter's initial ranks are kept, from which of its present ones are."""
        remaining = iter(kept)
        return [present and next(remaining) for present in self.present_ranks[adapter]]

    def of_present_ranks(self, adapter: str, kept: Sequence[bool]) -> list[bool]:
        """Which of an adapter's present ranks are kept, from which of its initial ones are.

        Raises:
            ValueError: the pattern has another number of ranks than the adapter started with.
        """
        present = self.present_ranks[adapter]
        if len(kept) != len(present):
            raise ValueError(
                f"The rank_pattern of {self._label or type(self).__name__} has {len(kept)} entries, and the adapter "
                f"{adapter!r} started with rank {len(present)} there."
            )
        return [keep for keep, has in zip(kept, present) if has]

    def keep_ranks(self, adapter: str, kept: Sequence[bool]) -> None:
        """Take the other ranks out of an adapter's factors.

        Args:
            adapter: the adapter.
            kept: for each initial rank whether it is kept.
        """
        rows = torch.tensor(self.of_present_ranks(adapter, kept), dtype=torch.bool)
        for factor in FACTORS:
            old = self._modules[factor][adapter]
            self._modules[factor][adapter] = nn.Parameter(ranks_of(factor, old.detach(), rows), old.requires_grad)
        self.present_ranks[adapter] = [has and keep for has, keep in zip(self.present_ranks[adapter], kept)]
        self.r[adapter] = sum(self.present_ranks[adapter])

    # ------------------------------------------------------------------------------------------------ mathematics

    def _canonical_shape(self) -> tuple[int, ...]:
        return self.kind.shape(self.get_base_layer())

    def factor_dtype(self, adapter: str) -> torch.dtype:
        return self.lora_A[adapter].dtype

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A ⊙ E (r, in·window) and B (out, r); their product times `coefficient` is ΔW as a matrix."""
        return self.lora_A[adapter] * self.lora_E[adapter], self.lora_B[adapter]

    def coefficient(self, adapter: str) -> torch.Tensor:
        """s/ρ, (1,)."""
        return self.scaling[adapter] / (self.ranknum[adapter] + 1e-5)

    def plain_delta(self, adapter: str) -> torch.Tensor:
        """(s/ρ)·B·(A ⊙ E), canonical."""
        A, B = self.factors(adapter)
        return (product(B, A) * self.coefficient(adapter)).view(self._canonical_shape())

    def term(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """(s/ρ)·B·((A ⊙ E)·dropout(x)), without forming the product of the factors."""
        A, B = self.factors(adapter)
        if x.is_floating_point():  # entries of a table are no values to drop
            x = self.lora_dropout[adapter](self._cast_term_input(x, A.dtype))
        A = A.view(-1, *self._canonical_shape()[1:])
        return self.kind.apply_product(self.get_base_layer(), x, B, A) * self.coefficient(adapter)

    def __repr__(self) -> str:
        return f"adalora.{nn.Module.__repr__(self)}"


class SVDLayer(AdaLoraLayer, nn.Module):
    """An AdaLoRA layer with its first adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        config: its configuration.
        r: rank to start with.
        lora_alpha: the scaling.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: AdaLoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        AdaLoraLayer.__init__(self, base_layer, **kwargs)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)


class SVDLinear(SVDLayer):
    """AdaLoRA on `nn.Linear` and transformers' `Conv1D`."""


class SVDEmbedding(SVDLayer):
    """AdaLoRA on `nn.Embedding`: out is the width, in the number of entries."""


class SVDConv1d(SVDLayer):
    """AdaLoRA on `nn.Conv1d`."""


class SVDConv2d(SVDLayer):
    """AdaLoRA on `nn.Conv2d`."""


class SVDConv3d(SVDLayer):
    """AdaLoRA on `nn.Conv3d`."""


LAYER_CLASSES: dict[str, type[SVDLayer]] = {
    "linear": SVDLinear,
    "conv1d_transformers": SVDLinear,
    "embedding": SVDEmbedding,
    "conv1d": SVDConv1d,
    "conv2d": SVDConv2d,
    "conv3d": SVDConv3d,
}

__all__ = [
    "AdaLoraLayer",
    "LoraLayer",
    "RankAllocator",
    "SVDConv1d",
    "SVDConv2d",
    "SVDConv3d",
    "SVDEmbedding",
    "SVDLinear",
    "check_adapters_to_merge",
    "transpose",
]
