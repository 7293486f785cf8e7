"""Saving adapters to folders, and loading them from folders or repositories of the hub."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from .config import PeftConfig
from .engine.checkpoint import get_peft_model_state_dict, load_adapter_state, load_peft_weights
from .engine.lifecycle import AdapterHolder, holders_of, set_merged
from .engine.loading import finish_loading
from .engine.state import LoadResult, base_model_of
from .engine.undo import Undo
from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from .prompt_learning import check_prompt_file
from .utils.constants import CONFIG_NAME
from .utils.hub import download_parameters
from .utils.naming import check_adapter_name, near_misses
from .utils.registry import method
from .utils.tensor_files import write_weights

if TYPE_CHECKING:
    from .peft_model import PeftModel

DISPATCH_OPTIONS = ("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index")


def split_hub_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that the hub client takes, and the rest."""
    known = {*download_parameters(), "use_auth_token"}
    hub = {key: value for key, value in kwargs.items() if key in known}
    return hub, {key: value for key, value in kwargs.items() if key not in known}


class AdapterFiles:
    """The files of a model's adapters, or of one adapter at a source.

    Args:
        model: the model to save.
    """

    def __init__(self, model: PeftModel | None = None) -> None:
        self.model = model
        self.source = ""
        self.hub: dict[str, Any] = {}
        self.rest: dict[str, Any] = {}

    @classmethod
    def of_source(cls, source: str | os.PathLike, kwargs: dict[str, Any]) -> AdapterFiles:
        """The files of one adapter.

        Args:
            source: folder or repository.
            kwargs: options of the hub client and of loading.
        """
        files = cls()
        files.source = os.fspath(source)
        files.hub, files.rest = split_hub_kwargs(kwargs)
        if "offload_folder" in files.rest and "offload_dir" in files.rest:
            raise ValueError("offload_folder and offload_dir mean the same; pass one of them.")
        return files

    # ------------------------------------------------------------------------------------------------------------- saving

    def save(
        self,
        directory: str | os.PathLike,
        *,
        safe_serialization: bool,
        selected_adapters: list[str] | None,
        save_embedding_layers: str | bool,
        is_main_process: bool,
        path_initial_model_for_weight_conversion: str | None,
        state_dict: dict[str, torch.Tensor] | None,
    ) -> None:
        """Write the adapters; arguments as `PeftModel.save_pretrained`."""
        model = self.model
        if os.path.isfile(directory):
            raise ValueError(f"{os.fspath(directory)!r} is a file; an adapter is saved to a folder.")
        names = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
        unknown = [name for name in names if name not in model.peft_config]
        if unknown:
            raise ValueError(
                f"selected_adapters has the unknown adapters {unknown}; known are {sorted(model.peft_config)}."
            )
        states = {
            name: get_peft_model_state_dict(
                model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
            )
            for name in names
        }
        configs = {name: model.peft_config[name] for name in names}
        if path_initial_model_for_weight_conversion is not None:
            for name in names:
                states[name], configs[name] = self._converted(
                    name, states[name], path_initial_model_for_weight_conversion
                )
        os.makedirs(directory, exist_ok=True)
        if not is_main_process:
            return
        model.create_or_update_model_card(directory)
        for name in names:
            folder = Path(directory) if name == "default" else Path(directory, check_adapter_name(name))
            folder.mkdir(parents=True, exist_ok=True)
            write_weights(folder, states[name], safe_serialization)
            self._write_config(folder, model.peft_config[name], configs[name])

    def _converted(
        self, name: str, state: dict[str, torch.Tensor], initial: str
    ) -> tuple[dict[str, torch.Tensor], PeftConfig]:
        convert = getattr(self.model.base_model, "convert_mutated_init", None)
        if convert is None:
            raise ValueError(
                f"path_initial_model_for_weight_conversion is for methods that start by changing the base weight, not for "
                f"{self.model.peft_config[name].peft_type.value}."
            )
        return convert(self.model, name, state, initial)

    def _write_config(self, folder: Path, live: PeftConfig, config: PeftConfig) -> None:
        """Save a configuration for inference; the live one keeps its mode and learns the base model's name."""
        base = self.model.get_base_model()
        if live.base_model_name_or_path is None:
            live.base_model_name_or_path = base.__dict__.get("name_or_path") or None
            config.base_model_name_or_path = live.base_model_name_or_path
        mapping = None
        if config.task_type is None:
            mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        mode, config.inference_mode = config.inference_mode, True
        try:
            config.save_pretrained(folder, auto_mapping_dict=mapping)
        finally:
            config.inference_mode = mode

    # ------------------------------------------------------------------------------------------------------------ loading

    def read_config(self, config: PeftConfig | None = None) -> PeftConfig:
        """The adapter's saved configuration, or the given one if it is one.

        Raises:
            ValueError: something else is given, or the file is missing or unreadable.
        """
        if config is None:
            peft_type = PeftConfig._get_peft_type(self.source, **self.hub)
            return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(self.source, **self.hub, **self.rest)
        if not isinstance(config, PeftConfig):
            raise ValueError(f"config must be a PeftConfig, got {type(config).__name__}.")
        return config

    @staticmethod
    def prepare_config(config: PeftConfig, is_trainable: bool, ephemeral_gpu_offload: bool) -> None:
        """Set what a saved configuration does not say: the mode and the settings of this process."""
        if config.is_prompt_learning and is_trainable:
            raise ValueError(
                "A saved prompt is what its encoder computed; it cannot be trained on. Load it for inference."
            )
        config.inference_mode = not is_trainable
        if hasattr(config, "runtime_config"):
            config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
        elif ephemeral_gpu_offload:
            warnings.warn(f"ephemeral_gpu_offload has no effect on {config.peft_type.value}.")

    def wrap(
        self,
        cls: type[PeftModel],
        model: nn.Module,
        config: PeftConfig,
        *,
        adapter_name: str,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        key_mapping: dict[str, str] | None,
    ) -> PeftModel:
        """A `PeftModel` around a base model with this adapter."""
        from .auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING  # lazy: auto imports the model classes

        if key_mapping is None and not config.is_prompt_learning:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        state = self._read_weights(None, key_mapping)
        self._check_sizes(model, config, adapter_name, state)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with Undo() as undo:
            wrapped = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)(
                model,
                config,
                adapter_name=adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=may_defer(config),
            )
            undo.push(_unwrap, wrapped, trainable)
            result = self._fill(wrapped, adapter_name, state)
        if config.is_prompt_learning:
            wrapped.prompts.resume(adapter_name)
        self._warn_missing(result.missing, adapter_name)
        self._dispatch(wrapped)
        return wrapped.train() if is_trainable and model.training else wrapped.eval() if not is_trainable else wrapped

    def load_into(
        self,
        model: PeftModel,
        adapter_name: str,
        *,
        is_trainable: bool,
        torch_device: str | None,
        autocast_adapter_dtype: bool,
        ephemeral_gpu_offload: bool,
        low_cpu_mem_usage: bool,
        key_mapping: dict[str, str] | None,
        strict: bool,
    ) -> _IncompatibleKeys:
        """Load this adapter into a model; arguments as `PeftModel.load_adapter`."""
        check_adapter_name(adapter_name)
        is_new = adapter_name not in model.peft_config
        if not is_new:
            self._narrow(adapter_name)
        state = self._read_weights(torch_device, key_mapping)
        merged = [(holder, list(holder.merged_adapters)) for _, holder in holders_of(model) if holder.merged_adapters]
        with Undo() as undo:
            if is_new:
                config = self.read_config()
                self.prepare_config(config, is_trainable, ephemeral_gpu_offload)
                model._check_new_adapter_config(config, is_trainable)
                self._check_sizes(base_model_of(model), config, adapter_name, state)
                model.add_adapter(
                    adapter_name,
                    config,
                    low_cpu_mem_usage=may_defer(config),
                    autocast_adapter_dtype=autocast_adapter_dtype,
                )
                undo.push(_take_out, model, adapter_name, vars(model).get("active_adapter"), merged)
            result = self._fill(model, adapter_name, state, strict=strict)
        if is_new and model._is_prompt_learning:
            model.prompts.resume(adapter_name)
        elif is_new and is_trainable:
            model.set_requires_grad(adapter_name, True)
        if not strict:
            self._warn_missing(result.missing, adapter_name)
        self._dispatch(model)
        if not is_trainable and model.training:
            model.eval()
        return _IncompatibleKeys(result.missing, result.unexpected)

    def _narrow(self, adapter_name: str) -> None:
        """Of a folder to which several adapters were saved, mean the one of this name, not the one called "default"."""
        own = os.path.join(self.source, adapter_name)
        if (
            adapter_name != "default"
            and "subfolder" not in self.hub
            and os.path.isfile(os.path.join(own, CONFIG_NAME))
        ):
            self.source = own

    def _read_weights(self, device: str | None, key_mapping: dict[str, str] | None) -> dict[str, torch.Tensor]:
        return load_peft_weights(self.source, device=device, key_mapping=key_mapping, **self.hub)

    def _check_sizes(
        self, base: nn.Module, config: PeftConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> None:
        """Raise if the configuration asks for tensors of other sizes than the file has, before memory is taken for them."""
        if self.rest.get("ignore_mismatched_sizes"):
            return
        if config.is_prompt_learning:
            check_prompt_file(config, base, state, adapter_name)
        else:
            method(config.peft_type).model_cls.check_file(config, state)

    def _fill(
        self, model: PeftModel, adapter_name: str, state: dict[str, torch.Tensor], strict: bool = False
    ) -> LoadResult:
        if strict:
            self._check_names(model, adapter_name, state)
        result = load_adapter_state(
            model,
            state,
            adapter_name,
            ignore_mismatched_sizes=self.rest.get("ignore_mismatched_sizes", False),
            given_away=True,
        )
        if not model._is_prompt_learning and hasattr(model.base_model, "holders"):
            finish_loading(model.base_model, model, adapter_name)
        return result

    def _check_names(self, model: PeftModel, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
        expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        if not missing and not unexpected:
            return
        parts = []
        if missing:
            parts.append(f"missing are {missing[:5]}")
        if unexpected:
            near = {name: near_misses(name, expected, 1) for name in unexpected[:5]}
            parts.append(
                "unexpected are "
                + ", ".join(name + (f" (nearest: {found[0]})" if found else "") for name, found in near.items())
            )
        raise ValueError(
            f"The weights at {self.source!r} do not fit the adapter {adapter_name!r}: {'; '.join(parts)}."
        )

    def _warn_missing(self, missing: list[str], adapter_name: str) -> None:
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            warnings.warn(
                f"The weights at {self.source!r} lack these of the adapter {adapter_name!r}, which keep their initial "
                f"values: {shown}."
            )

    def _dispatch(self, model: PeftModel) -> None:
        """Spread a model again whose modules accelerate had offloaded, now with the adapter in it."""
        mapped = getattr(model, "hf_device_map", None) or {}
        if len(model.peft_config) != 1 or not {"cpu", "disk"} & set(map(str, mapped.values())):
            return
        from .dispatch import redispatch  # lazy: needs accelerate

        redispatch(model, {key: self.rest[key] for key in DISPATCH_OPTIONS if key in self.rest})


def may_defer(config: PeftConfig) -> bool:
    """Whether an adapter's parameters can be made without storage: not if its start changes the base model."""
    mutates = getattr(method(config.peft_type).model_cls, "changes_base_at_start", None)
    return not config.is_prompt_learning and not (mutates is not None and mutates(config))


def _take_out(
    model: PeftModel, adapter_name: str, active_adapter: Any, merged: list[tuple[AdapterHolder, list[str]]]
) -> None:
    """Remove an adapter whose weights could not be loaded; a copy that it had of a module had what is merged taken out."""
    model.delete_adapter(adapter_name)
    for holder, names in reversed(merged):
        set_merged(holder, names)
    if active_adapter is not None:  # a mixed model asks its tuner
        model.active_adapter = active_adapter


def _unwrap(model: PeftModel, trainable: list[nn.Parameter]) -> None:
    (model.prompts if model._is_prompt_learning else model.base_model).unload()
    for parameter in trainable:
        parameter.requires_grad_(True)
