"""Context-aware prompt tuning: a context of examples in front, its embeddings moved a little (arXiv 2410.17222)."""

from ...utils.peft_types import register_peft_method
from .config import CPTConfig
from .model import CPTEmbedding

__all__ = ["CPTConfig", "CPTEmbedding"]

register_peft_method(name="cpt", config_cls=CPTConfig, model_cls=CPTEmbedding)
