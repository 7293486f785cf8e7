"""The rank dimension of LoRA's factors: where it is on each kind of layer, and factors padded or cut to another rank.

Padding both factors by zeros changes nothing about their product. A layer whose factors are padded takes adapters of
any rank up to theirs, in tensors that keep their shapes (see `peft.utils.hotswap`).
"""

from __future__ import annotations

import re

import torch
from torch import nn

from .layer import LoraLayer, ParamWrapper

_FACTOR = re.compile(r"lora_(?:embedding_)?([AB])\.(?!.*\bbias$)")


def factor_of(name: str) -> str | None:
    """ "A" or "B" for the name of a factor, relative to its layer; None for any other tensor's."""
    match = _FACTOR.match(name)
    return match[1] if match else None


def _experts(layer: LoraLayer) -> int:
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def groups_of(layer: LoraLayer) -> int:
    """Groups of a convolution, among which the rank is divided; 1 for other layers."""
    return getattr(layer.get_base_layer(), "groups", 1)


def by_rank(layer: LoraLayer, factor: str, tensor: torch.Tensor) -> torch.Tensor:
    """A view of a factor whose dimension 1 is the rank, of one group or one expert.

    Args:
        layer: the layer that the factor is of.
        factor: "A" or "B".
        tensor: the factor.
    """
    experts = _experts(layer)
    if factor == "A":
        return tensor.unflatten(0, (experts * groups_of(layer), -1))
    return tensor.unflatten(1, (-1, experts)) if experts > 1 else tensor


def divides(layer: LoraLayer, factor: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor has a size that a factor can have: every expert and every group has its share of it."""
    size, shares = (len(tensor), groups_of(layer)) if factor == "A" else (tensor.shape[1], 1)
    return size % (_experts(layer) * shares) == 0


def rank_of(layer: LoraLayer, factor: str, tensor: torch.Tensor) -> int:
    """The rank of a factor.

    Args:
        layer: the layer that the factor is of.
        factor: "A" or "B".
        tensor: the factor.
    """
    return by_rank(layer, factor, tensor).shape[1] * groups_of(layer)


def with_rank(layer: LoraLayer, factor: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A copy of a factor with another rank: padded by zeros, or cut.

    Args:
        layer: the layer that the factor is of.
        factor: "A" or "B".
        tensor: the factor.
        rank: a multiple of the layer's groups.
    """
    view = by_rank(layer, factor, tensor)
    result = view.new_zeros(view.shape[0], rank // groups_of(layer), *view.shape[2:])
    kept = min(view.shape[1], result.shape[1])
    result[:, :kept] = view[:, :kept]
    if factor == "A":
        return result.flatten(0, 1)
    return result.flatten(1, 2) if _experts(layer) > 1 else result


def fill(layer: LoraLayer, factor: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write a factor of the same or a smaller rank into one, in place; what it does not reach becomes zero.

    Args:
        layer: the layer that the factor is of.
        factor: "A" or "B".
        tensor: the factor to write to.
        value: the values.
    """
    source = by_rank(layer, factor, value)
    if value.shape != tensor.shape:
        tensor.zero_()
    by_rank(layer, factor, tensor)[:, : source.shape[1]].copy_(source)


def fit_module(module: nn.Module) -> None:
    """Let the sizes that a factor's module reports be those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
