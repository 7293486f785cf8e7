"""AdaLoRA: adaptive budget allocation (arXiv 2303.10512)."""

from ...import_utils import is_bnb_4bit_available, is_bnb_available, names_where_installed
from ...utils.peft_types import register_peft_method
from .config import AdaLoraConfig
from .gptq import SVDQuantLinear
from .layer import AdaLoraLayer, RankAllocator, SVDConv2d, SVDLinear
from .model import AdaLoraModel

__all__ = [
    "AdaLoraConfig",
    "AdaLoraLayer",
    "AdaLoraModel",
    "RankAllocator",
    "SVDConv2d",
    "SVDLinear",
    "SVDQuantLinear",
]

__getattr__ = names_where_installed(
    __name__, SVDLinear8bitLt=(".bnb", is_bnb_available), SVDLinear4bit=(".bnb", is_bnb_4bit_available)
)

register_peft_method(
    name="adalora", config_cls=AdaLoraConfig, model_cls=AdaLoraModel, prefix="lora_", is_mixed_compatible=True
)
