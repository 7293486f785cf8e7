"""The rank dimension of LoRA's factors: where it is on each kind of layer, and factors padded or cut to another rank.

Padding both factors by zeros changes nothing about their product. A layer whose factors are padded takes adapters of
any rank up to theirs, in tensors that keep their shapes (see `peft.utils.hotswap`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.lifecycle import holders_of
from ...engine.matching import get_pattern_key
from ...engine.state import AdapterState
from .layer import LoraLayer, ParamWrapper

if TYPE_CHECKING:
    from .config import LoraConfig

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
    if hasattr(tensor, "ds_shape"):  # partitioned by ZeRO-3, and perhaps empty itself
        tensor = torch.empty(tensor.ds_shape, device="meta")
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


def config_key(layer: LoraLayer) -> str:
    """The name by which a configuration's patterns know a layer."""
    label = layer._label.removesuffix(".base_layer.out_proj")  # inside an attention layer, which is what is targeted
    name = ".".join(part for part in label.split(".") if part != "base_layer")
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def rank_in(config: LoraConfig, layer: LoraLayer) -> int:
    """The rank that a configuration gives a layer."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, config_key(layer)), config.r)


def without_padding(
    model: nn.Module, config: LoraConfig, adapter_name: str, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """An adapter's tensors with factors that are padded cut to the ranks of its configuration.

    Args:
        model: a model with the adapter.
        config: the adapter's configuration.
        adapter_name: the adapter.
        state: tensors by their names on disk.
    """
    if not any(_is_padded(holder, adapter_name) for _, holder in holders_of(model)):
        return state
    cut = dict(state)
    for name, slot in AdapterState(model, adapter_name).slots.items():
        layer, factor = slot.holder, factor_of(slot.entry.live)
        if name in cut and factor is not None and isinstance(layer, LoraLayer) and _is_padded(layer, adapter_name):
            cut[name] = with_rank(
                layer, factor, cut[name], min(rank_in(config, layer), rank_of(layer, factor, cut[name]))
            )
    return cut


def _is_padded(layer: nn.Module, adapter_name: str) -> bool:
    if not isinstance(layer, LoraLayer):
        return False
    factors = [(factor_of(entry.live), entry.tensor) for entry in layer.state_entries(adapter_name)]
    return any(factor and rank_of(layer, factor, tensor) > layer.r[adapter_name] for factor, tensor in factors)


def fit_module(module: nn.Module) -> None:
    """Let the sizes that a factor's module reports be those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
