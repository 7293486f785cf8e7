"""HRA: adaptation by products of Householder reflections (arXiv 2405.17484)."""

from ...utils.peft_types import register_peft_method
from .config import HRAConfig
from .layer import HRAConv2d, HRALayer, HRALinear
from .model import HRAModel

__all__ = ["HRAConfig", "HRAConv2d", "HRALayer", "HRALinear", "HRAModel"]

register_peft_method(name="hra", config_cls=HRAConfig, model_cls=HRAModel)
