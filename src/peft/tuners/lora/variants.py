"""The variants of LoRA, gathered: importing this module lets each of their files register what it serves."""

from .alora import (
    ALoraLinearVariant,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)
from .arrow import ArrowLinearVariant, ArrowLoraLinearLayer
from .bdlora import BdLoraLinearVariant, BlockDiagonalLinear
from .dora import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    _DoraConvNdVariant,
)
from .kasa import KasaLinearVariant
from .mica import MiCAEmbeddingVariant, MiCALinearVariant
from .monteclora import MontecloraLinearVariant, MontecloraSampler
from .qalora import QALoraLinearVariant
from .variant import LoraVariant
from .velora import VeloraFunction, VeloraLinearVariant

__all__ = [
    "ALoraLinearVariant",
    "ArrowLinearVariant",
    "ArrowLoraLinearLayer",
    "BdLoraLinearVariant",
    "BlockDiagonalLinear",
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "KasaLinearVariant",
    "LoraVariant",
    "MiCAEmbeddingVariant",
    "MiCALinearVariant",
    "QALoraLinearVariant",
    "_DoraConvNdVariant",
    "MontecloraLinearVariant",
    "MontecloraSampler",
    "VeloraFunction",
    "VeloraLinearVariant",
    "calculate_alora_offsets",
    "get_alora_offsets_for_forward",
    "get_alora_offsets_for_generate",
    "is_alora_relevant_in_batch",
]
