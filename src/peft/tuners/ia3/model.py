"""The (IA)³ tuner (arXiv 2205.05638), and weighted sums of its adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.auxiliary import ModulesToSaveWrapper
from ...engine.layer import BaseTunerLayer
from ...engine.matching import match_target_against_key
from ...engine.tuner import BaseTuner
from ...engine.undo import Undo
from ...engine.weighted import check_sources, take_over, union_of
from ...import_utils import is_bnb_4bit_available, is_bnb_available
from ...utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from ...utils.modules import _freeze_adapter, _get_submodules
from ...utils.naming import check_adapter_name
from . import bnb
from .config import IA3Config
from .layer import Conv1d, Conv2d, Conv3d, Embedding, IA3Layer, Linear


def is_feedforward(feedforward_modules: str | Iterable[str], name: str) -> bool:
    """Whether the module of that name rescales its input, see `IA3Config.feedforward_modules`."""
    if isinstance(feedforward_modules, str):
        return match_target_against_key(feedforward_modules, name) is not None
    return name.endswith(tuple(feedforward_modules))


class IA3Model(BaseTuner):
    """Adapts a model by vectors that rescale activations.

    Args:
        model: the model to adapt.
        config: an `IA3Config`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device.
    """

    prefix: ClassVar[str] = "ia3_"
    tuner_layer_cls = IA3Layer
    target_module_mapping = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[IA3Layer]]] = {
        "linear": Linear,
        "conv1d_transformers": Linear,
        "embedding": Embedding,
        "conv1d": Conv1d,
        "conv2d": Conv2d,
        "conv3d": Conv3d,
    }
    quantized_layer_classes = bnb.LAYER_CLASSES
    unsupported_error = ValueError
    keeps_target_list = True
    """Feed-forward entries must stay among the targets, so a long list of these is not shortened."""

    def layer_options(self, config: IA3Config, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        return {"is_feedforward": is_feedforward(config.feedforward_modules, key), "target_name": key}

    def _prepare_adapter_config(self, peft_config: IA3Config, model_config: dict[str, Any]) -> IA3Config:
        """Fill in the targets, and which of them are feed-forward, that the method has for this type of model.

        Raises:
            ValueError: either is not given, and none known for the type.
        """
        super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.feedforward_modules is None:
            model_type = model_config.get("model_type")
            if model_type not in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING:
                raise ValueError(
                    f"feedforward_modules is not set, and IA3Config has no default for the model type {model_type!r}. "
                    "Name the targets that rescale their input, or pass [] if none does."
                )
            peft_config.feedforward_modules = set(TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model_type])
        return peft_config

    # ------------------------------------------------------------------------------------------------ weighted sums

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose vectors are weighted sums of those of others: l = Σ wᵢ·lᵢ.

        The sum is not normalised: weights that sum to 1 leave alone what no adapter changes. Where only some of the
        adapters have a vector, the sum is over these. The new adapter is frozen and not active; a module that one of
        the adapters trains in full (`modules_to_save`) is taken over from it.

        Args:
            adapters: the adapters to add up.
            weights: one number for each.
            adapter_name: the new adapter; if there is one of that name already, nothing is done.

        Raises:
            ValueError: an unknown adapter, another number of weights, adapters that rescale different sides of one
                module, that have copies of one module, or that select modules by lists and by regular expressions. The
                model is as it was.
        """
        if adapter_name in self.peft_config:
            return
        check_adapter_name(adapter_name)
        check_sources(self, adapters, weights)
        config = self._combined_config(adapters)
        self._check_sides(adapters, config)
        with Undo() as undo:
            undo.push(self.peft_config.pop, adapter_name, None)
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
        for _, holder in self.holders:
            if isinstance(holder, IA3Layer):
                _add_up(holder, adapters, weights, adapter_name)
            else:
                take_over(holder, adapters, adapter_name)

    def _combined_config(self, adapters: list[str]) -> IA3Config:
        configs = [self.peft_config[name] for name in adapters]
        saved = [name for config in configs for name in config.modules_to_save or ()]
        excludes = [config.exclude_modules for config in configs]
        return replace(
            configs[0],
            target_modules=union_of([config.target_modules for config in configs], "target_modules"),
            feedforward_modules=union_of([config.feedforward_modules for config in configs], "feedforward_modules"),
            # What is excluded for one adapter may be a target of another; where nobody has a vector, ones stay.
            exclude_modules=excludes[0] if all(entry == excludes[0] for entry in excludes) else None,
            modules_to_save=list(dict.fromkeys(saved)) or None,
        )

    def _check_sides(self, adapters: list[str], config: IA3Config) -> None:
        for label, layer in self.holders:
            if not isinstance(layer, IA3Layer):
                continue
            expected = is_feedforward(config.feedforward_modules, label)
            sides = {name: layer.feedforward[name] for name in adapters if name in layer.feedforward}
            if any(side != expected for side in sides.values()):
                words = {name: "input" if side else "output" for name, side in sides.items()}
                raise ValueError(
                    f"The adapters do not add up at {label!r}: their feedforward_modules together rescale its "
                    f"{'input' if expected else 'output'}, but each alone {words}."
                )


@torch.no_grad()
def _add_up(layer: IA3Layer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    held = [(layer.ia3_l[name], weight) for name, weight in zip(adapters, weights) if name in layer.ia3_l]
    if adapter_name in layer.ia3_l:
        # In the dtype of the sum, which may be wider than the base layer's.
        layer.ia3_l[adapter_name].data = (
            sum(vector * weight for vector, weight in held) if held else torch.ones_like(layer.ia3_l[adapter_name])
        )


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "Conv2d",
    "Conv3d",
    "IA3Layer",
    "IA3Model",
    "Linear",
    "ModulesToSaveWrapper",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    "_freeze_adapter",
    "_get_submodules",
    "is_bnb_4bit_available",
    "is_bnb_available",
]
