"""The FourierFT tuner (arXiv 2405.03003)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...engine.matching import get_pattern_key
from ...engine.tuner import BaseTuner
from ...utils.constants import TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING
from .config import FourierFTConfig
from .layer import (
    FourierFTConv1d,
    FourierFTConv2d,
    FourierFTConv3d,
    FourierFTEmbedding,
    FourierFTLayer,
    FourierFTLinear,
)


class FourierFTModel(BaseTuner):
    """Adapts a model by updates of its weights that are sparse in frequency.

    Args:
        model: the model to adapt.
        config: a `FourierFTConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device.
    """

    prefix: ClassVar[str] = "fourierft_"
    tuner_layer_cls = FourierFTLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = {
        "linear": FourierFTLinear,
        "conv1d_transformers": FourierFTLinear,
        "embedding": FourierFTEmbedding,
        "conv1d": FourierFTConv1d,
        "conv2d": FourierFTConv2d,
        "conv3d": FourierFTConv3d,
    }

    def layer_options(self, config: FourierFTConfig, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        patterns = config.n_frequency_pattern or {}
        chosen = get_pattern_key(patterns, key, config.pattern_form)
        return {"n_frequency": patterns.get(chosen, config.n_frequency), "target_name": key}


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "FourierFTLayer",
    "FourierFTLinear",
    "FourierFTModel",
    "TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING",
]
