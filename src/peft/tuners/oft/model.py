"""The OFT tuner (arXiv 2306.07280)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...engine.tuner import BaseTuner
from ...utils.constants import TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
from .config import OFTConfig
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, OFTLayer


class OFTModel(BaseTuner):
    """Adapts a model by rotations of its layers' inputs.

    Args:
        model: the model to adapt.
        config: an `OFTConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device.
    """

    prefix: ClassVar[str] = "oft_"
    tuner_layer_cls = OFTLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = {
        "linear": Linear,
        "conv1d_transformers": Linear,
        "embedding": Embedding,
        "conv1d": Conv1d,
        "conv2d": Conv2d,
        "conv3d": Conv3d,
    }

    def layer_options(self, config: OFTConfig, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        return {"r": config.r, "target_name": key}

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("OFT cannot be merged into a GPTQ-quantised model.")

    @staticmethod
    def adapter_state_to_load(
        model: nn.Module, config: OFTConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Refuse the tensors of the former OFT, which was another parametrisation.

        Raises:
            ValueError: there are such tensors.
        """
        former = sorted(key for key in state if ".oft_r." in key)
        if former:
            raise ValueError(
                f"The weights for the adapter {adapter_name!r} were made by an earlier method of the same name, which "
                f"has other parameters: expected names with 'oft_R', found {former[0]!r}. Nothing was loaded."
            )
        return state


__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "Conv2d",
    "Embedding",
    "Linear",
    "OFTLayer",
    "OFTModel",
    "TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING",
]
