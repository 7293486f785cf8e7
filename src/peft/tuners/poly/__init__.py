"""Poly: an inventory of skills that tasks share (arXiv 2202.13914)."""

from ...utils.peft_types import register_peft_method
from .config import PolyConfig
from .layer import Linear, PolyLayer
from .model import PolyModel

__all__ = ["Linear", "PolyConfig", "PolyLayer", "PolyModel"]

register_peft_method(name="poly", config_cls=PolyConfig, model_cls=PolyModel)
