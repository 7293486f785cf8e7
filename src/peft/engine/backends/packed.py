"""How weights of small integers are packed into words, and how any linear layer's weight can be had from its forward."""

from __future__ import annotations

import copy

import torch
from torch import nn


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

    It is exact, since all other products are zero, and so it is for a layer that keeps its weight in an order known only to
    the kernel that it runs.

    Args:
        layer: maps (rows, in) to (rows, out); its attribute `bias`, if it has one, is left out.
        fan_in: its number of inputs.
        dtype: in which to compute.
        device: where.

    Returns:
        (out, in).
    """
    if getattr(layer, "bias", None) is not None:
        layer = copy.copy(layer)
        layer._parameters, layer._buffers = dict(layer._parameters), dict(layer._buffers)
        layer.bias = None
    return type(layer).forward(layer, torch.eye(fan_in, dtype=dtype, device=device)).T
