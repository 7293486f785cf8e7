"""X-LoRA: a mixture of LoRA experts, weighted token by token (arXiv 2402.07148)."""

from ...utils.peft_types import register_peft_method
from .config import XLoraConfig
from .model import XLoraModel

__all__ = ["XLoraConfig", "XLoraModel"]

register_peft_method(name="xlora", config_cls=XLoraConfig, model_cls=XLoraModel)
