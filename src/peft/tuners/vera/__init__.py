"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454)."""

from ...utils.peft_types import register_peft_method
from .config import VeraConfig
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, VeraLayer
from .model import VeraModel

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "VeraConfig", "VeraLayer", "VeraModel"]

register_peft_method(name="vera", config_cls=VeraConfig, model_cls=VeraModel, prefix="vera_lambda_")
