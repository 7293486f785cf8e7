"""The variants of LoRA, gathered: importing this module lets each of their files register what it serves."""

from .dora import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    _DoraConvNdVariant,
)
from .variant import LoraVariant

__all__ = [
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
    "LoraVariant",
    "_DoraConvNdVariant",
]
