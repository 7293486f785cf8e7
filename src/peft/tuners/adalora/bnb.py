"""AdaLoRA on linear layers of bitsandbytes.

How their weights are read and written is the business of the engine's backends (`peft.engine.backends`): these classes are
`SVDLinear` by another name, to be recognised by.
"""

from ...engine.layer import AdapterLayer
from ...import_utils import is_bnb_4bit_available, is_bnb_available
from .config import AdaLoraConfig
from .layer import AdaLoraLayer, SVDLinear


class SVDLinear8bitLt(SVDLinear):
    """AdaLoRA on a linear layer with 8-bit weights."""


class SVDLinear4bit(SVDLinear):
    """AdaLoRA on a linear layer with 4-bit weights."""


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {
    ("bnb 8bit", "linear"): SVDLinear8bitLt,
    ("bnb 4bit", "linear"): SVDLinear4bit,
}

__all__ = [
    "AdaLoraConfig",
    "AdaLoraLayer",
    "SVDLinear4bit",
    "SVDLinear8bitLt",
    "is_bnb_4bit_available",
    "is_bnb_available",
]
