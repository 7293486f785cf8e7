"""The configuration of the adaption prompt, and what it knows of each type of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ...config import PeftConfig
from ...utils.naming import did_you_mean
from ...utils.peft_types import PeftType
from .utils import gpt2_compute_query_states, llama_compute_query_states


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Adaption prompt of LLaMA-Adapter (arXiv 2303.16199): the last attention layers also look at learned prompts.

    The output of an attention module gains `gate · softmax(Q Kᵀ / √d) V` through the module's own output projection,
    with K and V computed from a learned prompt; the gate starts at zero, so the model starts as it was.

    Args:
        target_modules: the attribute that attention modules go by; by default that of the type of model.
        adapter_len: tokens of each layer's prompt. Required.
        adapter_layers: how many attention modules are adapted, counted from the output; 0 for all. Required.
    """

    target_modules: str = None
    adapter_len: int = None
    adapter_layers: int = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAPTION_PROMPT

    @property
    def is_adaption_prompt(self) -> bool:
        """True."""
        return True


class ModelTypeConfig(NamedTuple):
    """Where attention is in a type of model, and how its queries, keys and values are made."""

    compute_query_states: Callable[..., torch.Tensor]
    target_modules: str
    k_proj_layer: str
    v_proj_layer: str | None
    o_proj_layer: str | None


_SEPARATE = ModelTypeConfig(llama_compute_query_states, "self_attn", "k_proj", "v_proj", "o_proj")
_FUSED = ModelTypeConfig(gpt2_compute_query_states, "attn", "c_attn", None, None)

TRANSFORMERS_MODEL_CONFIG: dict[str, ModelTypeConfig] = {
    "llama": _SEPARATE,
    "mistral": _SEPARATE,
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "gpt2": _FUSED,
}


def prepare_config(peft_config: AdaptionPromptConfig, model: nn.Module) -> AdaptionPromptConfig:
    """Fill in the attention modules of the type of model that is at hand.

    Args:
        peft_config: changed in place.
        model: the base model.

    Returns:
        The configuration that was passed.

    Raises:
        ValueError: a type of model that the method does not know.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in TRANSFORMERS_MODEL_CONFIG:
        known = sorted(TRANSFORMERS_MODEL_CONFIG)
        raise ValueError(
            f"An adaption prompt has to know how attention is computed; the type {model_type!r} of "
            f"{type(model).__name__} is none of {known}.{did_you_mean(str(model_type), known)}"
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = TRANSFORMERS_MODEL_CONFIG[model_type].target_modules
    return peft_config


__all__ = [
    "TRANSFORMERS_MODEL_CONFIG",
    "AdaptionPromptConfig",
    "ModelTypeConfig",
    "PeftConfig",
    "PeftType",
    "gpt2_compute_query_states",
    "llama_compute_query_states",
    "prepare_config",
]
