"""Layer kinds: how each sort of base layer lays out its weight, and how it applies itself with a given one.

"Canonical" is the orientation of `nn.Linear`: output features first, then input features, then the kernel. A method
writes its mathematics once in it; the kind turns the result to the layout of the layer at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .offload import call_with


class Kind:
    """A sort of base layer. Kinds are stateless; each is one row of a table looked up by `kind_of`."""

    name: str
    weight_name = "weight"
    bias_name = "bias"
    transposed = False
    """Whether the layer stores its weight with input features first."""

    def matches(self, layer: nn.Module) -> bool:
        raise NotImplementedError

    def features(self, layer: nn.Module) -> tuple[int, int]:
        """Input and output features (channels)."""
        raise NotImplementedError

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        """Shape of the canonical weight."""
        fan_in, fan_out = self.features(layer)
        return (fan_out, fan_in)

    def flip(self, weight: torch.Tensor) -> torch.Tensor:
        """Between the layer's own layout and the canonical one, either way."""
        return weight.T if self.transposed else weight

    def apply(self, layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the layer would give with this weight (own layout) and no bias."""
        raise NotImplementedError

    def apply_product(self, layer: nn.Module, x: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """What the layer would give with the weight B·A and no bias, by one factor after the other.

        Args:
            layer: the layer.
            x: its input.
            B: (out, r).
            A: (r, in, *window), canonical.
        """
        # With groups, the rows of B see other channels of A's input, so that there is no product of maps; and with
        # rank 0 there is nothing to convolve with.
        if getattr(layer, "groups", 1) > 1 or not len(A):
            return self.apply(layer, x, self.flip(torch.tensordot(B, A, 1)))
        axis = 1 - A.dim()
        hidden = self.apply(layer, x, self.flip(A))
        rows = hidden.movedim(axis, -1)
        # As a matrix: of more dimensions, torch computes other bits depending on whether B requires a gradient.
        return F.linear(rows.flatten(0, -2), B).view(*rows.shape[:-1], len(B)).movedim(-1, axis)

    def call_with(self, layer: nn.Module, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward with some of its tensors replaced; right for every subclass with a forward of its own."""
        return call_with(layer, tensors, args, kwargs)

    def __reduce__(self) -> tuple:
        # A copied layer keeps the table's own row, which others compare by identity.
        return _kind_called, (self.name,)


class LinearKind(Kind):
    name = "linear"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        if hasattr(layer, "in_features"):
            return layer.in_features, layer.out_features
        # Backends know layers of other libraries that have other names.
        from .backends import resolve_quantization_backend

        return resolve_quantization_backend(layer).features(layer)

    def apply(self, layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)


class Conv1DKind(Kind):
    """`transformers.pytorch_utils.Conv1D`: a linear layer with its weight stored (in, out)."""

    name = "conv1d_transformers"
    transposed = True

    def matches(self, layer: nn.Module) -> bool:
        # By name, so that transformers is not imported to ask.
        return any(
            cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(layer).__mro__
        )

    def features(self, layer: nn.Module) -> tuple[int, int]:
        weight = layer.weight
        shape = getattr(weight, "ds_shape", weight.shape)
        return shape[0], shape[1]

    def apply(self, layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.T)


class EmbeddingKind(Kind):
    """A table (entries, width); canonically it maps one-hot entries to the width, so (width, entries)."""

    name = "embedding"
    transposed = True

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim

    def apply(self, layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(
            x,
            weight,
            padding_idx=layer.padding_idx,
            max_norm=layer.max_norm,
            norm_type=layer.norm_type,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
        )
        scale = embed_scale(layer)
        return rows if scale is None else rows * scale.to(rows.dtype) if torch.is_tensor(scale) else rows * scale


def embed_scale(layer: nn.Module) -> float | torch.Tensor | None:
    """The factor that some embeddings multiply their rows by, None if there is none."""
    scale = getattr(layer, "embed_scale", None)
    if isinstance(scale, (int, float)) or (torch.is_tensor(scale) and scale.numel() == 1):
        return scale
    return None


class ConvKind(Kind):
    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.name = f"conv{dimensions}d"
        self.layer_cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, self.layer_cls)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        return layer.in_channels, layer.out_channels

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)

    def apply(self, layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # The layer's own convolution, so that stride, dilation, groups and every padding mode are its own.
        return layer._conv_forward(x, weight, None)


class MultiheadAttentionKind(Kind):
    """`nn.MultiheadAttention` with one packed projection (3 * embed_dim, embed_dim) of query, key and value."""

    name = "multihead_attention"
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.MultiheadAttention)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        if not layer._qkv_same_embed_dim:
            raise ValueError(
                "Only a MultiheadAttention whose query, key and value have one size can be adapted; this one has "
                f"embed_dim={layer.embed_dim}, kdim={layer.kdim}, vdim={layer.vdim}."
            )
        return layer.embed_dim, 3 * layer.embed_dim


KINDS: tuple[Kind, ...] = (
    EmbeddingKind(),
    ConvKind(2),
    ConvKind(3),
    ConvKind(1),
    MultiheadAttentionKind(),
    LinearKind(),
    Conv1DKind(),
)
EMBEDDING, LINEAR, CONV1D_TRANSFORMERS = KINDS[0], KINDS[5], KINDS[6]


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a base layer, None if no kind fits."""
    return next((kind for kind in KINDS if kind.matches(layer)), None)


def _kind_called(name: str) -> Kind:
    return next(kinds(name))


def kinds(*names: str) -> Iterator[Kind]:
    """The kinds of these names."""
    table = {kind.name: kind for kind in KINDS}
    return (table[name] for name in names)


def same_kind_layer(
    layer: nn.Module, fan_in: int, fan_out: int, *, pointwise: bool, bias: bool, device: torch.device
) -> nn.Module:
    """A convolution beside `layer`: over the same window with its padding, or pointwise with its groups.

    Its parameters, on that device, are not initialised.
    """
    cls = next(kind.layer_cls for kind in KINDS if isinstance(kind, ConvKind) and kind.matches(layer))
    if pointwise:
        return nn.utils.skip_init(cls, fan_in, fan_out, 1, groups=layer.groups, bias=bias, device=device)
    return nn.utils.skip_init(
        cls,
        fan_in,
        fan_out,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=bias,
        device=device,
    )
