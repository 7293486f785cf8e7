"""Small helpers for tensors and modules."""

from __future__ import annotations

import torch
from torch import nn


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The transpose of a weight if it is stored (in, out); a Parameter stays one.

    Args:
        weight: (out, in) or (in, out).
        fan_in_fan_out: whether it is stored (in, out).
    """
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def bare_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """An `nn.Linear` around given tensors, without the initialisation that its constructor spends time on.

    Args:
        weight: (out, in).
        bias: (out,).
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.__dict__["out_features"], linear.__dict__["in_features"] = weight.shape
    linear._parameters["weight"] = nn.Parameter(weight)
    linear._parameters["bias"] = None if bias is None else nn.Parameter(bias)
    return linear


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What identifies the storage of a tensor: device, address, size in bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
