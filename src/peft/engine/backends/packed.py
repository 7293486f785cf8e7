"""How weights of small integers are packed into words, and how any linear layer's weight can be had from its forward."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from ...utils.warning import PeftWarning


def unpacked(words: torch.Tensor, bits: int, count: int, dim: int) -> torch.Tensor:
    """The codes in a stream of bits, lowest bits first; a code may begin in one word and end in the next.

    Args:
        words: integers of up to 32 bits.
        bits: bits per code, at most as many as a word has.
        count: how many codes there are along `dim`.
        dim: the dimension along which they are packed.

    Returns:
        Codes from 0 to 2**bits - 1 in int16, with `count` entries along `dim`.
    """
    word_bits = 8 * words.element_size()
    first = torch.arange(count, device=words.device) * bits
    index, shift = first // word_bits, first % word_bits
    shift = shift.view([-1 if axis == dim % words.dim() else 1 for axis in range(words.dim())])
    stream = words.long() & (2**word_bits - 1)
    codes = stream.index_select(dim, index) >> shift
    # The next word's bits lie above; of a code that ends in its own word, the mask drops them.
    following = stream.index_select(dim, (index + 1).clamp(max=words.shape[dim] - 1))
    return ((codes | following << (word_bits - shift)) & (2**bits - 1)).to(torch.int16)


@torch.no_grad()
def weight_by_applying(layer: nn.Module, fan_in: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The weight of a linear layer, from its output for each unit vector.

    It is as exact as the kernel, since all other products are zero, also where only the kernel knows in which order the
    weight is kept. The layer stays as it is, though some pack their weight at their first call.

    Args:
        layer: maps (rows, in) to (rows, out); its attribute `bias`, if it has one, is left out.
        fan_in: its number of inputs.
        dtype: in which to compute.
        device: where.

    Returns:
        (out, in).
    """
    layer = copy.copy(layer)
    layer._parameters, layer._buffers = dict(layer._parameters), dict(layer._buffers)
    if getattr(layer, "bias", None) is not None:
        layer.bias = None
    return type(layer).forward(layer, torch.eye(fan_in, dtype=dtype, device=device)).T


def keep_from_packing(layer: nn.Module, label: str) -> None:
    """See that a layer of GPTQModel is not packed for a kernel without gradients.

    Some of its kernels for CPUs settle at a layer's first call whether it is for training, and pack the codes otherwise.

    Args:
        layer: the layer, which may be of a kernel that does neither.
        label: what the warning calls it, if its codes are packed already.
    """
    if not hasattr(layer, "linear_mode"):
        return
    if layer.linear_mode is None:
        layer.linear_mode = "train"
    elif "inference" in str(layer.linear_mode).lower():
        warnings.warn(
            f"{label}: this {type(layer).__name__} was called in eval mode before an adapter was added, and has packed its "
            "codes for that; no gradient goes through it any more. Load the model anew, and add the adapter first.",
            PeftWarning,
        )
