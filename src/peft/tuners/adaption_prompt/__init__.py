"""Adaption prompt: prompts that attention layers look at through a gate (LLaMA-Adapter, arXiv 2303.16199)."""

from ...utils.peft_types import register_peft_method
from .config import AdaptionPromptConfig
from .layer import AdaptedAttention, AdaptedAttentionGPT
from .model import AdaptionPromptModel

__all__ = ["AdaptedAttention", "AdaptedAttentionGPT", "AdaptionPromptConfig", "AdaptionPromptModel"]

register_peft_method(name="adaption_prompt", config_cls=AdaptionPromptConfig, model_cls=AdaptionPromptModel)
