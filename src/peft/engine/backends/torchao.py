"""Weights that are tensors of torchao: codes and scales in a subclass of `torch.Tensor`, in torch's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import register_backend
from .parameter import ParameterBackend


@register_backend
class TorchaoBackend(ParameterBackend):
    """Weights that torchao has quantised, of linear layers and of what else it quantises.

    A weight is written by the model's own recipe or, where it has none, with the granularity and types that the tensor says
    it has.

    Args:
        get_apply_tensor_subclass: gives the recipe (a configuration for `torchao.quantization.quantize_`), as a method of
            that name of transformers' `TorchAoConfig` does; None where there is none.
    """

    backend_name = "torchao"

    def __init__(self, get_apply_tensor_subclass: Callable[[], Any] | None) -> None:
        self.get_apply_tensor_subclass = get_apply_tensor_subclass

    @classmethod
    def holds(cls, weight: torch.Tensor) -> bool:
        return type(weight).__module__.partition(".")[0] == "torchao"

    @classmethod
    def told(cls, options: dict[str, Any]) -> TorchaoBackend:
        recipe = options.get("get_apply_tensor_subclass")
        return cls(recipe_of(options.get("model")) if recipe is None else recipe)

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        return dequantised(base_layer.weight)

    def weight_in(self, base_layer: nn.Module, snapshot: dict[str, torch.Tensor]) -> torch.Tensor:
        return dequantised(snapshot["weight"])

    def quantised(self, base_layer: nn.Module, weight: torch.Tensor, label: str) -> nn.Parameter:
        old = base_layer.weight
        recipe = None if self.get_apply_tensor_subclass is None else self.get_apply_tensor_subclass()
        # A recipe that depends on the names of modules is none for a module alone.
        if recipe is not None and not hasattr(recipe, "fqn_to_config"):
            new = by_recipe(base_layer, weight, recipe)
        elif type(old).__name__ in BY_ITSELF:
            new = BY_ITSELF[type(old).__name__](old, weight)
        else:
            raise ValueError(
                f"{label}: its weight is a {type(old).__name__}, of which torchao keeps no recipe to make another one by; "
                f"without one these can be written: {', '.join(BY_ITSELF)}. Load the model with a TorchAoConfig, or pass "
                "get_apply_tensor_subclass."
            )
        if type(new) is not type(old):
            raise TypeError(
                f"{label}: its weight is a {type(old).__name__}, but get_apply_tensor_subclass makes it a "
                f"{type(new).__name__}. Pass the configuration by which the layer was quantised."
            )
        return nn.Parameter(new, requires_grad=False)


def recipe_of(model: Any) -> Callable[[], Any] | None:
    """What tells how a transformers model was quantised by torchao, None for another model."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return getattr(config, "get_apply_tensor_subclass", None)


def dequantised(weight: torch.Tensor) -> torch.Tensor:
    """The values that a tensor of torchao stands for.

    Raises:
        NotImplementedError: it is laid out for a kernel, and torchao cannot undo that.
    """
    try:
        return weight.detach().dequantize()
    except NotImplementedError as error:
        raise NotImplementedError(
            f"torchao cannot dequantise a weight of the class {type(weight).__name__}, so that it can be neither read nor "
            "merged into. Adapters that only add to the layer's output work with it."
        ) from error


def by_recipe(base_layer: nn.Module, weight: torch.Tensor, recipe: Any) -> torch.Tensor:
    """A weight as torchao quantises it in a layer of this sort."""
    from torchao.quantization import quantize_

    layer = copy.copy(base_layer)
    layer._parameters = {**base_layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    parent = nn.Sequential(layer)
    quantize_(parent, recipe, filter_fn=lambda module, name: module is layer)
    return parent[0].weight


# --------------------------------------------------------------------------------------- from the tensor's own attributes


def granularity_of(old: torch.Tensor) -> Any:
    """What each scale of a quantised matrix is for."""
    from torchao.quantization import PerBlock, PerGroup, PerRow, PerTensor

    block, shape = tuple(old.block_size), tuple(old.shape)
    if block == shape:
        return PerTensor()
    if any(size != 1 for size in block[:-1]):
        return PerBlock(list(block))
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


def mapping_of(old: torch.Tensor) -> Any:
    """Whether zero stands in the middle of the codes."""
    from torchao.quantization import MappingType

    is_symmetric = old.zero_point is None or not bool(old.zero_point.any())
    return MappingType.SYMMETRIC if is_symmetric else MappingType.ASYMMETRIC


def int8(old: Any, weight: torch.Tensor) -> torch.Tensor:
    return type(old).from_hp(
        weight,
        granularity_of(old),
        mapping_type=mapping_of(old),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=getattr(old, "act_quant_scale", None),
        act_quant_zero_point=getattr(old, "act_quant_zero_point", None),
        act_pre_scale=getattr(old, "act_pre_scale", None),
        reduce_range=getattr(old, "reduce_range", False),
    )


def float8(old: Any, weight: torch.Tensor) -> torch.Tensor:
    return type(old).from_hp(
        weight,
        float8_dtype=old.qdata.dtype,
        granularity=granularity_of(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


def intx(old: Any, weight: torch.Tensor) -> torch.Tensor:
    return type(old).from_hp(
        weight,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=mapping_of(old),
        activation_quantization=old.activation_quantization,
    )


BY_ITSELF = {"Int8Tensor": int8, "Float8Tensor": float8, "IntxUnpackedToInt8Tensor": intx}
"""Class of a tensor -> what quantises another weight in the same way."""
