"""AdaLoRA on layers of bitsandbytes.

The weight's form is the business of the engine's backends (`peft.engine.backends`), so there is no layer class for it
here: what bitsandbytes has quantised is adapted by `SVDLinear`.
"""

from ...import_utils import is_bnb_4bit_available, is_bnb_available
from .config import AdaLoraConfig
from .layer import AdaLoraLayer

__all__ = ["AdaLoraConfig", "AdaLoraLayer", "is_bnb_4bit_available", "is_bnb_available"]
