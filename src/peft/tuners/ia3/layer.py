"""(IA)³ on every kind of layer (arXiv 2205.05638): W' = diag(l)·W, or W·diag(l) where the input is rescaled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer, check_adapters_to_merge
from ...utils.tensors import transpose

if TYPE_CHECKING:
    from .config import IA3Config


class IA3Layer(AdapterLayer):
    """Holds the vectors of any number of adapters, each of which rescales the layer's output or its input.

    `ia3_l` is (out, 1) or, for the input ("feed-forward"), (1, in); of a convolution (1, channels, 1, ...) either way.

    Args:
        base_layer: the layer to adapt.
        is_feedforward: what holds for an adapter that does not say which side it rescales.
    """

    adapter_layer_names = ("ia3_l",)
    other_param_names = ("feedforward",)

    def __init__(self, base_layer: nn.Module, is_feedforward: bool, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.is_feedforward = is_feedforward
        self.feedforward: dict[str, bool] = {}
        self.fan_in_fan_out = self.kind is not None and self.kind.transposed
        # The number of axes after the features (channels) in inputs, outputs and weights.
        self._window = 0 if self.kind is None else len(self.kind.shape(self.get_base_layer())) - 2

    # ----------------------------------------------------------------------------------------------------- adding

    def update_layer(
        self, adapter_name: str, config: IA3Config, is_feedforward: bool | None = None, **kwargs: Any
    ) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            config: everything else.
            is_feedforward: whether it rescales the input; as the layer's first adapter by default.
            kwargs: what depends on the module.
        """
        feedforward = self.is_feedforward if is_feedforward is None else is_feedforward
        self.feedforward[adapter_name] = feedforward
        self.ia3_l[adapter_name] = nn.Parameter(self.empty(*self._vector_shape(feedforward)))
        # Drawn in any case, so that the random numbers that follow do not depend on the setting.
        nn.init.normal_(self.ia3_l[adapter_name])
        if config.init_ia3_weights:
            self.reset_ia3_parameters(adapter_name)
        self._settle(adapter_name, inference_mode=config.inference_mode)

    def reset_ia3_parameters(self, adapter_name: str) -> None:
        """Start an adapter over, changing nothing.

        Args:
            adapter_name: the adapter; one that the layer does not hold is ignored.
        """
        if adapter_name in self.ia3_l:
            nn.init.ones_(self.ia3_l[adapter_name])

    def _vector_shape(self, feedforward: bool) -> tuple[int, ...]:
        return (1, self.in_features) if feedforward else (self.out_features, 1)

    # ---------------------------------------------------------------------------------------------------- forward

    def vector(self, adapter: str) -> torch.Tensor:
        """l, (features,)."""
        return self.ia3_l[adapter].flatten()

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        before = _product(self.vector(name) for name in plan if self.feedforward[name])
        after = _product(self.vector(name) for name in plan if not self.feedforward[name])
        return self.rescaled_forward(x, before, after, *args, **kwargs)

    def mixed_forward(self, x: torch.Tensor, rows: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        before = self._vector_by_row(x, {name: rows[name] for name in rows if self.feedforward[name]})
        after = self._vector_by_row(x, {name: rows[name] for name in rows if not self.feedforward[name]})
        return self.rescaled_forward(x, before, after, *args, **kwargs)

    def _vector_by_row(self, x: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """(rows, features), ones for rows without an adapter; None if that is all of them."""
        if not rows:
            return None
        vectors = [self.vector(name) for name in rows]
        owner = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for number, index in enumerate(rows.values(), start=1):
            owner[index] = number
        return torch.stack([torch.ones_like(vectors[0]), *vectors])[owner]

    def rescaled_forward(
        self, x: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer between two rescalings.

        Args:
            x: the base layer's input.
            before: what its features are multiplied by, (in,) or (rows, in); None for nothing.
            after: what the output's features are multiplied by, (out,) or (rows, out); None for nothing.
        """
        if before is not None:
            x = rescale(x, before, self._window)
        result = self.base_layer(x, *args, **kwargs)
        return result if after is None else rescale(result, after, self._window)

    # ---------------------------------------------------------------------------------------------------- merging

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        kind = self.kind
        weight = kind.flip(tensors[kind.weight_name])
        if self.feedforward[adapter]:
            return {kind.weight_name: kind.flip(self._columns_scaled(weight, self.vector(adapter)))}
        folded = {kind.weight_name: kind.flip(self._rows_scaled(weight, self.vector(adapter)))}
        if kind.bias_name in tensors:
            folded[kind.bias_name] = tensors[kind.bias_name] * self.vector(adapter)
        return folded

    def _rows_scaled(self, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return weight * vector.view(-1, *(1,) * (weight.dim() - 1))

    def _columns_scaled(self, weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        # With groups, an output channel's columns are the input channels of its own group.
        groups = getattr(self.get_base_layer(), "groups", 1)
        by_group = vector.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
        return weight * by_group.view(*by_group.shape, *(1,) * (weight.dim() - 2))


def rescale(x: torch.Tensor, vector: torch.Tensor, window: int) -> torch.Tensor:
    """Multiply the features of a tensor; computed in the wider dtype, returned in the tensor's own.

    Args:
        x: (..., features, *window).
        vector: (features,), or (rows, features) where the first axis of `x` counts rows.
        window: the number of axes after the features.
    """
    *rows, features = vector.shape
    between = (1,) * (x.dim() - window - vector.dim())
    return (x * vector.view(*rows, *between, features, *(1,) * window)).to(x.dtype)


def _product(vectors: Iterable[torch.Tensor]) -> torch.Tensor | None:
    result = None
    for vector in vectors:
        result = vector if result is None else result * vector
    return result


class _Layer(IA3Layer, nn.Module):
    """An (IA)³ layer with its first adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        config: its configuration.
        is_feedforward: whether it rescales the input.
        is_target_conv_1d_layer: whether the layer stores its weight (in, out); found out as well.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: IA3Config,
        is_feedforward: bool = False,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        IA3Layer.__init__(self, base_layer, is_feedforward, **kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer or self.fan_in_fan_out
        self.update_layer(adapter_name, config, is_feedforward=is_feedforward, **kwargs)


class Linear(_Layer):
    """(IA)³ on `nn.Linear` and transformers' `Conv1D`."""


class Embedding(_Layer):
    """(IA)³ on `nn.Embedding`: out is the width, in the number of entries, each of which can have a factor."""

    def rescaled_forward(
        self, x: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        result = super().rescaled_forward(x, None, after, *args, **kwargs)
        if before is None:
            return result
        factor = before[x] if before.dim() == 1 else before.gather(1, x.reshape(len(x), -1)).view_as(x)
        return (result * factor.unsqueeze(-1)).to(result.dtype)


class _ConvNd(_Layer):
    """(IA)³ on a convolution, with or without groups; arguments as `Linear`'s."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def _vector_shape(self, feedforward: bool) -> tuple[int, ...]:
        return (1, self.in_features if feedforward else self.out_features, *(1,) * self._window)


class Conv1d(_ConvNd):
    """(IA)³ on `nn.Conv1d`."""


class Conv2d(_ConvNd):
    """(IA)³ on `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """(IA)³ on `nn.Conv3d`."""


__all__ = [
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "IA3Layer",
    "Linear",
    "check_adapters_to_merge",
    "rescale",
    "transpose",
]
