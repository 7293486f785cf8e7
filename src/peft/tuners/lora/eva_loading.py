"""Putting the components that EVA has found into an adapter, whose ranks they decide."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ...engine.lifecycle import holders_of
from ...engine.matching import maybe_condense
from ...engine.unloading import places_of
from ...utils.naming import near_misses
from ...utils.warning import PeftWarning
from .config import EvaConfig
from .initialisers import zero_b
from .layer import LoraLayer, ParamWrapper

if TYPE_CHECKING:
    from .config import LoraConfig


def check_components(components: dict[str, torch.Tensor], layers: dict[str, LoraLayer]) -> None:
    """Raise unless components fit the layers that they are for.

    Args:
        components: names in the base model -> (rank, in).
        layers: names in the base model -> layers.

    Raises:
        ValueError: none of the names is a layer's, or a shape is wrong.
    """
    unknown = sorted(components.keys() - layers.keys())
    if unknown:
        near = near_misses(unknown[0], layers)
        message = f"eva_state_dict has names that no layer has: {unknown}.{f' Nearest: {near}.' if near else ''}"
        if len(unknown) == len(components):
            raise ValueError(message)
        warnings.warn(message, PeftWarning)
    for name in components.keys() & layers.keys():
        shape = tuple(components[name].shape)
        if len(shape) != 2 or shape[1] != layers[name].in_features:
            raise ValueError(
                f"eva_state_dict has {name} of shape {shape}, expected (rank, {layers[name].in_features})."
            )


class ComponentLoading:
    """Puts components into the layers of one adapter, and writes down what has changed in its configuration."""

    def __init__(self, tuner: Any, adapter: str, config: LoraConfig) -> None:
        self.tuner, self.adapter, self.config = tuner, adapter, config

    def run(self, layers: dict[str, LoraLayer], components: dict[str, torch.Tensor]) -> None:
        ranks = {name: len(components[name]) for name in layers if name in components}
        kept = self._kept_layers(ranks)
        self._update_config(kept, ranks)
        missing = [name for name in kept if name not in components]
        if missing:
            warnings.warn(
                f"EVA found no components for {missing[:5]}{f' and {len(missing) - 5} others' if len(missing) > 5 else ''}; "
                "these start as with init_lora_weights=True.",
                PeftWarning,
            )
        for name, layer in kept.items():
            self._start(name, layer, components.get(name))
        self._leave([name for name, rank in ranks.items() if rank == 0])
        self.tuner.__dict__.pop("_holders", None)

    def _kept_layers(self, ranks: dict[str, int]) -> dict[str, LoraLayer]:
        return {
            name: layer
            for name, layer in holders_of(self.tuner.model)
            if isinstance(layer, LoraLayer) and self.adapter in layer.r and ranks.get(name) != 0
        }

    def _update_config(self, kept: dict[str, LoraLayer], ranks: dict[str, int]) -> None:
        config = self.config
        adjust = (config.eva_config or EvaConfig()).adjust_scaling_factors
        rank_pattern, alpha_pattern = {}, {}
        targets = {
            name for name, layer in kept.items() if not isinstance(layer, ParamWrapper) and ".base_layer." not in name
        }
        for name in kept:
            layer = kept[name]
            before, alpha = layer.r[self.adapter], layer.lora_alpha[self.adapter]
            rank = ranks.get(name, before)
            if adjust and rank != before:
                alpha = alpha * rank / before
            if rank != config.r:
                rank_pattern[name] = rank
            if alpha != config.lora_alpha:
                alpha_pattern[name] = alpha
        config.rank_pattern, config.alpha_pattern = rank_pattern, alpha_pattern
        if config.target_modules is not None:
            config.target_modules = targets
            maybe_condense(config, [name for name, _ in self.tuner.model.named_modules()])

    def _start(self, name: str, layer: LoraLayer, components: torch.Tensor | None) -> None:
        adapter = self.adapter
        dtypes = [parameter.dtype for _, _, _, parameter in layer.adapter_parameters([adapter])]
        fresh = any(parameter.is_meta for _, _, _, parameter in layer.adapter_parameters([adapter]))
        if fresh or (components is not None and len(components) != layer.r[adapter]):
            key = f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name
            layer.update_layer(
                adapter, config=self.config, **self.tuner.layer_options(self.config, adapter, key, layer)
            )
        if components is None:
            layer.reset_lora_parameters(adapter, True)
        else:
            layer.lora_A[adapter].weight.copy_(components)
            zero_b(layer, adapter)
        for dtype, (_, _, _, parameter) in zip(dtypes, layer.adapter_parameters([adapter])):
            parameter.data = parameter.data.to(dtype)

    def _leave(self, names: list[str]) -> None:
        """Take the adapter out of layers, and the layers out that hold no other."""
        places = places_of(self.tuner.model)
        for name in names:
            layer = self.tuner.model.get_submodule(name)
            # Not `delete_adapter`, which would make another adapter the active one.
            layer._drop(self.adapter)
            layer._forget_variant(self.adapter)
            layer.roster.leave(self.adapter, layer._label)
            layer.refresh()
            if not layer._get_available_adapters():
                for owner, child in places[id(layer)]:
                    owner._modules[child] = layer.base_layer
            if name in self.tuner.targeted_module_names:
                self.tuner.targeted_module_names.remove(name)
