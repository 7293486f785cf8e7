"""The adaption prompt's tuner (LLaMA-Adapter, arXiv 2303.16199)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.lifecycle import as_names, modules_of
from ...engine.state import AdapterState
from ...engine.tuner import BaseTuner
from ...engine.undo import Undo
from ...utils.field_types import check_numbers
from ...utils.naming import check_adapter_name, did_you_mean
from .config import TRANSFORMERS_MODEL_CONFIG, AdaptionPromptConfig, prepare_config
from .layer import AdaptedAttention, AdaptedAttentionGPT, _BaseAdaptedAttention
from .utils import is_adaption_prompt_trainable


class AdaptionPromptModel(BaseTuner):
    """Gives the last attention layers of a model a prompt each (arXiv 2303.16199).

    One adapter is used at a time; the modules' parameters are those of the active one.

    Args:
        model: the base model, in place.
        configs: an `AdaptionPromptConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device, to be loaded afterwards.

    Raises:
        ValueError: a type of model that the method does not know, fewer attention modules than asked for, an empty prompt.
        TypeError: `adapter_len` or `adapter_layers` is not given.
    """

    prefix: ClassVar[str] = "adaption_prompt_"
    tuner_layer_cls = _BaseAdaptedAttention

    def __init__(
        self,
        model: nn.Module,
        configs: AdaptionPromptConfig | dict[str, AdaptionPromptConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__(model, configs, adapter_name, low_cpu_mem_usage)

    # ---------------------------------------------------------------------------------------------------- which modules

    def _prepare_adapter_config(self, peft_config: AdaptionPromptConfig, model_config: dict[str, Any]) -> Any:
        return prepare_config(peft_config, self.model)

    def _prepare_model(self, peft_config: AdaptionPromptConfig, model: nn.Module) -> None:
        self._selected = frozenset(attention_modules(peft_config, model))

    def _check_target_module_exists(self, peft_config: AdaptionPromptConfig, key: str) -> bool:
        return key in self._selected

    def _create_and_replace(
        self,
        peft_config: AdaptionPromptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        inference = peft_config.inference_mode
        if isinstance(target, _BaseAdaptedAttention):
            target.update_layer(adapter_name, peft_config.adapter_len, inference_mode=inference)
            return
        model_type = self.model.config.model_type
        fused = TRANSFORMERS_MODEL_CONFIG[model_type].v_proj_layer is None
        cls = AdaptedAttentionGPT if fused else AdaptedAttention
        if not hasattr(target, cls.dtype_of):
            raise AttributeError(
                f"{current_key} cannot be adapted: an attention module of a {model_type} model has a {cls.dtype_of}, and "
                f"this {type(target).__name__} does not. target_modules={peft_config.target_modules!r} should be "
                f"{TRANSFORMERS_MODEL_CONFIG[model_type].target_modules!r}."
            )
        layer = cls(model_type, peft_config.adapter_len, target, adapter_name=adapter_name, inference_mode=inference)
        self._replace_module(parent, target_name, layer, target)

    # ------------------------------------------------------------------------------------------------------- life cycle

    def add_adapter(self, adapter_name: str, config: AdaptionPromptConfig) -> None:
        """Add an adapter; the active one stays active, the new one is frozen until it is set.

        Args:
            adapter_name: a new name.
            config: its configuration.

        Raises:
            ValueError: a name that is taken or not usable, or what the constructor raises; the model is then as it was.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already; delete it first or choose another name.")
        with Undo() as undo:
            undo.push(self.peft_config.pop, adapter_name, None)
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one, and exactly its weights trainable.

        Args:
            adapter_name: its name.
            inference_mode: use it, but train nothing.

        Raises:
            TypeError: several names; the prompts of one attention module exclude each other.
            ValueError: an unknown name; nothing is changed.
        """
        if len(as_names(adapter_name)) > 1:
            raise TypeError(
                f"Adaption prompts cannot be active together, got {adapter_name}: an attention module has one prompt at a "
                "time. Name one adapter."
            )
        super().set_adapter(adapter_name, inference_mode)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdaptionPromptConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor] | None,
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """An adapter's tensors by their names on disk, active or not."""
        return AdapterState(model, adapter_name).read(state_dict)


def attention_modules(config: AdaptionPromptConfig, model: nn.Module) -> list[str]:
    """The attention modules that a configuration selects: the last so many of those that go by its target's name.

    Args:
        config: its target is set.
        model: the base model, adapted already or not.

    Raises:
        ValueError: there are fewer, or one of the numbers makes no sense.
        TypeError: one of the numbers is missing.
    """
    check_numbers(config)
    for name, least in (("adapter_len", 1), ("adapter_layers", 0)):
        number = getattr(config, name)
        if not isinstance(number, int):
            raise TypeError(f"{name} of an adaption prompt must be a number, got {number!r}.")
        if number < least:
            raise ValueError(f"{name} of an adaption prompt must be at least {least}, got {number}.")
    target = config.target_modules
    names = [name for name, _ in modules_of(model) if name.endswith(f".{target}")]
    if not names or len(names) < config.adapter_layers:
        leaves = {name.rpartition(".")[2] for name, _ in modules_of(model)}
        raise ValueError(
            f"adapter_layers={config.adapter_layers} are more than the {len(names)} modules that {type(model).__name__} has "
            f"by the name {target!r}." + ("" if names else did_you_mean(str(target), leaves))
        )
    return names[-config.adapter_layers :]


__all__ = [
    "AdaptedAttention",
    "AdaptedAttentionGPT",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "is_adaption_prompt_trainable",
    "prepare_config",
]
