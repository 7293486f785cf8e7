"""The LN tuning tuner (arXiv 2312.11420)."""

from __future__ import annotations

from typing import Any, ClassVar

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
        """The file's tensors by this adapter's names: those inside a copied container bear the name it was saved by."""
        names = {key: key for key in state}
        for path, layer in holders_of(model):
            if not isinstance(layer, LNTuningLayer):
                continue
            prefix = f"{path}.ln_tuning_layers."
            own = {entry.saved.removeprefix("ln_tuning_layers.") for entry in layer.state_entries(adapter_name)}
            nested = {name.partition(".")[2]: name for name in own if "." in name}
            for key in state:
                if nested and key.startswith(prefix) and key.removeprefix(prefix) not in own:
                    tail = key.removeprefix(prefix)
                    found = nested.get(tail) or nested.get(tail.partition(".")[2])
                    names[key] = prefix + found if found else key
        return {names[key]: value for key, value in state.items()}


__all__ = ["LNTuningModel"]
