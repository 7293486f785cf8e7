"""Prompt tuning: learned embeddings before the input (arXiv 2104.08691)."""

from ...utils.peft_types import register_peft_method
from .config import PromptTuningConfig, PromptTuningInit
from .model import PromptEmbedding

__all__ = ["PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"]

register_peft_method(name="prompt_tuning", config_cls=PromptTuningConfig, model_cls=PromptEmbedding)
