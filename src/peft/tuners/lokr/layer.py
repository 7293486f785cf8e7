"""LoKr on every kind of layer (arXiv 2309.14859): W' = W + s·(w₁ ⊗ w₂)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..lycoris_utils import LycorisLayer, scaled_rows
from .kronecker import factorization, kronecker, make_kron, make_weight_cp

if TYPE_CHECKING:
    from .config import LoKrConfig

Split = tuple[int, int]


class LoKrLayer(LycorisLayer, nn.Module):
    """Holds the two parts of a Kronecker product, each in full or as a low-rank product.

    (l, k) is the split of the output features, (m, n) that of the input features.
    w₁: `lokr_w1` (l, m); or `lokr_w1_a` (l, r) times `lokr_w1_b` (r, m).
    w₂: `lokr_w2` (k, n, *window); or `lokr_w2_a` (k, r) times `lokr_w2_b` (r, n·window); or, effective, `lokr_t2`
    (r, r, *window) between `lokr_w2_a` (r, k) and `lokr_w2_b` (r, n).

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        LycorisLayer.__init__(self, base_layer, **kwargs)

    # ----------------------------------------------------------------------------------------------------- adding

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: LoKrConfig, **kwargs: Any) -> None:
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
        self.rank_dropout_scale[adapter_name] = config.rank_dropout_scale
        fan_out, fan_in, *window = self.kind.shape(self.get_base_layer())
        (l, k), (m, n) = (factorization(size, config.decompose_factor) for size in (fan_out, fan_in))
        self.create_adapter_parameters(
            adapter_name,
            r,
            shape=((l, k), (m, n), *window),
            use_w1=not (config.decompose_both and r < max(l, m) / 2),
            use_w2=r >= max(k, n) / 2,
            use_effective_conv2d=config.use_effective_conv2d and math.prod(window) > 1,
        )
        if config.init_weights == "lycoris":
            self.reset_adapter_parameters_lycoris_way(adapter_name)
        elif config.init_weights:
            self.reset_adapter_parameters(adapter_name)
        else:
            self.reset_adapter_parameters_random(adapter_name)
        self._settle(adapter_name, inference_mode=config.inference_mode)

    def create_adapter_parameters(
        self,
        adapter_name: str,
        r: int,
        shape: tuple[Split | int, ...],
        use_w1: bool,
        use_w2: bool,
        use_effective_conv2d: bool,
    ) -> None:
        """Make the parts, uninitialised.

        Args:
            adapter_name: the adapter.
            r: its rank.
            shape: ((l, k), (m, n), *window).
            use_w1: w₁ in full.
            use_w2: w₂ in full.
            use_effective_conv2d: if w₂ is a low-rank product, factorise the window apart from the channels.
        """
        (l, k), (m, n), *window = shape
        shapes = {"lokr_w1": (l, m)} if use_w1 else {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)}
        if use_w2:
            shapes["lokr_w2"] = (k, n, *window)
        elif use_effective_conv2d:
            core = (r, r, *window, 1) if len(window) == 1 else (r, r, *window)
            shapes |= {"lokr_w2_a": (r, k), "lokr_w2_b": (r, n), "lokr_t2": core}
        else:
            shapes |= {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * math.prod(window))}
        for name, size in shapes.items():
            getattr(self, name)[adapter_name] = nn.Parameter(self.empty(*size))

    def reset_adapter_parameters(self, adapter_name: str) -> None:
        """Start with ΔW = 0 by w₁ = 0."""
        self._start(adapter_name, zeros=("lokr_w1", "lokr_w1_a"))

    def reset_adapter_parameters_lycoris_way(self, adapter_name: str) -> None:
        """Start with ΔW = 0 by w₂ = 0."""
        self._start(adapter_name, zeros=("lokr_w2", "lokr_w2_b"))

    def reset_adapter_parameters_random(self, adapter_name: str) -> None:
        """Start both parts at random."""
        self._start(adapter_name)

    # ------------------------------------------------------------------------------------------------ mathematics

    def left(self, adapter: str) -> torch.Tensor:
        """w₁, (l, m)."""
        if self._has("lokr_w1", adapter):
            return self.lokr_w1[adapter]
        return self.lokr_w1_a[adapter] @ self.lokr_w1_b[adapter]

    def right_factors(self, adapter: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """P (k, r) and Q (r, n, *window) with w₂ = P·Q; None and w₂ itself where that is kept in full."""
        if self._has("lokr_w2", adapter):
            return None, self.lokr_w2[adapter]
        window = self.kind.shape(self.get_base_layer())[2:]
        p, q = self.lokr_w2_a[adapter], self.lokr_w2_b[adapter]
        if self._has("lokr_t2", adapter):
            p, q = p.T, torch.einsum("ij...,jq->iq...", self.lokr_t2[adapter], q)
        return p, q.reshape(len(q), -1, *window)

    def right(self, adapter: str) -> torch.Tensor:
        """w₂, (k, n, *window)."""
        p, q = self.right_factors(adapter)
        return q if p is None else torch.tensordot(p, q, 1)

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """s·(w₁ ⊗ w₂), canonical."""
        return kronecker(self.left(adapter), self.right(adapter)) * self.scaling[adapter]

    def activations(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """ΔW·x by (w₁ ⊗ w₂)·x = w₂ on each of m slices of the features, then w₁ across the slices."""
        if not self._slices_apart(adapter):
            return super().activations(x, adapter)
        left, (p, q) = self.left(adapter), self.right_factors(adapter)
        layer, axis = self.get_base_layer(), self._feature_axis
        slices = self._cast_term_input(x, q.dtype).unflatten(axis, (left.shape[1], q.shape[1]))
        batch = slices.shape[:axis]  # what comes before the features of a slice; the slices themselves come last in it
        hidden = self.kind.apply(layer, slices.flatten(0, axis - 1), self.kind.flip(q)).movedim(axis, -1)
        hidden = hidden if p is None else F.linear(hidden, p)
        across = hidden.unflatten(0, batch).movedim(len(batch) - 1, -1)
        return F.linear(across, left * self.scaling[adapter]).mT.flatten(-2).movedim(-1, axis)

    def _slices_apart(self, adapter: str) -> bool:
        """Whether the slices of the features can go through w₂ one by one: not across groups of channels."""
        return getattr(self.get_base_layer(), "groups", 1) == 1

    def __repr__(self) -> str:
        return f"lokr.{super().__repr__()}"


class _Layer(LoKrLayer):
    """A LoKr layer with its first adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        config: its configuration.
        device: of no effect; an adapter is where its base weight is.
        dtype: of no effect; an adapter has its base weight's, or float32 in place of a half precision.
        r: rank of this layer.
        alpha: numerator of the scaling.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoKrConfig,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        r: int = 0,
        alpha: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.update_layer(adapter_name, r, alpha, config=config, **kwargs)


class Linear(_Layer):
    """LoKr on `nn.Linear` and transformers' `Conv1D`."""


class Embedding(_Layer):
    """LoKr on `nn.Embedding`: out is the width, in the number of entries."""

    def activations(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The rows of ΔW that `x` names: entry j·n + q has the product of column j of w₁ with column q of w₂."""
        left, (p, q) = self.left(adapter), self.right_factors(adapter)
        entries = q.shape[1]
        inner = F.embedding(x % entries, q.T)
        inner = inner if p is None else F.linear(inner, p)
        outer = F.embedding(x // entries, left.T * self.scaling[adapter])
        return scaled_rows(self.get_base_layer(), (outer.unsqueeze(-1) * inner.unsqueeze(-2)).flatten(-2))


class Conv1d(_Layer):
    """LoKr on `nn.Conv1d`.

    With w₂ in full, ΔW has its entries in another order than a Kronecker product of the channels: the order that
    existing adapters were trained with, see `make_kron`. As a low-rank product, w₂ gives the Kronecker product.
    """

    def delta_weight(self, adapter: str) -> torch.Tensor:
        if not self._has("lokr_w2", adapter):
            return super().delta_weight(adapter)
        product = make_kron(self.left(adapter), self.lokr_w2[adapter], self.scaling[adapter])
        return product.reshape(self.kind.shape(self.get_base_layer()))

    def _slices_apart(self, adapter: str) -> bool:
        return not self._has("lokr_w2", adapter) and super()._slices_apart(adapter)


class Conv2d(_Layer):
    """LoKr on `nn.Conv2d`."""


class Conv3d(_Layer):
    """LoKr on `nn.Conv3d`."""


__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoKrLayer",
    "LycorisLayer",
    "factorization",
    "make_kron",
    "make_weight_cp",
]
