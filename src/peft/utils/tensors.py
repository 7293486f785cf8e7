"""Small helpers for tensors and modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .error import SizeError


def empty(
    *shape: int, owner: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """An uninitialised tensor of a size that somebody's configuration asks for.

    Args:
        shape: its sizes.
        owner: what it is for, for the error.
        dtype: torch's default if it is not given.
        device: the same.

    Raises:
        SizeError: there is no room for it, or its size cannot be counted.
    """
    try:
        return torch.empty(*shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:  # an accelerator's, which training loops look for
        raise
    except (RuntimeError, TypeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise SizeError(
            f"{owner}: a tensor of the shape {shape} cannot be made; choose smaller numbers in the configuration ({reason})."
        ) from error


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


def is_bare(linear: nn.Module) -> bool:
    """Whether calling a linear layer is nothing but its product: no bias, no hook, no wrapper of a sharding library."""
    return (
        type(linear) is nn.Linear
        and linear._parameters["bias"] is None
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        and "forward" not in linear.__dict__
    )


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight (out, in) of a factor, also where FSDP1 has made it a unit, which is whole only while it is called.

    Args:
        linear: a linear layer without bias or anything else with a `weight`, perhaps in such a unit.
    """
    inner = linear._modules.get("_fsdp_wrapped_module")
    if not isinstance(inner, nn.Linear):
        return linear.weight
    unit = torch.eye(inner.in_features, dtype=next(linear.parameters()).dtype, device=next(linear.parameters()).device)
    return linear(unit).T


def add_product(result: torch.Tensor, hidden: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """result + s·hidden·Bᵀ in one kernel.

    Args:
        result: (..., out).
        hidden: (..., r).
        B: (out, r).
        scaling: s; a tensor's value stays a value in compiled code, where a float becomes a constant.
    """
    if torch.is_tensor(scaling):
        hidden, scaling = hidden * scaling, 1.0
    if result.dim() == 2:
        return torch.addmm(result, hidden, B.T, alpha=scaling)
    return torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), B.T, alpha=scaling).view(result.shape)


def product(B: torch.Tensor, A: torch.Tensor, gains: torch.Tensor | None = None) -> torch.Tensor:
    """B·diag(gains)·A; in float32 for half precision on a CPU, which is faster and rounds once.

    Args:
        B: (out, r).
        A: (r, in).
        gains: (r,); ones by default.
    """
    dtype = A.dtype
    if A.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        B, A = B.float(), A.float()
    return ((B if gains is None else B * gains.to(B.dtype)) @ A).to(dtype)


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, of which each rank holds a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each rank holds a part, which all ranks ask for together; any other tensor itself."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, as a `DTensor` with the placements of another.

    Args:
        value: the whole tensor.
        like: a `DTensor`, with or without storage.
    """
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What identifies the storage of a tensor: device, address, size in bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
