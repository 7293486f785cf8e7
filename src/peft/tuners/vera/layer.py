"""VeRA on every kind of layer (arXiv 2310.11454): W' = W + diag(λ_b)·B·diag(λ_d)·A.

A and B belong to the tuner; layers refer to them and use as many of their columns and rows as they need.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ...engine.kinds import embed_scale
from ...engine.layer import AdditiveLayer
from ...utils.buffer_dict import BufferDict

if TYPE_CHECKING:
    from .config import VeraConfig


class VeraLayer(AdditiveLayer):
    """Trains the scaling vectors λ_b (out,) and λ_d (r,) of any number of adapters.

    Args:
        base_layer: the layer to adapt. Its canonical weight (out, in, *kernel) counts as a matrix with one row per
            output feature.
        kwargs: `quantization_backend`.
    """

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("vera_A", "vera_B", "vera_dropout", "r")

    vera_A: BufferDict
    """Adapter name -> A (r, largest in of all layers); the tuner's own."""
    vera_B: BufferDict
    """Adapter name -> B (largest out of all layers, r); the tuner's own."""

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.vera_dropout = nn.ModuleDict()
        self.kwargs = kwargs
        self.fan_in_fan_out = self.kind is not None and self.kind.transposed

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canonical base weight, (out, in, *kernel)."""
        if self.kind is None:
            return (self.out_features, self.in_features)
        return self.kind.shape(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        vera_A: BufferDict,
        vera_B: BufferDict,
        r: int,
        config: VeraConfig,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            vera_A: the tuner's projections A by adapter, this one's among them: at least (r, in).
            vera_B: the tuner's projections B by adapter, this one's among them: at least (out, r).
            r: rank.
            config: everything else.
            inference_mode: use the adapter, but train nothing; `config.inference_mode` does the same.

        Raises:
            ValueError: `r` is not positive, or a projection is too small for this layer.
        """
        self._check_sizes(adapter_name, vera_A[adapter_name], vera_B[adapter_name], r)
        self.vera_A, self.vera_B = vera_A, vera_B
        self.r[adapter_name] = r
        self.scaling[adapter_name] = self.initial_scaling(adapter_name)
        dropout = config.vera_dropout
        self.vera_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        # The normal numbers are drawn even where they are not kept, so that a seed gives the same model as ever.
        self.vera_lambda_d[adapter_name] = nn.Parameter(nn.init.normal_(self.empty(r)))
        self.vera_lambda_b[adapter_name] = nn.Parameter(nn.init.ones_(self.empty(self.shape[0])))
        if config.init_weights:
            self.reset_vera_parameters(adapter_name, d_initial=config.d_initial)
        self._settle(adapter_name, inference_mode=inference_mode or config.inference_mode)

    def _check_sizes(self, adapter_name: str, A: torch.Tensor, B: torch.Tensor, r: int) -> None:
        if r <= 0:
            raise ValueError(f"The rank of {self._label or 'a VeRA layer'} must be positive, got r={r}.")
        fan_out, *fan_in = self.shape
        needed = {"vera_A": (A, (r, math.prod(fan_in))), "vera_B": (B, (fan_out, r))}
        for name, (projection, least) in needed.items():
            if any(size < wanted for size, wanted in zip(projection.shape, least)):
                raise ValueError(
                    f"{name} of the adapter {adapter_name!r} has the shape {tuple(projection.shape)}, and "
                    f"{self._label or type(self).__name__} needs at least {least}."
                )

    def reset_vera_parameters(self, adapter_name: str, d_initial: float = 0.1) -> None:
        """Start over without any effect: λ_b = 0.

        Args:
            adapter_name: the adapter; an unknown one is ignored.
            d_initial: the elements of λ_d.
        """
        if adapter_name in self.vera_lambda_d:
            nn.init.constant_(self.vera_lambda_d[adapter_name], d_initial)
            nn.init.zeros_(self.vera_lambda_b[adapter_name])

    # ----------------------------------------------------------------------------------------------------- forward

    def projections(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts of A and B that this layer uses: (r, in) and (out, r)."""
        r, (fan_out, *fan_in) = self.r[adapter], self.shape
        return self.vera_A[adapter][:r, : math.prod(fan_in)], self.vera_B[adapter][:fan_out, :r]

    def term(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """λ_b ⊙ B(λ_d ⊙ A(dropout(x))), without forming ΔW."""
        x = self._cast_term_input(x, self.vera_lambda_d[adapter].dtype)
        A, B = self.projections(adapter)
        return self.through(self.vera_dropout[adapter](x), A, self.vera_lambda_d[adapter], B, self._out_scale(adapter))

    def through(
        self, x: torch.Tensor, A: torch.Tensor, lambda_d: torch.Tensor, B: torch.Tensor, lambda_b: torch.Tensor
    ) -> torch.Tensor:
        """λ_b ⊙ B(λ_d ⊙ A(x)), with A applied as this kind of layer applies its weight."""
        raise NotImplementedError

    def _out_scale(self, adapter: str) -> torch.Tensor:
        return self.vera_lambda_b[adapter] * self.scaling[adapter]

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """diag(λ_b)·B·diag(λ_d)·A, canonical; half precision on the CPU is multiplied in float32."""
        A, B = self.projections(adapter)
        dtype = A.dtype
        if A.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            A, B = A.float(), B.float()
        lambda_b, lambda_d = self._out_scale(adapter).to(B), self.vera_lambda_d[adapter].to(A)
        return ((lambda_b[:, None] * B) @ (lambda_d[:, None] * A)).to(dtype).view(self.shape)

    def __repr__(self) -> str:
        return f"vera.{super().__repr__()}"


class _Layer(VeraLayer, nn.Module):
    def __init__(
        self,
        base_layer: nn.Module,
        vera_A: BufferDict,
        vera_B: BufferDict,
        adapter_name: str,
        config: VeraConfig,
        r: int = 0,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        VeraLayer.__init__(self, base_layer, **kwargs)
        self.update_layer(adapter_name, vera_A, vera_B, r, config)


class Linear(_Layer):
    """VeRA on `nn.Linear` and transformers' `Conv1D`."""

    def __init__(
        self,
        base_layer: nn.Module,
        vera_A: BufferDict,
        vera_B: BufferDict,
        adapter_name: str,
        config: VeraConfig,
        r: int = 0,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, vera_A, vera_B, adapter_name, config, r, **kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer or self.fan_in_fan_out

    def through(
        self, x: torch.Tensor, A: torch.Tensor, lambda_d: torch.Tensor, B: torch.Tensor, lambda_b: torch.Tensor
    ) -> torch.Tensor:
        hidden = lambda_d * F.linear(x, A.to(x))
        return lambda_b * F.linear(hidden, B.to(hidden))


class Embedding(_Layer):
    """VeRA on `nn.Embedding`, which the release leaves out: A has one column per entry of the table."""

    def through(
        self, x: torch.Tensor, A: torch.Tensor, lambda_d: torch.Tensor, B: torch.Tensor, lambda_b: torch.Tensor
    ) -> torch.Tensor:
        # Not by the base layer's own look-up: its max_norm would write into A, which others use too.
        hidden = lambda_d * F.embedding(x, A.T.to(lambda_d))
        term = lambda_b * F.linear(hidden, B.to(hidden))
        scale = embed_scale(self.get_base_layer())
        return term if scale is None else term * scale


class _ConvNd(_Layer):
    """VeRA on a convolution, which the release leaves out.

    A convolves over the base layer's window into r channels, B is pointwise; with groups, A is the same for each, and
    each has its rows of B.
    """

    def through(
        self, x: torch.Tensor, A: torch.Tensor, lambda_d: torch.Tensor, B: torch.Tensor, lambda_b: torch.Tensor
    ) -> torch.Tensor:
        layer = self.get_base_layer()
        window = (lambda_d[:, None] * A.to(lambda_d)).view(len(lambda_d), *self.shape[1:])
        hidden = self.kind.apply(layer, x, window.repeat(layer.groups, *[1] * (window.dim() - 1)).to(x))
        point = (lambda_b[:, None] * B.to(lambda_b)).view(*B.shape, *[1] * self.kind.dimensions)
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[self.kind.dimensions - 1]
        return pointwise(hidden, point.to(hidden), groups=layer.groups)


class Conv1d(_ConvNd):
    """VeRA on `nn.Conv1d`."""


class Conv2d(_ConvNd):
    """VeRA on `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """VeRA on `nn.Conv3d`."""


LAYER_CLASSES: dict[str, type[VeraLayer]] = {
    "linear": Linear,
    "conv1d_transformers": Linear,
    "embedding": Embedding,
    "conv1d": Conv1d,
    "conv2d": Conv2d,
    "conv3d": Conv3d,
}

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "VeraLayer"]
