"""LoHa: low-rank Hadamard product (FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859)."""

from ...utils.peft_types import register_peft_method
from .config import LoHaConfig
from .layer import Conv2d, Linear, LoHaLayer
from .model import LoHaModel

__all__ = ["Conv2d", "Linear", "LoHaConfig", "LoHaLayer", "LoHaModel"]

register_peft_method(name="loha", config_cls=LoHaConfig, model_cls=LoHaModel, prefix="hada_", is_mixed_compatible=True)
