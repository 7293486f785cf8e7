"""The LoKr tuner (arXiv 2309.14859)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ...engine.matching import get_pattern_key
from ...utils.constants import TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING
from ..lycoris_utils import LycorisConfig, LycorisTuner
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoKrLayer


class LoKrModel(LycorisTuner):
    """Adapts a model by Kronecker products.

    Args:
        model: the model to adapt.
        config: a `LoKrConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device.
    """

    prefix: ClassVar[str] = "lokr_"
    tuner_layer_cls = LoKrLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING
    layers_mapping: ClassVar[dict[type[nn.Module], type[LoKrLayer]]] = {
        nn.Conv2d: Conv2d,
        nn.Conv1d: Conv1d,
        nn.Linear: Linear,
    }
    layer_classes: ClassVar[dict[str, type[LoKrLayer]]] = {
        "linear": Linear,
        "conv1d_transformers": Linear,
        "embedding": Embedding,
        "conv1d": Conv1d,
        "conv2d": Conv2d,
        "conv3d": Conv3d,
    }


__all__ = [
    "Conv1d",
    "Conv2d",
    "Linear",
    "LoKrLayer",
    "LoKrModel",
    "LycorisConfig",
    "LycorisTuner",
    "TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING",
    "get_pattern_key",
]
