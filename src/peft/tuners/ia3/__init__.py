"""(IA)³: rescaling of inner activations (arXiv 2205.05638)."""

from ...import_utils import is_bnb_4bit_available, is_bnb_available, names_where_installed
from ...utils.peft_types import register_peft_method
from .config import IA3Config
from .layer import Conv2d, Conv3d, IA3Layer, Linear
from .model import IA3Model

__all__ = ["Conv2d", "Conv3d", "IA3Config", "IA3Layer", "IA3Model", "Linear"]

__getattr__ = names_where_installed(
    __name__, Linear8bitLt=(".bnb", is_bnb_available), Linear4bit=(".bnb", is_bnb_4bit_available)
)

register_peft_method(name="ia3", config_cls=IA3Config, model_cls=IA3Model, is_mixed_compatible=True)
