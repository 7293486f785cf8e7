"""LoHa on every kind of layer (arXiv 2108.06098): W' = W + s·(A₁·B₁) ⊙ (A₂·B₂)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.tensors import is_spread
from ..lycoris_utils import LycorisLayer, scaled_rows
from .hadamard import (
    HadamardProduct,
    HadaWeight,
    HadaWeightCP,
    hadamard_factors,
    low_rank,
    make_weight,
    make_weight_cp,
    window_factors,
)

if TYPE_CHECKING:
    from .config import LoHaConfig


class LoHaLayer(LycorisLayer, nn.Module):
    """Holds the factors of two low-rank tensors, whose Hadamard product is ΔW.

    Flat: `hada_w*_a` (out, r) and `hada_w*_b` (r, in·window). Effective, for convolutions: `hada_w*_a` (r, out),
    `hada_w*_b` (r, in) and `hada_t*` (r, r, *window), with a window of one dimension written as (k, 1).

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        LycorisLayer.__init__(self, base_layer, **kwargs)

    # ----------------------------------------------------------------------------------------------------- adding

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: LoHaConfig, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            r: rank of this layer.
            alpha: numerator of the scaling.
            config: everything else.
            kwargs: what depends on the module.

        Raises:
            ValueError: `r` is not positive.
        """
        self._record(adapter_name, r, alpha, config)
        fan_out, fan_in, *window = self.kind.shape(self.get_base_layer())
        effective = config.use_effective_conv2d and math.prod(window) > 1
        shape = (fan_out, fan_in, *window) if effective else (fan_out, fan_in * math.prod(window))
        self.create_adapter_parameters(adapter_name, r, shape)
        if config.init_weights:
            self.reset_adapter_parameters(adapter_name)
        else:
            self.reset_adapter_parameters_random(adapter_name)
        self._settle(adapter_name, inference_mode=config.inference_mode)

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        """Make the factors, uninitialised.

        Args:
            adapter_name: the adapter.
            r: its rank.
            shape: (out, in·window) for flat factors, (out, in, *window) for effective ones.
        """
        fan_out, fan_in, *window = shape
        a, b = ((r, fan_out), (r, fan_in)) if window else ((fan_out, r), (r, fan_in))
        shapes = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
        if window:
            core = (r, r, *window, 1) if len(window) == 1 else (r, r, *window)
            shapes |= {"hada_t1": core, "hada_t2": core}
        for name, size in shapes.items():
            getattr(self, name)[adapter_name] = nn.Parameter(self.empty(*size))

    def reset_adapter_parameters(self, adapter_name: str) -> None:
        """Start the factors so that ΔW = 0: one of them is zero, the others random."""
        self._start(adapter_name, zeros=("hada_w2_b",))

    def reset_adapter_parameters_random(self, adapter_name: str) -> None:
        """Start all factors at random."""
        self._start(adapter_name)

    # ------------------------------------------------------------------------------------------------ mathematics

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """P₁ (out, r), Q₁ (r, in, *window), P₂ and Q₂ with ΔW = s·(P₁·Q₁) ⊙ (P₂·Q₂), canonical."""
        fan_in = self.kind.shape(self.get_base_layer())[1:]
        w1_a, w1_b = self.hada_w1_a[adapter], self.hada_w1_b[adapter]
        w2_a, w2_b = self.hada_w2_a[adapter], self.hada_w2_b[adapter]
        if self._has("hada_t1", adapter):
            w1_a, w1_b = window_factors(self.hada_t1[adapter], w1_a, w1_b)
            w2_a, w2_b = window_factors(self.hada_t2[adapter], w2_a, w2_b)
        return w1_a, w1_b.reshape(-1, *fan_in), w2_a, w2_b.reshape(-1, *fan_in)

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """s·(A₁·B₁) ⊙ (A₂·B₂), canonical."""
        p1, q1, p2, q2 = self.factors(adapter)
        if torch.is_autocast_enabled(p1.device.type) or is_spread(p1):  # whose products are of other sorts than they
            return low_rank(p1, q1) * low_rank(p2, q2) * self.scaling[adapter]
        product = HadamardProduct.apply(p1, q1.flatten(1), p2, q2.flatten(1), self.scaling[adapter])
        return product.unflatten(1, q1.shape[1:])

    def activations(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """ΔW·x; where r² is small beside the layer, by the factors of ΔW instead of ΔW itself."""
        if not self._rank_is_small(self.r[adapter] ** 2):
            return super().activations(x, adapter)
        p, q = hadamard_factors(*self.factors(adapter))
        x = self._cast_term_input(x, q.dtype)
        return self.kind.apply_product(self.get_base_layer(), x, p * self.scaling[adapter], q)

    def _rank_is_small(self, rank: int) -> bool:
        """Whether two factors of that rank take less work than ΔW; with groups ΔW is no plain product of them."""
        layer = self.get_base_layer()
        fan_out, *fan_in = self.kind.shape(layer)
        size = math.prod(fan_in)
        return getattr(layer, "groups", 1) == 1 and rank * (fan_out + size) < fan_out * size

    def __repr__(self) -> str:
        return f"loha.{super().__repr__()}"


class _Layer(LoHaLayer):
    """A LoHa layer with its first adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        config: its configuration.
        r: rank of this layer.
        alpha: numerator of the scaling.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoHaConfig,
        r: int = 0,
        alpha: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.update_layer(adapter_name, r, alpha, config=config, **kwargs)


class Linear(_Layer):
    """LoHa on `nn.Linear` and transformers' `Conv1D`."""


class Embedding(_Layer):
    """LoHa on `nn.Embedding`: out is the width, in the number of entries."""

    def activations(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The rows of ΔW that `x` names, as products of rows of the two low-rank tables."""
        p1, q1, p2, q2 = self.factors(adapter)
        layer = self.get_base_layer()
        rows = [F.embedding(x, q.T, padding_idx=layer.padding_idx) @ p.T for p, q in ((p1, q1), (p2, q2))]
        return scaled_rows(layer, rows[0] * rows[1] * self.scaling[adapter])


class Conv1d(_Layer):
    """LoHa on `nn.Conv1d`."""


class Conv2d(_Layer):
    """LoHa on `nn.Conv2d`."""


class Conv3d(_Layer):
    """LoHa on `nn.Conv3d`."""


__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "HadaWeight",
    "HadaWeightCP",
    "Linear",
    "LoHaLayer",
    "LycorisLayer",
    "make_weight",
    "make_weight_cp",
]
