"""`PeftMixedModel`: a model with adapters of several methods at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils.hub import PushToHubMixin

from .adapter_files import AdapterFiles, may_defer
from .config import PeftConfig
from .engine.additional import _set_trainable, set_additional_trainable_modules
from .engine.layer import deferred_parameters
from .engine.operations import set_adapter as _set_adapter
from .engine.undo import Undo
from .peft_model import PeftModel, warn_about_prefix
from .tuners.mixed.model import MixedModel, check_can_be_mixed
from .utils.constants import DUMMY_MODEL_CONFIG
from .utils.forwarding import ForwardsAttributes
from .utils.naming import check_adapter_name
from .utils.training import may_use_checkpointing, require_input_grads


def _prepare_model_for_gradient_checkpointing(model: nn.Module) -> nn.Module:
    """Let gradients reach the adapters through checkpointed segments whose own inputs need none."""
    if not any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
        require_input_grads(model)
    return model


class PeftMixedModel(PushToHubMixin, ForwardsAttributes, nn.Module):
    """A base model with adapters of several methods, for inference with combinations of them.

    Adapters are injected around each other in the order in which they come; see `MixedModel`. Attributes that the
    wrapper does not have are the tuner's, then the base model's.

    Args:
        model: the base model; it is changed in place.
        peft_config: the first adapter's configuration.
        adapter_name: the first adapter's name.

    Raises:
        ValueError: the method cannot be mixed with others.
    """

    forwards_to = "base_model"
    is_mixed = True
    _is_prompt_learning = False

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default") -> None:
        super().__init__()
        check_adapter_name(adapter_name)
        self._check_new_adapter_config(peft_config, is_trainable=not peft_config.inference_mode)
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name)
        self.base_model._cast_adapter_dtype(adapter_name)
        self.config = getattr(model, "config", dict(DUMMY_MODEL_CONFIG))
        if may_use_checkpointing(model):
            _prepare_model_for_gradient_checkpointing(model)
        if hasattr(self.config, "pretraining_tp"):
            # Sliced linear layers would go around the adapters.
            self.config.pretraining_tp = 1

    # --------------------------------------------------------------------------------------------------- what it holds

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    modules_to_save = PeftModel.modules_to_save
    get_nb_trainable_parameters = PeftModel.get_nb_trainable_parameters
    print_trainable_parameters = PeftModel.print_trainable_parameters

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return PeftModel._split_kwargs(kwargs)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        """Raise unless adapters of this method can be mixed with others.

        Raises:
            ValueError: they cannot.
        """
        check_can_be_mixed(peft_config)

    # ------------------------------------------------------------------------------------------------------ life cycle

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; the active ones stay active, the new one is frozen until it is set.

        Args:
            adapter_name: a new name.
            peft_config: of any method that can be mixed with others.
            low_cpu_mem_usage: make the parameters on the meta device, to be loaded afterwards.
            autocast_adapter_dtype: keep half-precision adapter weights in float32.

        Raises:
            ValueError: a name that is taken or not usable, a method that cannot be mixed, or what injection raises.
                The model is then as it was.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already; delete it first or choose another name.")
        self._check_new_adapter_config(peft_config, is_trainable=not peft_config.inference_mode)
        warn_about_prefix(peft_config, adapter_name)
        with Undo() as undo:
            undo.push(self.peft_config.pop, adapter_name, None)
            self.peft_config[adapter_name] = peft_config
            with deferred_parameters(low_cpu_mem_usage):
                self.base_model.inject_adapter(
                    self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
                )
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Wrap the modules that a configuration wants trained as a whole; `add_adapter` has done so already.

        Args:
            peft_config: the adapter's configuration.
            adapter_name: an adapter of this model.
        """
        base = self.base_model.model
        active = adapter_name in self.active_adapters
        set_additional_trainable_modules(base, peft_config, MixedModel.get_model_config(base), adapter_name, active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, and exactly their weights trainable.

        Args:
            adapter_name: one name or several.
            inference_mode: use them, but train nothing.

        Raises:
            ValueError: an unknown name, or adapters that exclude each other; nothing is changed.
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove adapters with all their weights.

        Args:
            adapter_name: one name or several.

        Raises:
            ValueError: an unknown name, or an adapter that is merged into some layer; nothing is changed.
        """
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the base model is used alone; the state before is restored, also after an exception."""
        was_enabled = any(not holder.disable_adapters for _, holder in self.base_model.holders)
        if was_enabled:
            self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if was_enabled:
                self.base_model.enable_adapter_layers()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate with the active adapters."""
        return self.base_model.generate(*args, **kwargs)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Fold the active adapters into the base weights for good, innermost first, and give back the plain model.

        Args:
            args: as `BaseTuner.merge_and_unload`.
            kwargs: the same.
        """
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Take all adapters out and give back the base model as it was."""
        return self.base_model.unload(*args, **kwargs)

    def get_layer_status(self) -> None:
        """Not supported: a report is about one method.

        Raises:
            TypeError: always.
        """
        raise TypeError("A PeftMixedModel mixes methods and has no status of its layers.")

    def get_model_status(self) -> None:
        """Not supported: a report is about one method.

        Raises:
            TypeError: always.
        """
        raise TypeError("A PeftMixedModel mixes methods and has no status of one.")

    # ----------------------------------------------------------------------------------------------------------- files

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter, as a new one that stays inactive, or into the one of that name.

        Args:
            model_id: folder or repository of the adapter.
            adapter_name: the name to give it; if it exists, its weights are replaced.
            args: as `PeftModel.load_adapter`.
            kwargs: the same.

        Returns:
            torch's incompatible keys, limited to this adapter.

        Raises:
            ValueError: no such adapter, or it does not fit; the model is as it was.
        """
        return PeftModel.load_adapter(self, model_id, adapter_name, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> PeftMixedModel:
        """Wrap a model with a saved adapter, to which adapters of other methods can be added.

        Args:
            model: the base model; it is changed in place.
            model_id: folder or repository of the adapter.
            adapter_name: the name to give it.
            is_trainable: go on training it; otherwise it is frozen and the model in eval mode.
            config: use this configuration instead of the saved one.
            kwargs: as `PeftModel.load_adapter`.

        Raises:
            ValueError: no such adapter, it does not fit, or its method cannot be mixed with others; the model is as it
                was.
        """
        config = AdapterFiles.of_source(model_id, kwargs).read_config(config)
        AdapterFiles.prepare_config(config, is_trainable, kwargs.get("ephemeral_gpu_offload", False))
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with Undo() as undo:
            with deferred_parameters(may_defer(config)):
                wrapped = cls(model, config, adapter_name)
            undo.push(_unwrap, wrapped, trainable)
            wrapped.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        return wrapped

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = False,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Not supported: save each adapter from a `PeftModel` of its method.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A PeftMixedModel cannot be saved; save each adapter from a PeftModel of its method."
        )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Not supported, as saving.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("A PeftMixedModel cannot be saved, so there is no model card for it.")


def _unwrap(model: PeftMixedModel, trainable: list[nn.Parameter]) -> None:
    model.unload()
    for parameter in trainable:
        parameter.requires_grad_(True)


__all__ = [
    "DUMMY_MODEL_CONFIG",
    "MixedModel",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "_prepare_model_for_gradient_checkpointing",
    "_set_adapter",
    "_set_trainable",
]
