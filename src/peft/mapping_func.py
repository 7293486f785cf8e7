"""`get_peft_model`: the usual way to wrap a model for training."""

from __future__ import annotations

import warnings

from torch import nn

from .auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .config import PeftConfig
from .engine.lifecycle import holders_of
from .engine.tuner import BaseTuner
from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from .peft_model import PeftModel, warn_about_prefix


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Wrap a model with a fresh adapter, ready to be trained. The model is changed in place.

    Args:
        model: the model to adapt.
        peft_config: the adapter's configuration.
        adapter_name: the adapter's name.
        mixed: allow adapters of several methods (`PeftMixedModel`).
        autocast_adapter_dtype: keep half-precision adapter weights in float32.
        revision: of the base model, noted in the configuration.
        low_cpu_mem_usage: make the adapter's parameters on the meta device, to be loaded afterwards.

    Returns:
        A `PeftModel` of the class that the configuration's `task_type` asks for.
    """
    _note_base_model(model, peft_config, revision)
    if next(holders_of(model), None) is not None:
        warnings.warn(
            "The model has adapter layers already. If a second adapter is meant, use model.add_adapter; if a fresh start, "
            "unload() the old one or start from a fresh model."
        )
    if getattr(peft_config, "init_lora_weights", None) == "eva" and not low_cpu_mem_usage:
        warnings.warn("EVA overwrites the adapter's start; low_cpu_mem_usage=True avoids drawing one first.")
    warn_about_prefix(peft_config, adapter_name)
    if mixed:
        from .mixed_model import PeftMixedModel  # lazy: only a mixed model needs it

        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    task_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type)
    if task_cls is None and peft_config.is_prompt_learning:
        raise KeyError(
            f"{peft_config.peft_type.value} needs a task_type, one of {', '.join(MODEL_TYPE_TO_PEFT_MODEL_MAPPING)}; got "
            f"{peft_config.task_type!r}."
        )
    return (task_cls or PeftModel)(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def _note_base_model(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    name = model.__dict__.get("name_or_path") or None
    if config.base_model_name_or_path not in (None, name):
        warnings.warn(
            f"The configuration names the base model {config.base_model_name_or_path!r}; it is set to {name!r}, the model "
            "that is wrapped."
        )
    config.base_model_name_or_path = name
    if revision is None:
        return
    if config.revision not in (None, revision):
        warnings.warn(f"The configuration has revision {config.revision!r}; it is set to {revision!r}.")
    config.revision = revision


__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "BaseTuner",
    "PeftModel",
    "get_peft_model",
]
