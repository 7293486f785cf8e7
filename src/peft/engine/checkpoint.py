"""Adapter state dicts as users and client libraries ask for them, and adapter files."""

from __future__ import annotations

import os
import re
import warnings
from collections import namedtuple
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ..utils.constants import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from ..utils.devices import infer_device
from ..utils.hub import cached_file, file_exists, is_offline
from ..utils.tensor_files import read_tensors, torch_load
from .auxiliary import AuxiliaryTrainingWrapper
from .layer import BaseTunerLayer
from .lifecycle import AdapterHolder, belongs_to_adapter, holders_of
from .matching import match_target_against_key
from .offload import stored
from .sharding import whole_tensors, without_wrappers
from .state import BASE_PREFIX, AdapterState, LoadResult, base_model_of, unmerged

LoadedKeys = namedtuple("LoadedKeys", ["missing_keys", "unexpected_keys"])


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """One adapter's weights by their names on disk; with nothing merged into those of the base model among them.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        state_dict: take the values from this full state dict instead of from the model.
        adapter_name: the adapter.
        unwrap_compiled: look inside a compiled model.
        save_embedding_layers: whether the embeddings are part of it; "auto" if they are targeted or were resized.

    Raises:
        KeyError: there is no such adapter.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        state = model.prompt_encoder_state(adapter_name, state_dict)
        state |= _copies_beside_prompts(model, adapter_name, state_dict)
    else:
        state = AdapterState(model, adapter_name).read(state_dict)
    return state | _embedding_entries(model, config, save_embedding_layers, state_dict, taken=state)


def _copies_beside_prompts(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    return AdapterState(model, adapter_name).read(state_dict) if next(holders_of(model), None) else {}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Load one adapter's weights; everything is checked before a value is written.

    An adapter that is merged is so afterwards with its new weights.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        peft_model_state_dict: tensors by their names on disk.
        adapter_name: the adapter.
        ignore_mismatched_sizes: leave tensors of another shape out instead of raising.
        low_cpu_mem_usage: make the tensors the parameters, for an adapter that was made on the meta device.

    Returns:
        torch's incompatible keys: what the model has and the dictionary has not, base weights included, and the reverse.

    Raises:
        RuntimeError: a tensor has another shape than its place.
        ValueError: a tensor has NaN or infinite values.
    """
    result = load_adapter_state(
        model,
        peft_model_state_dict,
        adapter_name,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        assign=low_cpu_mem_usage,
    )
    loaded_base = {key.removeprefix(BASE_PREFIX) for key in peft_model_state_dict}
    base_names = [
        name
        for name in model.state_dict()
        if not belongs_to_adapter(model, name) and name.removeprefix(BASE_PREFIX) not in loaded_base
    ]
    return _IncompatibleKeys([*result.missing, *base_names], result.unexpected)


def load_adapter_state(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool = False,
    assign: bool = False,
    given_away: bool = False,
) -> LoadResult:
    """`set_peft_model_state_dict` with only the adapter's own names in the result; `given_away` as `AdapterState.write`."""
    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        return model.load_prompt_encoder_state(adapter_name, state, ignore_mismatched_sizes=ignore_mismatched_sizes)
    adapter = AdapterState(model, adapter_name)
    result = adapter.write(
        state, ignore_mismatched_sizes=ignore_mismatched_sizes, assign=assign, given_away=given_away
    )
    if assign:
        for _, holder in holders_of(model):
            if isinstance(holder, BaseTunerLayer):
                holder._move_adapter_to_device_of_base_layer(adapter_name)
    return result


# ---------------------------------------------------------------------------------------------------------- embedding layers


def _embedding_targeted(config: Any, model: nn.Module) -> bool:
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return any(
            name.rsplit(".", 1)[-1] in EMBEDDING_LAYER_NAMES and match_target_against_key(targets, name)
            for name, _ in getattr(model, "model", model).named_modules()
        )
    return not isinstance(targets, str) and any(name in (targets or ()) for name in EMBEDDING_LAYER_NAMES)


def _embedding_entries(
    model: nn.Module,
    config: Any,
    option: bool | str,
    state_dict: dict[str, torch.Tensor] | None,
    taken: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    if option is False:
        return {}
    targeted = _embedding_targeted(config, model)
    rows_only = getattr(config, "trainable_token_indices", None) is not None or hasattr(config, "token_indices")
    if option == "auto":
        if targeted and not rows_only:
            warnings.warn("An embedding layer is adapted, so the embeddings are saved with the adapter.")
        elif not _vocabulary_was_resized(model, config):
            return {}
    base = base_model_of(model)
    if not hasattr(base, "get_input_embeddings"):  # the wrapper has it whatever the model is
        warnings.warn("The embeddings are not saved: the model has no get_input_embeddings to find them by.")
        return {}
    entries: dict[str, torch.Tensor] = {}
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        if targeted and not has_valid_embedding_base_layer(layer):
            continue
        name = get_embedding_layer_name(model, layer, targeted)
        if name is not None:
            with unmerged(model) if state_dict is None else nullcontext():
                source = model.state_dict(keep_vars=True) if state_dict is None else state_dict
                entries |= whole_tensors(_below(model, without_wrappers(name), source, taken))
    return entries


def _below(
    model: nn.Module, name: str, source: dict[str, torch.Tensor], taken: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The base model's own tensors in a module of that name."""
    return {
        without_wrappers(key): stored(model, key, value)
        for key, value in source.items()
        if without_wrappers(key).startswith(f"{name}.")
        and key.replace(".original_module.", ".") not in taken
        and not belongs_to_adapter(model, key)
    }


def has_valid_embedding_base_layer(layer: nn.Module) -> bool:
    """Whether a layer is an adapted embedding or linear layer, and no copy of one."""
    copied = isinstance(layer, AuxiliaryTrainingWrapper)
    return not copied and hasattr(layer, "base_layer") and isinstance(layer.base_layer, (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """Dotted name of an embedding layer in a model.

    Args:
        model: the model.
        layer: the layer, adapted or not.
        is_embedding_in_target_modules: look for the base layer inside the adapted one.
    """
    wanted = layer.base_layer if is_embedding_in_target_modules and hasattr(layer, "base_layer") else layer
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _vocabulary_was_resized(model: nn.Module, config: Any) -> bool:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    source = getattr(config, "base_model_name_or_path", None)
    if size is None or not source:
        return False
    original = _vocab_size_at(source, getattr(config, "revision", None))
    if original is None:
        warnings.warn(
            f"The vocabulary size of {source!r} could not be looked up, so the embeddings are taken as unchanged and are "
            "not saved. Pass save_embedding_layers=True if they were resized."
        )
        return False
    if original != size:
        warnings.warn(
            f"The vocabulary was resized from {original} to {size}, so the embeddings are saved with the adapter."
        )
    return original != size


def _vocab_size_at(source: str, revision: str | None) -> int | None:
    import json

    path = os.path.join(source, "config.json")
    if not os.path.isfile(path):
        if os.path.isdir(source) or is_offline() or not file_exists(source, "config.json", revision=revision):
            return None
        path = cached_file(source, "config.json", revision=revision)
    with open(path, encoding="utf-8") as file:
        return json.load(file).get("vocab_size")


# ---------------------------------------------------------------------------------------------------------------- files


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **hf_hub_download_kwargs: Any
) -> dict[str, torch.Tensor]:
    """Read an adapter's weights from a folder or a repository of the hub.

    Args:
        model_id: path or repository.
        device: where the tensors go; the accelerator if there is one.
        key_mapping: regular expression -> replacement, for names of the base model that have changed since.
        hf_hub_download_kwargs: `subfolder`, `revision`, `token`, ...

    Raises:
        ValueError: there are no adapter weights, or the file is damaged or has something else in it.
    """
    path = _weights_file(model_id, hf_hub_download_kwargs)
    state = read_tensors(path, infer_device() if device is None else device)
    return {_mapped(key, key_mapping): value for key, value in state.items()} if key_mapping else state


def _weights_file(model_id: str, options: dict[str, Any]) -> str:
    subfolder = options.get("subfolder") or ""
    folder = os.path.join(model_id, subfolder)
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    if os.path.isdir(model_id):
        raise ValueError(f"{folder} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}.")
    return _remote_weights_file(model_id, options)


def _remote_weights_file(model_id: str, options: dict[str, Any]) -> str:
    names = [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME]
    if not is_offline() and not options.get("local_files_only"):
        known = {key: options[key] for key in ("revision", "repo_type", "token", "subfolder") if key in options}
        if not file_exists(model_id, SAFETENSORS_WEIGHTS_NAME, **known):
            names = [WEIGHTS_NAME]
    errors = []
    for name in names:
        try:
            return cached_file(model_id, name, **options)
        except (OSError, ValueError) as error:
            errors.append(error)
    raise ValueError(
        f"Found no adapter weights ({' or '.join(names)}) for {model_id!r}: it is no local folder, and the hub client says: "
        f"{errors[-1]}"
    ) from errors[-1]


def _mapped(key: str, mapping: dict[str, str]) -> str:
    prefix = next((prefix for prefix in (BASE_PREFIX, "base_model.") if key.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"key_mapping needs names that start with 'base_model.', found {key!r}.")
    name = key.removeprefix(prefix)
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count and renamed != name:
            return prefix + renamed
    return key


# -------------------------------------------------------------------------------------------------- the base model's state


def _plain_name(model: nn.Module, name: str) -> str | None:
    """A name in memory as the base model has it without adapters; None for an adapter's own tensor."""
    module: Any = model
    parts = []
    for part in name.split("."):
        if isinstance(module, AdapterHolder):
            if part not in module.inner_modules:
                return None
        else:
            parts.append(part)
        module = getattr(module, "_modules", {}).get(part)
    return ".".join(parts)


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's weights under their original names.

    Args:
        model: a `PeftModel`.
    """
    base = model.get_base_model()
    named = ((_plain_name(base, name), tensor) for name, tensor in base.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None}


def set_base_model_state_dict(
    model: nn.Module, state_dict: dict[str, torch.Tensor], strict: bool = True
) -> LoadedKeys:
    """Load weights of the base model by their original names; what is merged is merged into the new ones.

    Args:
        model: a `PeftModel`.
        state_dict: tensors by the base model's own names.
        strict: raise if names are missing or unknown.

    Raises:
        RuntimeError: with `strict`, names do not agree.
    """
    base = model.get_base_model()
    live = {_plain_name(base, name): name for name in base.state_dict()}
    live.pop(None, None)
    missing = [name for name in live if name not in state_dict]
    unexpected = [name for name in state_dict if name not in live]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"The state dict does not fit the base model: missing {missing[:5]}, unexpected {unexpected[:5]}."
        )
    with unmerged(model):
        base.load_state_dict({live[name]: value for name, value in state_dict.items() if name in live}, strict=False)
    return LoadedKeys(missing, unexpected)


__all__ = [
    "CONFIG_NAME",
    "get_base_model_state_dict",
    "get_embedding_layer_name",
    "get_peft_model_state_dict",
    "has_valid_embedding_base_layer",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "torch_load",
]
