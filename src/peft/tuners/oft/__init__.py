"""OFT: orthogonal fine-tuning by rotations of the input (arXiv 2306.07280)."""

from ...utils.peft_types import register_peft_method
from .config import OFTConfig
from .layer import Conv2d, Embedding, Linear, OFTLayer
from .model import OFTModel

__all__ = ["Conv2d", "Embedding", "Linear", "OFTConfig", "OFTLayer", "OFTModel"]

register_peft_method(name="oft", config_cls=OFTConfig, model_cls=OFTModel)
