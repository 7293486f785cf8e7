"""LoRA: low-rank adaptation (arXiv 2106.09685)."""

from ...utils.peft_types import register_peft_method
from .config import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from .layer import Conv2d, Conv3d, Embedding, Linear, LoraLayer, ParamWrapper
from .model import LoraModel

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "EvaConfig",
    "KasaConfig",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "ParamWrapper",
    "VeloraConfig",
]

register_peft_method(name="lora", config_cls=LoraConfig, model_cls=LoraModel, is_mixed_compatible=True)
