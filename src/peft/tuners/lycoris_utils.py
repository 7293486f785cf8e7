"""What the LyCORIS methods, LoHa and LoKr, have in common (arXiv 2309.14859): scaling, dropout, ranks by pattern."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import PeftConfig
from ..engine.kinds import embed_scale
from ..engine.layer import AdditiveLayer, BaseTunerLayer, check_adapters_to_merge
from ..engine.matching import get_pattern_key
from ..engine.tuner import BaseTuner


@dataclass
class LycorisConfig(PeftConfig):
    """The base of the LyCORIS methods' configurations.

    Args:
        rank_pattern: regular expression for the end of a module's name -> rank.
        alpha_pattern: regular expression for the end of a module's name -> alpha.
    """

    fractional: ClassVar[tuple[str, ...]] = ("alpha", "alpha_pattern")

    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)

    def _check_selection(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} names the list of layers that layers_to_transform counts in; "
                "set layers_to_transform too."
            )


class LycorisLayer(AdditiveLayer):
    """Holds the factors of ΔW of any number of adapters; a method says what they are and how they multiply.

    A mixin beside `nn.Module`. A method gives `update_layer`, `create_adapter_parameters`, `reset_adapter_parameters`,
    `delta_weight` and, where ΔW need not be formed, `activations`.

    Args:
        base_layer: the layer to adapt.
    """

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.rank_dropout_scale: dict[str, bool] = {}
        self.module_dropout: dict[str, float] = {}

    @property
    def _available_adapters(self) -> set[str]:
        return self._get_available_adapters()

    def _has(self, name: str, adapter: str) -> bool:
        """Whether the container of that name holds the adapter; the container need not be there."""
        container = self._modules.get(name)
        return container is not None and adapter in container

    # ----------------------------------------------------------------------------------------------------- adding

    def update_layer(self, adapter_name: str, r: int, alpha: float, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            r: rank of this layer.
            alpha: numerator of the scaling.
            kwargs: what the method needs besides.
        """
        raise NotImplementedError

    def create_adapter_parameters(self, adapter_name: str, r: int, **kwargs: Any) -> None:
        """Make the factors of an adapter, uninitialised."""
        raise NotImplementedError

    def reset_adapter_parameters(self, adapter_name: str) -> None:
        """Start the factors of an adapter so that ΔW = 0."""
        raise NotImplementedError

    def _record(self, adapter_name: str, r: int, alpha: float, config: Any) -> None:
        """Keep an adapter's numbers, and forget the factors it may have had."""
        if r <= 0:
            raise ValueError(
                f"The rank of {self._label or type(self).__name__} must be positive, got r={r} for the adapter "
                f"{adapter_name!r}; the smallest is 1."
            )
        self._drop(adapter_name)
        self.r[adapter_name] = r
        self.alpha[adapter_name] = alpha
        self.scaling[adapter_name] = self.initial_scaling(adapter_name)
        self.rank_dropout[adapter_name] = config.rank_dropout
        self.module_dropout[adapter_name] = config.module_dropout

    def _start(self, adapter_name: str, zeros: Collection[str] = ()) -> None:
        """Start the factors uniformly within ±1/√fan_in, in the order of `adapter_layer_names`, or with zeros."""
        for name, container in self.adapter_containers():
            if adapter_name not in container:
                continue
            if name in zeros:
                nn.init.zeros_(container[adapter_name])
            else:
                nn.init.kaiming_uniform_(container[adapter_name], a=math.sqrt(5))

    def initial_scaling(self, adapter: str) -> float:
        return self.alpha[adapter] / self.r[adapter]

    # ---------------------------------------------------------------------------------------------------- forward

    @property
    def _feature_axis(self) -> int:
        """The axis of an output that its features (channels) lie along, from the end."""
        return 1 - len(self.kind.shape(self.get_base_layer()))

    def term(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """ΔW·x, or None where module dropout leaves the adapter out of this call."""
        if self.training:
            # Drawn whether or not it is needed: the random numbers that follow shall not depend on the setting.
            draw, probability = torch.rand(1), self.module_dropout[adapter]
            if probability and draw <= probability:
                return None
        return self._get_delta_activations(adapter, x)

    def _get_delta_activations(self, adapter_name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """ΔW·x, in training with rank dropout."""
        factor = self._rank_dropout_factor(adapter_name)
        result = self.activations(x, adapter_name)
        if factor is None:
            return result
        axis = self._feature_axis
        return result * factor.to(result).view(-1, *(1,) * (-axis - 1))

    def activations(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """ΔW·x without dropout; forms ΔW unless the method knows better.

        Args:
            x: the base layer's input.
            adapter: a name this layer holds.
        """
        return super().term(x, adapter)

    def _rank_dropout_factor(self, adapter: str) -> torch.Tensor | None:
        """What each output feature is multiplied by in this step: 0 if dropped; None if nothing can be.

        "Rank" dropout takes out whole rows of ΔW. A method without `rank_dropout_scale` always rescales what it keeps.
        """
        probability = self.rank_dropout[adapter]
        if not (self.training and probability):
            return None
        kept = (torch.rand(self.out_features) > probability).float()
        if self.rank_dropout_scale.get(adapter, True):
            kept = kept / kept.mean().clamp(min=1 / self.out_features)  # the bound is met only if all are dropped
        return kept

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """ΔW with its scaling, in the base weight's own layout and the adapter's dtype.

        Args:
            adapter_name: a name this layer holds.
            apply_rank_dropout: in training mode, drop rows as a forward would.
        """
        delta = self.delta_weight(adapter_name)
        factor = self._rank_dropout_factor(adapter_name) if apply_rank_dropout else None
        if factor is not None:
            delta = delta * factor.to(delta).view(-1, *(1,) * (delta.dim() - 1))
        return self.kind.flip(delta)


def scaled_rows(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a table times the factor that the embedding multiplies its own by, if it has one."""
    scale = embed_scale(layer)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if torch.is_tensor(scale) else scale)


class LycorisTuner(BaseTuner):
    """The base of the LyCORIS methods' tuners: rank and alpha of a module come from patterns."""

    tuner_layer_cls = LycorisLayer
    layers_mapping: ClassVar[dict[type[nn.Module], type[LycorisLayer]]] = {}
    """Torch class -> layer class, for whoever looks one up; `layer_classes`, by kind, has all of them."""

    def layer_options(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        return {
            "r": ranks.get(get_pattern_key(ranks, key), config.r),
            "alpha": alphas.get(get_pattern_key(alphas, key), config.alpha),
            "target_name": key,
        }


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "LycorisConfig",
    "LycorisLayer",
    "LycorisTuner",
    "PeftConfig",
    "check_adapters_to_merge",
]
