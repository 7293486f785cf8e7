"""The base weight for initialisers that look at it or take something out of it, and where the factors go.

Their mathematics is about matrices (out, in). A convolution's weight is one with its window flattened; stacked experts
are several, (experts, out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.offload import onload_layer
from ...engine.undo import put_off, when_done

if TYPE_CHECKING:
    from .layer import LoraLayer

DECOMPOSABLE = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of base weights that can be decomposed and changed."""

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (..., r, in) and B (..., out, r)."""
Change = Callable[[torch.Tensor], torch.Tensor]
"""Gives for a base weight, as matrices in float32, what it is going to be; it may overwrite what it is given."""


def start_by_decomposition(
    layer: LoraLayer,
    adapter: str,
    initialiser: str,
    factorise: Callable[[torch.Tensor], Factors],
    quantised: bool = False,
) -> None:
    """Give an adapter factors found in the base weight, and leave in it what they do not explain: W <- W - s·B·A.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        initialiser: what it is started by, for messages.
        factorise: gives A and B for W in float32.
        quantised: whether a quantised weight will do, as the values that it stands for.

    Raises:
        TypeError: the weight has a dtype that cannot be decomposed.
        ValueError: it is a grouped convolution's, or has adapters merged into it.
        RuntimeError: it has no values.
    """
    with base_weight_at_hand(layer):
        A, B = factorise(checked_matrices(layer, adapter, initialiser, quantised))
        place_factors(layer, adapter, A, B)
    # A copy: a few rows of a decomposition would keep all of it until the change is made.
    A, B = A.to(torch.float32, copy=True), layer.scaling[adapter] * B.float()
    change_when_done(layer, lambda W: W.sub_(B @ A))


def change_when_done(layer: LoraLayer, change: Change) -> None:
    """Change a base weight once the adapter is in place, or has been loaded, so that nothing is lost if that fails.

    Args:
        layer: a LoRA layer.
        change: what to do.
    """
    when_done(_change, layer, change)


def _change(layer: LoraLayer, change: Change) -> None:
    with base_weight_at_hand(layer):
        write_base_matrices(layer, change(base_matrices(layer)))


def _put_off(layer: LoraLayer) -> list[Change]:
    """The changes of a base weight that have yet to be made; layers may share it."""
    weight = layer.weight
    return [change for other, change in put_off(_change) if other.weight is weight]


def coming_weight(layer: LoraLayer) -> torch.Tensor | None:
    """What the base weight is going to be, in its own layout and dtype; None if it stays as it is."""
    changes = _put_off(layer)
    if not changes:
        return None
    with base_weight_at_hand(layer):
        return _as_stored(layer, _coming_matrices(layer, changes))


def _coming_matrices(layer: LoraLayer, changes: list[Change]) -> torch.Tensor:
    matrices = base_matrices(layer)
    for change in changes:
        matrices = change(matrices)
    return matrices


@contextmanager
def base_weight_at_hand(layer: LoraLayer) -> Iterator[None]:
    """Context in which the base weight is whole and in memory, and changes of it last.

    That is, with accelerate's offloading and DeepSpeed's partitions too.
    """
    with onload_layer(layer), torch.no_grad():
        yield


def checked_matrices(layer: LoraLayer, adapter: str, initialiser: str, quantised: bool = False) -> torch.Tensor:
    """The base weight as it is going to be, if it can be changed; arguments and errors as `start_by_decomposition`."""
    weight = layer.weight
    about = f"{layer.called}: init_lora_weights={initialiser!r} of the adapter {adapter!r}"
    if weight.is_meta:
        raise RuntimeError(
            f"{about} needs the base weight, which is on the meta device. Load the model's weights first."
        )
    if layer.merged_adapters:
        raise ValueError(
            f"{about} changes the base weight, but {layer.merged_adapters} are merged into it. Call unmerge_adapter() first."
        )
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise ValueError(f"{about} is not for grouped convolutions, whose weight has not the shape of B·A.")
    if weight.dtype not in DECOMPOSABLE and not (quantised and layer.quantization_backend is not None):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DECOMPOSABLE)
        raise TypeError(
            f"{about} needs a base weight in one of {names}, got {str(weight.dtype).removeprefix('torch.')}. Start the "
            "adapter on the model before it is quantised."
        )
    backend = layer.quantization_backend
    if backend is not None and not backend.supports_merge:
        raise backend.unwritable(about)
    return _coming_matrices(layer, _put_off(layer))


def base_matrices(layer: LoraLayer) -> torch.Tensor:
    """A copy of the base weight in float32, as matrices."""
    weight = layer.get_base_weight().to(torch.float32, copy=True)
    if _is_stack(layer):
        return weight.mT if layer.is_transposed else weight
    return weight.T if layer.fan_in_fan_out else weight.flatten(1)


def write_base_matrices(layer: LoraLayer, matrices: torch.Tensor) -> None:
    """Make these the base weight, in its own layout and dtype."""
    layer.set_base_weight(_as_stored(layer, matrices))


def _as_stored(layer: LoraLayer, matrices: torch.Tensor) -> torch.Tensor:
    weight = layer.get_base_weight()
    if _is_stack(layer):
        matrices = matrices.mT if layer.is_transposed else matrices
    elif layer.fan_in_fan_out:
        matrices = matrices.T
    return matrices.reshape(weight.shape).to(weight.dtype).contiguous()


def _is_stack(layer: LoraLayer) -> bool:
    return hasattr(layer, "num_experts") and layer.weight.dim() == 3


def place_factors(layer: LoraLayer, adapter: str, A: torch.Tensor, B: torch.Tensor) -> None:
    """Put found factors into an adapter. They may have a lower rank than it, if the base weight has.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        A: (r, in), or (experts, r, in).
        B: (out, r), or (experts, out, r).
    """
    if A.dim() == 3:  # kept expert by expert in A, rank by rank in B
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    for factor, value in ((layer.lora_A[adapter], A), (layer.lora_B[adapter], B)):
        window = factor.weight.shape[2:]
        _set(factor, (value.unflatten(1, (-1, *window)) if window else value).contiguous())


def _set(factor: nn.Module, value: torch.Tensor) -> None:
    if isinstance(factor, nn.Linear):
        factor.out_features, factor.in_features = value.shape
    if factor.weight.is_meta:  # to be loaded, which the change of the base weight does not wait for
        factor.weight = nn.Parameter(value, requires_grad=factor.weight.requires_grad)
    else:
        factor.weight.data = value
