"""The tables by PEFT type, and injection into a model that stays the caller's own class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .utils.peft_types import PeftType
from .utils.registry import MethodTable

if TYPE_CHECKING:
    import torch

    from .config import PeftConfig

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftType",
    "get_peft_config",
    "inject_adapter_in_model",
]

PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type] = MethodTable(lambda method: method.config_cls)
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type] = MethodTable(lambda method: method.model_cls)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type] = MethodTable(
    lambda method: method.model_cls, include=lambda method: method.is_mixed_compatible
)
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = MethodTable(lambda method: method.prefix)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Build the configuration that a dictionary describes.

    Args:
        config_dict: the fields, `peft_type` among them.

    Raises:
        KeyError: no `peft_type`, or an unknown one.
        TypeError: a field that the method does not have.
    """
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: torch.nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """Put an adapter into a model in place; the model keeps its class and gains `peft_config`.

    The new adapter becomes the active one. If anything fails, the model is as it was.

    Args:
        peft_config: what to inject; no prompt learning method and none whose layers share state in the tuner.
        model: the model to adapt.
        adapter_name: the new adapter's name.
        low_cpu_mem_usage: create the adapter's parameters on the meta device, to be loaded afterwards.
        state_dict: target what this adapter state has weights for, instead of what the configuration selects.

    Returns:
        The model that was passed.

    Raises:
        ValueError: the method cannot be injected, the name is not usable, or nothing matched.
    """
    from .utils.registry import method  # lazy: methods import this module

    if peft_config.is_prompt_learning or peft_config.is_adaption_prompt:
        raise ValueError(
            f"{peft_config.peft_type.value} cannot be injected into a model: its adapter lives in a PeftModel around "
            "it. Use get_peft_model."
        )
    tuner_cls = method(peft_config.peft_type).model_cls
    if getattr(tuner_cls, "uses_shared_state", False):
        raise ValueError(
            f"{tuner_cls.__name__} keeps state that its layers share in the tuner, which injection throws away. "
            "Use get_peft_model."
        )
    return tuner_cls(
        model, peft_config, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
    ).model
