"""FourierFT: updates with a sparse Fourier spectrum (arXiv 2405.03003)."""

from ...utils.peft_types import register_peft_method
from .config import FourierFTConfig
from .layer import FourierFTLayer, FourierFTLinear
from .model import FourierFTModel

__all__ = ["FourierFTConfig", "FourierFTLayer", "FourierFTLinear", "FourierFTModel"]

register_peft_method(name="fourierft", config_cls=FourierFTConfig, model_cls=FourierFTModel)
