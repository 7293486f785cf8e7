"""Cartridges: keys and values that stand for a long text, distilled from it (arXiv 2506.06266)."""

from ...utils.peft_types import register_peft_method
from .config import CartridgeConfig
from .model import CartridgeEncoder

__all__ = ["CartridgeConfig", "CartridgeEncoder"]

register_peft_method(name="cartridge", config_cls=CartridgeConfig, model_cls=CartridgeEncoder)
