"""Public import path of the weight backends; they live in the engine."""
# layer: top

from __future__ import annotations

from typing import Any

from torch import nn

from ..engine.backends import QuantizationBackend, resolve_quantization_backend
from ..engine.backends.bnb_4bit import Bnb4bitBackend
from ..engine.backends.bnb_8bit import Bnb8bitBackend
from ..engine.backends.forward_only import ForwardOnlyQuantizationBackend
from ..engine.backends.hqq import HqqBackend
from ..engine.backends.torchao import TorchaoBackend, recipe_of
from ..import_utils import (
    is_aqlm_available,
    is_bnb_4bit_available,
    is_bnb_available,
    is_eetq_available,
    is_gptqmodel_available,
    is_hqq_available,
    is_inc_available,
    is_te_pytorch_available,
    is_torchao_available,
    is_torchao_ge_v0_18_0,
)
from .integrations import dequantize_bnb_weight
from .quantized import is_gptqmodel_awq_layer


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """What `resolve_quantization_backend` needs to know about a model as keyword arguments.

    Args:
        model: a base model, quantised by transformers or not.

    Returns:
        `get_apply_tensor_subclass`, by which torchao quantises a merged weight again, for a model that has it.
    """
    recipe = recipe_of(model)
    return {} if recipe is None else {"get_apply_tensor_subclass": recipe}


def quantization_extra_repr(module: nn.Module) -> str:
    """How the weight of a tuner layer is kept, as a part of its repr; empty for a dense weight."""
    backend = getattr(module, "quantization_backend", None)
    return "" if backend is None else f"quantization_backend={backend.backend_name!r}"


__all__ = [
    "Bnb4bitBackend",
    "Bnb8bitBackend",
    "ForwardOnlyQuantizationBackend",
    "HqqBackend",
    "QuantizationBackend",
    "TorchaoBackend",
    "dequantize_bnb_weight",
    "get_quantization_kwargs",
    "is_aqlm_available",
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_eetq_available",
    "is_gptqmodel_available",
    "is_gptqmodel_awq_layer",
    "is_hqq_available",
    "is_inc_available",
    "is_te_pytorch_available",
    "is_torchao_available",
    "is_torchao_ge_v0_18_0",
    "quantization_extra_repr",
    "resolve_quantization_backend",
]
