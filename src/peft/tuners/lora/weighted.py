"""`add_weighted_adapter`: an adapter made out of several adapters of a model, by the mathematics in `combination`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...engine.undo import Undo
from ...engine.weighted import check_sources, take_over, union_of
from ...utils.naming import check_adapter_name, did_you_mean
from ...utils.tensors import is_spread
from .combination import (
    COMBINATION_TYPES,
    OPERATORS,
    UPDATE_OPERATORS,
    Operator,
    clamped,
    combined_factors,
    concatenated,
    decomposed,
    decomposed_product,
)
from .config import MUTATES_BASE, LoraConfig
from .kasa import wanted_rank
from .layer import LoraLayer
from .rank import by_rank, config_key, fill, groups_of, rank_of, with_rank
from .variant import LoraVariant

if TYPE_CHECKING:
    from .model import LoraModel

SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that narrow what `target_modules` selects."""


@dataclass
class WeightedAdapter:
    """What one call of `add_weighted_adapter` asks for; arguments as there."""

    tuner: LoraModel
    adapters: list[str]
    weights: list[float]
    adapter_name: str
    combination_type: str
    svd_rank: int | None
    svd_clamp: float | None
    svd_full_matrices: bool
    svd_driver: str | None
    density: float | None
    majority_sign_method: str

    def add(self) -> None:
        """Do it, whole or not at all."""
        self._check()
        tuner, config = self.tuner, self._config()
        replication, config.layer_replication = config.layer_replication, None  # the model is replicated already
        with Undo() as undo:
            undo.push(tuner.peft_config.pop, self.adapter_name, None)
            tuner.peft_config[self.adapter_name] = config
            tuner.inject_adapter(tuner.model, self.adapter_name)
            undo.push(tuner.delete_adapter, self.adapter_name)
            config.layer_replication = replication
            tuner._cast_adapter_dtype(self.adapter_name, self._has_float32())
            for _, holder in tuner.holders:
                if isinstance(holder, LoraLayer):
                    self._fill(holder)
                else:
                    take_over(holder, self.adapters, self.adapter_name)

    # ------------------------------------------------------------------------------------------- what can be combined

    @property
    def configs(self) -> list[LoraConfig]:
        return [self.tuner.peft_config[name] for name in self.adapters]

    @property
    def on_updates(self) -> bool:
        return self.combination_type in UPDATE_OPERATORS

    @property
    def operator(self) -> Operator:
        return (UPDATE_OPERATORS if self.on_updates else OPERATORS)[self.combination_type]

    def _check(self) -> None:
        check_adapter_name(self.adapter_name)
        check_sources(self.tuner, self.adapters, self.weights)
        known = COMBINATION_TYPES
        if self.combination_type not in known:
            hint = did_you_mean(str(self.combination_type), known)
            raise ValueError(f"combination_type={self.combination_type!r} is none of {', '.join(known)}.{hint}")
        if len(self.adapters) == 1 and not (self.on_updates and self.svd_rank is not None):
            self.combination_type = "linear"
        for name, config in zip(self.adapters, self.configs):
            if config.target_parameters:
                raise ValueError(
                    f"The adapter {name!r} adapts bare parameters (target_parameters={config.target_parameters}), which "
                    "cannot be combined."
                )
        self._check_options()
        self._check_whole()
        self._check_variants()
        self._check_rank()

    def _check_options(self) -> None:
        takes = () if self.combination_type == "cat" else self.operator.options
        if "density" in takes:
            if self.density is None:
                raise TypeError(
                    f"combination_type={self.combination_type!r} needs a density, the share of entries to keep."
                )
            if not self.density >= 0:
                raise ValueError(
                    f"The density is the share of entries to keep and lies in [0, 1], got {self.density}."
                )
        methods = ("total", "frequency")
        if "majority_sign_method" in takes and self.majority_sign_method not in methods:
            hint = did_you_mean(str(self.majority_sign_method), methods)
            raise RuntimeError(f"majority_sign_method={self.majority_sign_method!r} is none of {methods}.{hint}")
        if self.on_updates and self.svd_clamp is not None and not 0 < self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp is a share of entries and lies in (0, 1], got {self.svd_clamp}.")

    def _check_whole(self) -> None:
        """Raise if a layer has only this rank's part of an adapter that is to be decomposed."""
        for label, layer in self._layers():
            if self.on_updates and (layer.kind is None or is_spread(layer.factors(self._sources(layer)[0][0])[0])):
                raise ValueError(
                    f"combination_type={self.combination_type!r} needs whole updates, but each rank has a part of those of "
                    f"{label!r}. Use 'cat', or 'linear' for adapters of one rank."
                )

    def _check_variants(self) -> None:
        """Raise unless what the adapters compute can be combined in this way.

        Raises:
            ValueError: an adapter acts on activations in a way of its own, or its factors have another form.
        """
        if any(config.arrow_config for config in self.configs):
            self._refuse("arrow_config", "an Arrow router has no update of its own")
        if self._differ("alora_invocation_tokens"):
            self._refuse("alora_invocation_tokens", "all must be invoked by the same tokens")
        if any(config.kasa_config for config in self.configs) and not self.on_updates:
            self._refuse("kasa_config", "the factors of KaSA do not add up; use a combination_type with svd")
        if not self.on_updates and self._differ("use_bdlora"):
            self._refuse("use_bdlora", "factors of other blocks do not add up; use a combination_type with svd")
        if self.combination_type == "cat" and any(config.use_bdlora for config in self.configs):
            self._refuse(
                "use_bdlora", "block-diagonal factors cannot be put side by side; use another combination_type"
            )
        if any(config.use_dora for config in self.configs) and any(config.lora_bias for config in self.configs):
            self._refuse("use_dora", "an adapter with lora_bias cannot be combined with one with use_dora")

    def _differ(self, field_name: str) -> bool:
        first, *others = (getattr(config, field_name) for config in self.configs)
        return any(other != first for other in others)

    def _refuse(self, field_name: str, reason: str) -> None:
        values = {name: getattr(config, field_name) for name, config in zip(self.adapters, self.configs)}
        raise ValueError(
            f"The adapters {list(values)} cannot be combined by {self.combination_type!r}: {reason}. Their {field_name}: "
            f"{values}."
        )

    # ---------------------------------------------------------------------------------------------------------- the rank

    @property
    def ranks(self) -> list[int]:
        """The largest rank that each adapter has on a layer."""
        return [max([config.r, *(config.rank_pattern or {}).values()]) for config in self.configs]

    @property
    def rank(self) -> int:
        if self.combination_type == "cat":
            return sum(self.ranks)
        return self.svd_rank if self.on_updates and self.svd_rank is not None else max(self.ranks)

    def _check_rank(self) -> None:
        ranks = dict(zip(self.adapters, self.ranks))
        if self.combination_type in OPERATORS and len(set(ranks.values())) > 1:
            raise ValueError(
                f"combination_type={self.combination_type!r} needs adapters of one rank, got {ranks}. Use 'cat', or one "
                "with svd."
            )
        if any(config.kasa_config for config in self.configs):
            self._check_kasa_rank()
        if not self.on_updates or self.svd_rank is None:
            return
        if self.svd_rank < 1:
            raise ValueError(f"svd_rank must be positive, got {self.svd_rank}.")
        for label, layer in self._layers():
            groups, out, inner = _matrix_shape(layer)
            highest = min(out, inner) * groups
            if self.svd_rank > highest or self.svd_rank % groups:
                wanted = f"at most {highest}" + (f" and a multiple of {groups}" if groups > 1 else "")
                raise ValueError(f"svd_rank={self.svd_rank} does not fit {label!r}: there it must be {wanted}.")

    def _check_kasa_rank(self) -> None:
        # As many components as the largest rank are out of the base weight; loading the combination takes out its rank.
        found = {wanted_rank(layer) for _, layer in self._layers()}
        if found != {self.rank}:
            raise ValueError(
                f"KaSA adapters combine to an adapter of their largest rank, which has taken as much out of the base weight: "
                f"that is {' or '.join(map(str, sorted(found)))}, the combination's is {self.rank}. Pass svd_rank, or combine "
                "adapters of one rank on all layers."
            )

    def _layers(self) -> Iterator[tuple[str, LoraLayer]]:
        for label, layer in self.tuner.holders:
            if isinstance(layer, LoraLayer) and any(name in layer.r for name in self.adapters):
                yield label, layer

    # --------------------------------------------------------------------------------------------------------- the config

    def _config(self) -> LoraConfig:
        """The first adapter's configuration, made to select what any of them adapts, with scaling 1 everywhere."""
        configs = self.configs
        config = copy.deepcopy(configs[0])
        config.r = config.lora_alpha = self.rank
        config.rank_pattern, config.alpha_pattern = {}, {}
        config.use_rslora = False
        config.use_dora = any(other.use_dora for other in configs)
        config.lora_bias = any(other.lora_bias for other in configs)
        if self.on_updates:
            config.use_bdlora = None  # what comes out of a decomposition has no blocks
        self._set_start(config)
        self._set_selection(config)
        saved = [name for other in configs for name in other.modules_to_save or ()]
        config.modules_to_save = list(dict.fromkeys(saved)) or None
        tokens = (other.trainable_token_indices for other in configs)
        config.trainable_token_indices = next((found for found in tokens if found is not None), None)
        return config

    def _set_start(self, config: LoraConfig) -> None:
        """An ordinary start instead of one that would change the base weight again, or freeze a factor."""
        changed = [
            name
            for name, other in zip(self.adapters, self.configs)
            if isinstance(other.init_lora_weights, str) and other.init_lora_weights.startswith(MUTATES_BASE)
        ]
        if changed:
            warnings.warn(
                f"The start of the adapters {changed} has changed the base weights. The combination {self.adapter_name!r} "
                "is right for this model as it is; to load it into the original model, save the adapters as ordinary ones "
                "first (path_initial_model_for_weight_conversion) and combine these."
            )
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith((*MUTATES_BASE, "mica")):
            config.init_lora_weights = True
            config.corda_config = config.lora_ga_config = None
            config.loftq_config = {}

    def _set_selection(self, config: LoraConfig) -> None:
        targets = []
        for name, other in zip(self.adapters, self.configs):
            if not isinstance(other.target_modules, (str, set, frozenset, list, tuple)):
                raise TypeError(
                    f"target_modules of the adapter {name!r} must be a string or a collection of names, got "
                    f"{type(other.target_modules).__name__}."
                )
            targets.append(other.target_modules)
        config.target_modules = union_of(targets, "target_modules")
        if any(self._differ(field_name) for field_name in SELECTION):
            # No common form but the modules themselves.
            config.target_modules = {config_key(layer) for _, layer in self._layers()}
            config.exclude_modules = config.layers_to_transform = config.layers_pattern = None

    # --------------------------------------------------------------------------------------------------------- the tensors

    def _has_float32(self) -> bool:
        return any(
            parameter.dtype == torch.float32
            for _, layer in self._layers()
            for _, _, _, parameter in layer.adapter_parameters(self.adapters)
        )

    @torch.no_grad()
    def _fill(self, layer: LoraLayer) -> None:
        """Give the new adapter its tensors on one layer."""
        name = self.adapter_name
        if name not in layer.r:
            return
        A, B = layer.factors(name)
        if self._sources(layer):
            value_A, value_B = self._decomposed(layer) if self.on_updates else self._combined(layer)
            fill(layer, "A", A.data, value_A.reshape(-1, *A.shape[1:]))
            fill(layer, "B", B.data, value_B.reshape(len(B), -1, *B.shape[2:]))
        else:
            A.zero_()
            B.zero_()
        if name in getattr(layer, "lora_diag", ()):
            layer.lora_diag[name].fill_(1)
        if layer.lora_bias[name]:
            layer.lora_B[name].bias.copy_(self._combined_bias(layer))
        if name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].weight.copy_(self._combined_magnitude(layer))

    def _sources(self, layer: LoraLayer) -> list[tuple[str, float]]:
        """The adapters that a layer holds, with their weights."""
        return [(name, weight) for name, weight in zip(self.adapters, self.weights) if name in layer.r]

    @property
    def _options(self) -> dict[str, Any]:
        return {"density": self.density, "majority_sign_method": self.majority_sign_method}

    def _combined(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """A (groups, r / groups, ...) and B (out, r / groups, ...) by a type that acts on factors."""
        sources = self._sources(layer)
        coefficients = [weight * float(layer.scaling[name]) for name, weight in sources]
        A, B = zip(*(_by_rank(layer, name) for name, _ in sources))
        if self.combination_type == "cat":
            return concatenated(A, B, coefficients)
        return combined_factors(self.operator, _of_one_rank(A), _of_one_rank(B), coefficients, **self._options)

    def _decomposed(self, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """A (groups, r / groups, in) and B (groups, out / groups, r / groups) by a type that acts on updates."""
        groups, out, inner = _matrix_shape(layer)
        rank = min(self.rank // groups, out, inner)
        A, B = self._decomposed_sum(layer, rank) or self._decomposed_update(layer, rank)
        return (A, B) if self.svd_clamp is None else clamped(A, B, self.svd_clamp)

    def _decomposed_sum(self, layer: LoraLayer, rank: int) -> tuple[Tensor, Tensor] | None:
        """From the factors alone; None where they do not say all, or are no smaller than their product."""
        sources = self._sources(layer)
        if self.combination_type != "svd" or not all(_is_product(layer, name) for name, _ in sources):
            return None
        A, B = zip(*(_matrices(layer, name) for name, _ in sources))
        A, B = torch.cat(A, dim=-2), torch.cat([weight * b for (_, weight), b in zip(sources, B)], dim=-1)
        return decomposed_product(B, A, rank) if rank <= A.shape[-2] < min(B.shape[-2], A.shape[-1]) else None

    def _decomposed_update(self, layer: LoraLayer, rank: int) -> tuple[Tensor, Tensor]:
        names, weights = zip(*self._sources(layer))
        update = self.operator([_update(layer, name) for name in names], weights, **self._options)
        return decomposed(update, rank, self.svd_full_matrices, self.svd_driver)

    def _combined_bias(self, layer: LoraLayer) -> Tensor:
        """The same operator on the biases, each with its scaling in it."""
        sources = [(name, weight) for name, weight in self._sources(layer) if layer.lora_bias[name]]
        if not sources:
            return torch.zeros_like(layer.lora_B[self.adapter_name].bias)
        biases = [float(layer.scaling[name]) * layer.lora_B[name].bias.float() for name, _ in sources]
        operator = OPERATORS["linear"] if self.combination_type == "cat" else self.operator
        return operator(biases, [weight for _, weight in sources], **self._options)

    def _combined_magnitude(self, layer: LoraLayer) -> Tensor:
        """DoRA's magnitudes: the base weight's norms with the weighted changes of all adapters, as m = ‖W‖ + Σ wᵢ·(mᵢ - ‖W‖).

        An adapter without magnitudes has the norms of its own W + ΔW.
        """
        magnitudes, weight = layer.lora_magnitude_vector, layer.unmerged_weight()
        norms = magnitudes[self.adapter_name].fresh_norm
        base = norms(weight, *layer.factors(self.adapter_name), 0.0)
        result = base
        for name, share in self._sources(layer):
            own = magnitudes[name].weight if name in magnitudes else None
            own = norms(weight, *layer.factors(name), layer.scaling[name]) if own is None else own
            result = result + share * (own - base)
        return result


# ---------------------------------------------------------------------------------------------- one adapter of one layer


def _by_rank(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (groups, r / groups, ...) and B (out, r / groups, ...) in float32, without what they are padded by."""
    views = []
    for key, factor in zip("AB", layer.factors(adapter)):
        if rank_of(layer, key, factor) > layer.r[adapter]:
            factor = with_rank(layer, key, factor, layer.r[adapter])
        views.append(by_rank(layer, key, factor.detach().float()))
    return views[0], views[1]


def _matrices(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A (groups, r / groups, in) and B (groups, out / groups, r / groups), whose product is ΔW; the scaling is in B."""
    A, B = _by_rank(layer, adapter)
    return A.flatten(2), float(layer.scaling[adapter]) * B.flatten(1).unflatten(0, (groups_of(layer), -1))


def _is_product(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter's ΔW is s·B·A."""
    variant = layer.lora_variant.get(adapter)
    return variant is None or type(variant).delta_weight is LoraVariant.delta_weight


def _update(layer: LoraLayer, adapter: str) -> Tensor:
    """ΔW as (groups, out / groups, in) in float32."""
    if _is_product(layer, adapter):
        A, B = _matrices(layer, adapter)
        return B @ A
    return layer.delta_weight(adapter).detach().float().flatten(1).unsqueeze(0)


def _matrix_shape(layer: LoraLayer) -> tuple[int, int, int]:
    """Groups, and the sizes of one group's ΔW as a matrix; A sees all input channels."""
    groups = groups_of(layer)
    out, *rest = layer.kind.shape(layer.get_base_layer())
    return groups, out // groups, math.prod(rest) * groups


def _of_one_rank(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors padded by zeros to the largest of their ranks (dimension 1)."""
    rank = max(factor.shape[1] for factor in factors)
    return [
        torch.cat([factor, factor.new_zeros(factor.shape[0], rank - factor.shape[1], *factor.shape[2:])], dim=1)
        for factor in factors
    ]
