"""(IA)³ on linear layers of bitsandbytes.

How their weights are read and written is the business of the engine's backends (`peft.engine.backends`): these classes are
`Linear` by another name, to be recognised by.
"""

from ...engine.layer import AdapterLayer
from ...import_utils import is_bnb_4bit_available, is_bnb_available
from .config import IA3Config
from .layer import IA3Layer, Linear


class Linear8bitLt(Linear):
    """(IA)³ on a linear layer with 8-bit weights."""

    def __repr__(self) -> str:
        return f"ia3.{super().__repr__()}"


class Linear4bit(Linear):
    """(IA)³ on a linear layer with 4-bit weights."""

    def __repr__(self) -> str:
        return f"ia3.{super().__repr__()}"


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {
    ("bnb 8bit", "linear"): Linear8bitLt,
    ("bnb 4bit", "linear"): Linear4bit,
}

__all__ = ["IA3Config", "IA3Layer", "Linear4bit", "Linear8bitLt", "is_bnb_4bit_available", "is_bnb_available"]
