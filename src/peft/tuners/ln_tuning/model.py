"""The LN tuning tuner (arXiv 2312.11420)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from ...engine.lifecycle import holders_of
from ...engine.tuner import BaseTuner
from ...utils.constants import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
from .config import LNTuningConfig
from .layer import LNTuningLayer


class LNTuningModel(BaseTuner):
    """Adapts a model by training copies of its normalisation layers, or of any other modules.

    Args:
        model: the model to adapt.
        config: an `LNTuningConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: of no effect on the copies, which start with the values of the modules.
    """

    prefix: ClassVar[str] = "ln_tuning_"
    tuner_layer_cls = LNTuningLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[LNTuningLayer]]] = {"any": LNTuningLayer}

    def _create_and_replace(
        self,
        peft_config: LNTuningConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, LNTuningLayer):
            target.update_layer(target.base_layer, adapter_name, peft_config)
        else:
            new_module = self._create_new_module(peft_config, target, adapter_name)
            self._replace_module(parent, target_name, new_module, target)

    def _create_new_module(self, peft_config: LNTuningConfig, target: nn.Module, adapter_name: str) -> LNTuningLayer:
        return LNTuningLayer(target, adapter_name, peft_config)

    def _unloading_checks(self, adapter_names: list[str] | None) -> None:
        """Raise if the adapters that are to be merged for good have copies of one module.

        Raises:
            ValueError: naming module and adapters; nothing is changed.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        self.roster.check(names, extra=names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and not isinstance(adapter_names, str):
            self._unloading_checks(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @staticmethod
    def adapter_state_to_load(
        model: nn.Module, config: LNTuningConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The file's tensors by this adapter's names; inside a copied container a name has the adapter's in it."""
        names = {key: key for key in state}
        for path, layer in holders_of(model):
            if isinstance(layer, LNTuningLayer):
                names |= _names_inside(f"{path}.ln_tuning_layers.", layer, adapter_name, state)
        return {names[key]: value for key, value in state.items()}


def _names_inside(prefix: str, layer: LNTuningLayer, adapter_name: str, keys: Iterable[str]) -> dict[str, str]:
    """Names on disk of tensors inside a copied container, with whichever adapter's name or none -> with this one's."""
    saved = [entry.saved.removeprefix("ln_tuning_layers.") for entry in layer.state_entries(adapter_name)]
    inside = {name.partition(".")[2]: prefix + name for name in saved if "." in name}
    found = {}
    for key in keys:
        if inside and key.startswith(prefix):
            tail = key.removeprefix(prefix)
            found[key] = inside.get(tail) or inside.get(tail.partition(".")[2]) or key
    return found


__all__ = ["LNTuningModel"]
