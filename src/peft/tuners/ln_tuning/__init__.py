"""LN tuning: training copies of the normalisation layers (arXiv 2312.11420)."""

from ...utils.peft_types import register_peft_method
from .config import LNTuningConfig
from .layer import LNTuningLayer
from .model import LNTuningModel

__all__ = ["LNTuningConfig", "LNTuningLayer", "LNTuningModel"]

register_peft_method(name="ln_tuning", config_cls=LNTuningConfig, model_cls=LNTuningModel)
