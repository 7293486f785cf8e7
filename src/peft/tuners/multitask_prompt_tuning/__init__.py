"""Multitask prompt tuning: one prompt for many tasks, times a small matrix for each (arXiv 2303.02861)."""

from ...utils.peft_types import register_peft_method
from .config import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
from .model import MultitaskPromptEmbedding

register_peft_method(
    name="multitask_prompt_tuning", model_cls=MultitaskPromptEmbedding, config_cls=MultitaskPromptTuningConfig
)

__all__ = ["MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"]
