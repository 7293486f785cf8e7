"""The tuner of a model that has adapters of several methods."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ...engine.auxiliary import ModulesToSaveWrapper
from ...engine.layer import BaseTunerLayer
from ...engine.lifecycle import as_names
from ...engine.operations import set_adapter as _set_adapter
from ...engine.tuner import BaseTuner
from ...engine.undo import Undo
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.modules import _get_submodules
from ...utils.peft_types import PeftType
from ...utils.registry import method
from ..lora.kasa import check_beside

COMPATIBLE_TUNER_TYPES = (
    PeftType.LORA,
    PeftType.LOHA,
    PeftType.LOKR,
    PeftType.ADALORA,
    PeftType.OFT,
    PeftType.SHIRA,
)
PREFIXES = ["lora_", "lokr_", "hada_", "oft_", "shira_"]


def check_can_be_mixed(config: Any) -> None:
    """Raise unless adapters of a configuration's method can be mixed with those of other methods.

    Raises:
        ValueError: they cannot.
    """
    if config.peft_type not in COMPATIBLE_TUNER_TYPES:
        raise ValueError(
            f"{getattr(config.peft_type, 'value', config.peft_type)} cannot be mixed with other methods; these can: "
            f"{', '.join(peft_type.value for peft_type in COMPATIBLE_TUNER_TYPES)}."
        )


class MixedModel(BaseTuner):
    """Injects adapters of several methods into one model.

    Each adapter is injected as its own method does it. A layer of one method can be the base layer of another's: what
    was injected first is innermost, and is applied and merged first, whatever the order of activation.

    Args:
        model: the model to adapt.
        config: the first adapter's configuration, or configurations by adapter name.
        adapter_name: the adapter to inject.
    """

    target_module_mapping: ClassVar[dict[str, Any]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super().__init__(model, config, adapter_name)
        self.active_adapter = as_names(self.active_adapter)

    def _tuner_for(self, config: Any) -> BaseTuner:
        """The tuner of one method around this model, which has injected nothing itself.

        Raises:
            ValueError: the method cannot be mixed with others.
        """
        check_can_be_mixed(config)
        tuner_cls = method(config.peft_type).model_cls
        tuner = tuner_cls.__new__(tuner_cls)
        nn.Module.__init__(tuner)
        tuner.model = self.model
        tuner.peft_config = {
            name: other for name, other in self.peft_config.items() if other.peft_type == config.peft_type
        }
        tuner.active_adapter = getattr(self, "active_adapter", [])
        return tuner

    # ---------------------------------------------------------------------------- what each method does in its own way

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._tuner_for(config)._pre_injection_hook(model, config, adapter_name)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self._tuner_for(config)._post_injection_hook(model, config, adapter_name)

    def _convert_adapter_config(self, peft_config: Any, model: nn.Module) -> None:
        self._tuner_for(peft_config)._convert_adapter_config(peft_config, model)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._tuner_for(peft_config)._prepare_model(peft_config, model)

    def _check_new_adapter_config(self, config: Any) -> None:
        bias = getattr(config, "bias", "none")
        if bias not in ("none", "all") and not bias.endswith("_only"):
            raise ValueError(f"bias={bias!r} is none of 'none', 'all' and '<method>_only'.")
        super()._check_new_adapter_config(config)
        check_beside(config, ((name, other) for name, other in self.peft_config.items() if other is not config))
        self._tuner_for(config)._check_new_adapter_config(config)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        self._tuner_for(peft_config)._check_target_module_compatiblity(peft_config, model, target_name)

    def _prepare_shared_state(self, config: Any, adapter_name: str, targets: dict[str, nn.Module], undo: Undo) -> None:
        self._tuner_for(config)._prepare_shared_state(config, adapter_name, targets, undo)

    def layer_options(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        plain = ".".join(part for part in key.split(".") if part != "base_layer")
        return self._tuner_for(config).layer_options(config, adapter_name, plain, target)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self._tuner_for(config)._create_and_replace(config, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Adapters cannot be merged into a GPTQ-quantised model.")

    # ----------------------------------------------------------------------------------------------------- life cycle

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones everywhere, and exactly their weights trainable.

        Args:
            adapter_name: one name or several.
            inference_mode: use them, but train nothing.

        Raises:
            ValueError: an unknown name, or adapters that exclude each other; nothing is changed.
        """
        super().set_adapter(as_names(adapter_name), inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove adapters with all their weights.

        Args:
            adapter_name: one name or several.

        Raises:
            ValueError: an unknown name, or an adapter that is merged into some layer; nothing is changed.
        """
        names = as_names(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"There are no adapters {unknown}; known are {sorted(self.peft_config)}.")
        merged = sorted({name for _, holder in self.holders for name in holder.merged_adapters} & set(names))
        if merged:
            raise ValueError(f"The adapters {merged} are merged and cannot be deleted. Call unmerge_adapter() first.")
        for name in dict.fromkeys(names):
            super().delete_adapter(name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate with the active adapters."""
        return self.model.generate(*args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: adapters of several methods have no common form to be added up in.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Adapters of a MixedModel are of several methods, which cannot be added up into one."
        )


__all__ = [
    "COMPATIBLE_TUNER_TYPES",
    "PREFIXES",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "MixedModel",
    "ModulesToSaveWrapper",
    "PeftType",
    "_get_submodules",
    "_set_adapter",
]
