"""`PeftModel`: a model with its adapters as one object that trains, switches, saves and loads them."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import PushToHubMixin

from .adapter_files import AdapterFiles, split_hub_kwargs
from .config import PeftConfig
from .engine.auxiliary import AuxiliaryTrainingWrapper
from .engine.checkpoint import (
    get_peft_model_state_dict,
    load_adapter_state,
    load_peft_weights,
    set_peft_model_state_dict,
)
from .engine.layer import BaseTunerLayer, deferred_parameters
from .engine.lifecycle import AdapterHolder, as_names, holders_of
from .engine.loading import finish_loading
from .engine.operations import cast_adapter_dtype
from .engine.sharding import reshard
from .engine.status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from .engine.tuner import BaseTuner
from .engine.undo import Undo
from .prompt_learning import PromptLearning
from .utils.constants import DUMMY_MODEL_CONFIG, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .utils.forwarding import ForwardsAttributes
from .utils.naming import check_adapter_name, did_you_mean
from .utils.peft_types import PeftType, TaskType
from .utils.registry import method
from .utils.training import also_requiring_input_grads, may_use_checkpointing, require_input_grads


def warn_about_prefix(config: PeftConfig, adapter_name: str) -> None:
    """Warn if an adapter's name is part of what its parameters' names start with."""
    prefix = method(config.peft_type).prefix
    if adapter_name in prefix and not config.is_prompt_learning:  # whose parameters' names have no prefix
        warnings.warn(
            f"The adapter name {adapter_name!r} is part of the prefix {prefix!r} of its parameters' names; tools that look "
            "for it in these names will find it everywhere. Choose another one."
        )


TUNER_METHODS_ON_WEIGHTS = frozenset({"merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"})
GETTERS_OF_LAYERS = frozenset({"get_input_embeddings", "get_output_embeddings"})


def _layer_in_use(getter: Callable[[], nn.Module | None]) -> nn.Module | None:
    """The layer that a base model's getter gives; of one that adapters copy or train rows of, what is in the wrapper.

    Such a wrapper's own `weight` is that of the active adapter. But clients compare the weights of the two layers, to
    see whether these are tied, and refuse whatever they take for an adapter in the output layer.
    """
    layer = getter()
    return layer.module_in_use() if isinstance(layer, AuxiliaryTrainingWrapper) else layer


class PeftModel(PushToHubMixin, ForwardsAttributes, nn.Module):
    """A base model with adapters of one method.

    Attributes that the wrapper does not have are the tuner's, then the base model's.

    Args:
        model: the base model; it is changed in place.
        peft_config: the first adapter's configuration.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: keep half-precision adapter weights in float32.
        low_cpu_mem_usage: make the adapter's parameters on the meta device, to be loaded afterwards.
    """

    forwards_to = "base_model"

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        check_adapter_name(adapter_name)
        self.active_adapter = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = peft_config.is_prompt_learning
        self._adapters_disabled = False
        self._peft_config: dict[str, PeftConfig] | None = None
        if self._is_prompt_learning:
            self._peft_config = {}
            self.base_model = model
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        else:
            tuner_cls = method(peft_config.peft_type).model_cls
            with deferred_parameters(low_cpu_mem_usage):
                self.base_model = tuner_cls(model, {adapter_name: peft_config}, adapter_name)
            self.special_peft_forward_args |= set(self.base_model.special_forward_args)
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if may_use_checkpointing(model):
            self.prepare_model_for_gradient_checkpointing(model)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            # Sliced linear layers would go around the adapters.
            model.config.pretraining_tp = 1

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        if hasattr(self.base_model, "_cast_adapter_dtype"):
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    # ------------------------------------------------------------------------------------------------------ what it holds

    @property
    def prompts(self) -> PromptLearning:
        """What prompt learning does with this model."""
        return PromptLearning(self)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self._peft_config if self._is_prompt_learning else self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        if self._is_prompt_learning:
            self._peft_config = value
        else:
            self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        names = getattr(self.base_model, "active_adapters", None)
        return names if isinstance(names, list) else as_names(self.active_adapter)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        if self._is_prompt_learning:
            return not self._adapters_disabled
        return not self._adapters_disabled or not self.active_adapters

    def __getattr__(self, name: str) -> Any:
        if name in TUNER_METHODS_ON_WEIGHTS:  # of FSDP2's root, which the tuner cannot see
            reshard(self)
        found = super().__getattr__(name)
        if name == "gradient_checkpointing_enable":
            return also_requiring_input_grads(found, self.get_base_model())
        return functools.partial(_layer_in_use, found) if name in GETTERS_OF_LAYERS else found

    def get_base_model(self) -> nn.Module:
        """The wrapped model, with the adapter layers in it."""
        return self.base_model if self._is_prompt_learning else self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print one line with these numbers."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The adapters of each layer; see `peft.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The adapters of the model in sum; see `peft.get_model_status`."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be turned into a LoRA adapter."""
        tuner = self.base_model
        return isinstance(tuner, BaseTuner) and tuner.supports_lora_conversion(adapter_name)

    def _config_of(self, adapter_name: str) -> PeftConfig:
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"Name one adapter, got {adapter_name!r}; for several at once use model.base_model.set_adapter([...])."
            )
        if adapter_name not in self.peft_config:
            known = sorted(self.peft_config)
            raise ValueError(
                f"There is no adapter {adapter_name!r}; known are {known}.{did_you_mean(adapter_name, known)}"
            )
        return self.peft_config[adapter_name]

    # --------------------------------------------------------------------------------------------------------- life cycle

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; the active one stays active, the new one is frozen until it is set.

        Args:
            adapter_name: a new name.
            peft_config: of the method that the model has already.
            low_cpu_mem_usage: make the parameters on the meta device, to be loaded afterwards.
            autocast_adapter_dtype: keep half-precision adapter weights in float32.

        Raises:
            ValueError: a name that is taken or not usable, another method, or what injection raises. The model is then
                as it was.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already; delete it first or choose another name.")
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                f"All adapters of a PeftModel are of one method: expected {self.peft_type.value}, got "
                f"{getattr(peft_config.peft_type, 'value', peft_config.peft_type)}. Use get_peft_model(..., mixed=True) to mix."
            )
        warn_about_prefix(peft_config, adapter_name)
        reshard(self)
        with Undo() as undo:
            undo.push(self.peft_config.pop, adapter_name, None)
            self.peft_config[adapter_name] = peft_config
            if self._is_prompt_learning:
                self.prompts.add(adapter_name, peft_config, undo)
            else:
                with deferred_parameters(low_cpu_mem_usage):
                    self.base_model.inject_adapter(
                        self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
                    )
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, and exactly its weights trainable.

        Args:
            adapter_name: its name.
            inference_mode: use it, but train nothing.

        Raises:
            ValueError: an unknown name; nothing is changed.
            TypeError: several names; `model.base_model.set_adapter` takes these.
        """
        self._config_of(adapter_name)
        reshard(self)
        if self._is_prompt_learning:
            self.prompts.activate(adapter_name, inference_mode)
        else:
            self.base_model.set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with all its weights.

        Raises:
            ValueError: an unknown name, or it is merged into some layer.
        """
        self._config_of(adapter_name)
        reshard(self)
        if self._is_prompt_learning:
            self.prompts.delete(adapter_name)
            return
        self.base_model.delete_adapter(adapter_name)
        if len(self.base_model.active_adapters) == 1:
            self.active_adapter = self.base_model.active_adapters[0]

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Set by hand whether the weights of adapters require grad.

        Raises:
            TypeError: prompt learning.
        """
        if self._is_prompt_learning:
            raise TypeError("set_requires_grad is for adapters in layers, not for prompt learning.")
        reshard(self)
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the base model is used alone; the state before is restored, also after an exception."""
        reshard(self)
        if self._is_prompt_learning:
            with self.prompts.disabled():
                yield
            return
        was_disabled, self._adapters_disabled = self._adapters_disabled, True
        enabled = [holder for _, holder in self.base_model.holders if not holder.disable_adapters]
        if enabled and len(enabled) < len(self.base_model.holders):
            warnings.warn("Some adapter layers are disabled already and stay so afterwards.")
        if enabled:
            self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self._adapters_disabled = was_disabled
            reshard(self)
            if len(enabled) == len(self.base_model.holders):
                self.base_model.enable_adapter_layers()
            else:
                for holder in enabled:
                    holder.enable_adapters(True)

    # ------------------------------------------------------------------------------------------------------------ forward

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        hooks = getattr(self.base_model, "_enable_peft_forward_hooks", None)
        return nullcontext() if hooks is None or self._adapters_disabled else hooks(*args, **kwargs)

    def _without_special(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the active adapters.

        Args:
            args: the base model's arguments.
            kwargs: the same; `adapter_names`, one name per row, makes it a mixed batch.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._without_special(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate with the active adapters; arguments as `forward`."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.base_model.generate(*args, **self._without_special(kwargs))

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """The active prompt for a batch: embeddings (batch, tokens, width), or a cache of keys and values."""
        return self.prompts.prompt(batch_size, task_ids=task_ids, max_cache_len=max_cache_len)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt of an adapter as it is saved: (tokens, width), on the CPU."""
        return self.prompts.embedding_to_save(adapter_name)

    def prompt_encoder_state(self, adapter_name: str, state_dict: dict[str, Any] | None) -> dict[str, torch.Tensor]:
        """A prompt's tensors by their names on disk."""
        return self.prompts.state(adapter_name, state_dict)

    def load_prompt_encoder_state(self, adapter_name: str, state: dict[str, torch.Tensor], **options: Any) -> Any:
        """Load a prompt's tensors."""
        return self.prompts.load_state(adapter_name, state, **options)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients reach the adapters through checkpointed segments whose own inputs need none."""
        quantized = any(
            getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        )
        if not quantized:
            require_input_grads(model)
        return model

    _prepare_model_for_gradient_checkpointing = prepare_model_for_gradient_checkpointing

    # -------------------------------------------------------------------------------------------------------------- files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters: weights and configuration each, and a model card.

        Args:
            save_directory: the adapter "default" goes here, others to folders of their names inside.
            safe_serialization: safetensors; torch's format otherwise.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: whether embeddings are saved too; "auto" if they are targeted or were resized.
            is_main_process: whether this process writes.
            path_initial_model_for_weight_conversion: the adapter as it was initialised, to save one whose start changed
                the base weight as an ordinary one.
            kwargs: `state_dict`, to take the values from.

        Raises:
            ValueError: the path is a file, or an adapter is unknown; nothing is written.
        """
        AdapterFiles(self).save(
            save_directory,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            state_dict=kwargs.get("state_dict"),
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Wrap a model with a saved adapter.

        Args:
            model: the base model; it is changed in place.
            model_id: folder or repository of the adapter.
            adapter_name: the name to give it.
            is_trainable: go on training it; otherwise it is frozen and the model in eval mode.
            config: use this configuration instead of the saved one.
            autocast_adapter_dtype: keep half-precision adapter weights in float32.
            ephemeral_gpu_offload: compute initial norms on an accelerator.
            low_cpu_mem_usage: of no effect on the result; weights are never initialised before they are loaded.
            key_mapping: regular expression -> replacement for names in the file.
            kwargs: `subfolder`, `revision`, `token` and others of the hub client; device-map options.

        Raises:
            ValueError: no such adapter, or it cannot be trained on; the model is as it was.
        """
        files = AdapterFiles.of_source(model_id, kwargs)
        config = files.read_config(config)
        files.prepare_config(config, is_trainable=is_trainable, ephemeral_gpu_offload=ephemeral_gpu_offload)
        return files.wrap(
            cls,
            model,
            config,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter, as a new one that stays inactive, or into the one of that name.

        Args:
            model_id: folder or repository of the adapter.
            adapter_name: the name to give it; if it exists, its weights are replaced. Of a folder to which several
                adapters were saved, an existing adapter gets the weights that are there under its name.
            is_trainable: let a new adapter's weights require grad at once; they are frozen otherwise.
            torch_device: where to read the weights to; the accelerator if there is one.
            autocast_adapter_dtype: keep half-precision adapter weights in float32.
            ephemeral_gpu_offload: compute initial norms on an accelerator.
            low_cpu_mem_usage: of no effect on the result; weights are never initialised before they are loaded.
            key_mapping: regular expression -> replacement for names in the file.
            strict: raise if the file lacks or has too many names, instead of warning of what it lacks.
            kwargs: `subfolder`, `revision`, `token` and others of the hub client; device-map options;
                `ignore_mismatched_sizes`.

        Returns:
            torch's incompatible keys, limited to this adapter.

        Raises:
            ValueError: no such adapter, or it does not fit; the model is as it was.
        """
        files = AdapterFiles.of_source(model_id, kwargs)
        return files.load_into(
            self,
            adapter_name,
            is_trainable=is_trainable,
            torch_device=torch_device,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            low_cpu_mem_usage=low_cpu_mem_usage,
            key_mapping=key_mapping,
            strict=strict,
        )

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return split_hub_kwargs(kwargs)

    def _check_new_adapter_config(self, peft_config: PeftConfig, is_trainable: bool) -> None:
        if peft_config.is_prompt_learning and is_trainable:
            raise ValueError(
                "A saved prompt is what its encoder computed; it cannot be trained on. Load it for inference."
            )

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write the model card, or bring the one that is there up to date.

        Args:
            output_dir: an existing folder.
        """
        from .model_card import write_model_card  # lazy: the hub client's card classes are slow to import

        write_model_card(self, output_dir)


from .peft_tasks import (  # noqa: E402  (they derive from PeftModel)
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

__all__ = [
    "DUMMY_MODEL_CONFIG",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AdapterHolder",
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "cast_adapter_dtype",
    "finish_loading",
    "get_layer_status",
    "get_model_status",
    "get_peft_model_state_dict",
    "holders_of",
    "load_adapter_state",
    "load_peft_weights",
    "set_peft_model_state_dict",
    "warn_about_prefix",
]
