"""The HRA tuner (arXiv 2405.17484)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...engine.tuner import BaseTuner
from ...utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
from .config import HRAConfig
from .layer import HRAConv1d, HRAConv2d, HRAConv3d, HRALayer, HRALinear


class HRAModel(BaseTuner):
    """Adapts a model by Householder reflections of its weights' rows.

    Args:
        model: the model to adapt.
        config: an `HRAConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device.
    """

    prefix: ClassVar[str] = "hra_"
    tuner_layer_cls = HRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = {
        "linear": HRALinear,
        "conv1d_transformers": HRALinear,
        "conv1d": HRAConv1d,
        "conv2d": HRAConv2d,
        "conv3d": HRAConv3d,
    }

    def layer_options(self, config: HRAConfig, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        return {"r": config.r, "target_name": key}


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "HRAConv2d",
    "HRALayer",
    "HRALinear",
    "HRAModel",
    "TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING",
]
