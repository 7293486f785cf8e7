"""DoRA, weight-decomposed low-rank adaptation (arXiv 2402.09353).

W' = m/‖V‖ ⊙ V with V = W + s·B·A and the norm per output feature, which counts as a constant in the gradient.

V is formed by one kernel that adds the product to W, and W·x by the base layer; the output is put together from
m/‖V‖·(W·x + s·B·A·x) + b.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.backends import dense_weight
from ...engine.sharding import gathered
from ...utils.tensors import add_product, is_bare, weight_of
from .base_weight import coming_weight
from .variant import LoraVariant, register_variant

if TYPE_CHECKING:
    from .layer import LoraLayer

ENABLE_DORA_CACHING = False
"""Whether magnitude modules remember their norm in eval mode; see `peft.helpers.DoraCaching`."""


def row_norms(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """‖W + s·B·A‖ per row.

    Args:
        weight: W, (out, in).
        A: (r, in).
        B: (out, r).
        scaling: s.

    Returns:
        (out,), in float32 or the wider of the dtypes.
    """
    if not (weight.dtype is A.dtype is B.dtype is torch.float32):
        dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
        weight, A, B = weight.to(dtype), A.to(dtype), B.to(dtype)
    return torch.linalg.vector_norm(add_product(weight, B, A.T, scaling), dim=1)


def cache_decorator(cache_key: str) -> Callable[[Callable], Callable]:
    """A decorator for a method of a magnitude module: in eval mode its result is remembered, if that is switched on.

    A call that is not to use what is remembered forgets it.

    Args:
        cache_key: under which name.
    """

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def remembering(self: DoraLinearLayer, *args: Any, **kwargs: Any) -> Any:
            if not ENABLE_DORA_CACHING or self.training:
                if self._remembered:
                    self._remembered = {}
                return method(self, *args, **kwargs)
            if cache_key not in self._remembered:
                self._remembered[cache_key] = method(self, *args, **kwargs)
            return self._remembered[cache_key]

        return remembering

    return decorate


class DoraLinearLayer(nn.Module):
    """Holds the magnitude m of one adapter, and computes norms for it.

    Args:
        fan_in_fan_out: whether the base layer stores its weight (in, out).
    """

    def __init__(self, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        self._remembered: dict[str, torch.Tensor] = {}

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        """The base weight as a matrix with one row per output feature."""
        weight = weight.T if self.fan_in_fan_out else weight
        return weight if weight.dim() == 2 else weight.flatten(1)

    def norm_shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        """Shape in which the norms are kept."""
        return (len(self.canonical(weight)),)

    @torch.no_grad()
    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """‖W + s·BA‖ per output feature.

        Args:
            weight: the base weight in its own layout.
            lora_weight: B·A, canonical.
            scaling: s.
            adapter_name: of no effect.
        """
        combined = self.canonical(weight) + scaling * lora_weight.to(weight).flatten(1)
        return torch.linalg.vector_norm(combined, dim=1).view(self.norm_shape(weight)).to(combined.dtype)

    def get_lora_weight(self, lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> torch.Tensor:
        """B·A, canonical."""
        A, B = _factor(lora_A), _factor(lora_B)
        return B.flatten(1) @ A.flatten(1)

    @cache_decorator("norm")
    @torch.no_grad()
    def norm(self, weight: torch.Tensor, lora_A: Any, lora_B: Any, scaling: float) -> torch.Tensor:
        """The same as `get_weight_norm` from A and B; remembered in eval mode if caching is switched on."""
        # Autocast would round the norms. In torch 2.6 it would also keep its casts of A and B, which have no gradient
        # here, for the multiplications that are to give them one.
        with torch.autocast(weight.device.type, enabled=False) if not weight.is_meta else nullcontext():
            return self.fresh_norm(weight, _factor(lora_A), _factor(lora_B), scaling)

    def gain(self, base_layer: nn.Module, lora_A: Any, lora_B: Any, scaling: float) -> torch.Tensor:
        """m/‖V‖, in the shape of m."""
        magnitude = self._parameters.get("weight")
        magnitude = self.weight if magnitude is None else magnitude  # FSDP1 makes it part of a flat one
        norm = self.norm(dense_weight(base_layer), lora_A, lora_B, scaling)
        return magnitude / (norm if norm.dtype is magnitude.dtype else norm.to(magnitude.dtype))

    def fresh_norm(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
        return row_norms(self.canonical(weight), A, B, scaling)

    def train(self, mode: bool = True) -> DoraLinearLayer:
        self._remembered = {}
        return super().train(mode)

    def update_layer(
        self,
        *,
        base_layer: nn.Module,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        place_on_cpu: bool = False,
        weight: torch.Tensor | None = None,
    ) -> None:
        """Start the magnitude as the norm of the weight with the adapter in it.

        Args:
            base_layer: the innermost base layer.
            lora_A, lora_B: the factors as modules or tensors.
            scaling: s.
            place_on_cpu: where to put the magnitude, whatever computed it.
            weight: the base weight, where it is not what the base layer has at the moment.
        """
        weight = dense_weight(base_layer) if weight is None else weight
        A = _factor(lora_A)
        if A.is_meta:
            self.weight = nn.Parameter(torch.empty(self.norm_shape(weight), dtype=weight.dtype, device="meta"))
            return
        magnitude = self.norm(weight, lora_A, lora_B, scaling).to(_dtype_of(weight, A))
        self.weight = nn.Parameter(magnitude.cpu() if place_on_cpu else magnitude)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        """What the adapter adds to the output: (m/‖V‖ - 1)·W·x + m/‖V‖·s·B(A(x)).

        Args:
            x: the input, dropped out already.
            lora_A, lora_B: the factors.
            scaling: s.
            base_layer: the base layer.
            base_result: its output with bias, where x is the undropped input; W·x is computed otherwise.
            adapter_name: of no effect.
        """
        gain = self.gain(base_layer, lora_A, lora_B, scaling)
        if base_result is None:
            base_result = self.base_output(x, base_layer, dense_weight(base_layer).to(x.dtype))
        elif getattr(base_layer, "bias", None) is not None:
            base_result = base_result - base_layer.bias.to(base_result.dtype).view(self.bias_shape())
        return (gain - 1) * base_result + gain * lora_B(lora_A(x)) * scaling

    def bias_shape(self) -> tuple[int, ...]:
        return (-1,)

    def base_output(self, x: torch.Tensor, base_layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """W·x without bias."""
        return nn.functional.linear(x, weight.T if self.fan_in_fan_out else weight)

    def __repr__(self) -> str:
        return f"lora.dora.{super().__repr__()}"


def _factor(factor: Any) -> torch.Tensor:
    return factor if torch.is_tensor(factor) else weight_of(factor)


def _dtype_of(weight: torch.Tensor, A: torch.Tensor) -> torch.dtype:
    return A.dtype if A.is_floating_point() else weight.dtype


class DoraEmbeddingLayer(DoraLinearLayer):
    """The magnitude of an embedding's adapter, one value per column of the table."""

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T

    def get_lora_weight(self, lora_A: Any, lora_B: Any, adapter_name: str | None = None) -> torch.Tensor:
        return _factor(lora_B) @ _factor(lora_A)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        base_layer: nn.Module,
        embed_fn: Any,
        adapter_name: str = "default",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gain m/‖V‖, and what the adapter adds: gain·s·embed(x, Aᵀ)·Bᵀ.

        Args:
            x: ids.
            lora_A: A, (r, entries).
            lora_B: B, (width, r).
            scaling: s.
            base_layer: the embedding.
            embed_fn: looks ids up in a table as the base layer does.
            adapter_name: of no effect.
        """
        gain = self.gain(base_layer, lora_A, lora_B, scaling)
        return gain, gain * (embed_fn(x, lora_A.T) @ lora_B.T) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    """The magnitude of a convolution's adapter, shaped to scale its channels."""

    def norm_shape(self, weight: torch.Tensor) -> tuple[int, ...]:
        return (1, len(weight), *[1] * (weight.dim() - 2))

    def bias_shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def fresh_norm(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
        A, B = A.flatten(1), B.flatten(1)
        if A.shape[1] == weight[0].numel():
            return super().fresh_norm(weight, A, B, scaling).view(self.norm_shape(weight))
        # With groups the product has not the weight's shape; files were trained with it read row by row.
        return self.get_weight_norm(weight, (B.reshape(-1, len(A)) @ A).view_as(weight), scaling)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """As `DoraLinearLayer.forward`, also for a single image without batch."""
        added = super().forward(x, **kwargs)
        return added.squeeze(0) if x.dim() < self.weight.dim() else added

    def base_output(self, x: torch.Tensor, base_layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        return base_layer._conv_forward(x, weight, None)


class DoraConv1dLayer(_DoraConvNdLayer):
    """The magnitude of a Conv1d's adapter."""


class DoraConv2dLayer(_DoraConvNdLayer):
    """The magnitude of a Conv2d's adapter."""


class DoraConv3dLayer(_DoraConvNdLayer):
    """The magnitude of a Conv3d's adapter."""


# ------------------------------------------------------------------------------------------------------------ the variants


def _factors(module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight


def _add_magnitude(module: LoraLayer, adapter: str, magnitude_cls: type[DoraLinearLayer]) -> None:
    magnitude = magnitude_cls(fan_in_fan_out=getattr(module, "fan_in_fan_out", False))
    A, B = _factors(module, adapter)
    with gathered(module.get_base_layer()):
        magnitude.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=A,
            lora_B=B,
            scaling=module.scaling[adapter],
            place_on_cpu=module.ephemeral_gpu_offload and A.device.type == "cpu",
            weight=_weight_to_be(module),
        )
    module.lora_magnitude_vector[adapter] = magnitude


def _weight_to_be(module: LoraLayer) -> torch.Tensor | None:
    """The base weight that the adapter is going to have, where it is not the one that the base layer has now."""
    return module.unmerged_weight() if module.merged_adapters else coming_weight(module)


def _gain(module: LoraLayer, adapter: str) -> torch.Tensor:
    """m/‖V‖ with V from the base weight without merged adapters, shaped to scale the base weight's own layout."""
    magnitude = module.lora_magnitude_vector[adapter]
    gain = magnitude.weight / magnitude.norm(
        module.unmerged_weight(), *_factors(module, adapter), module.scaling[adapter]
    )
    return gain.view([1, -1] if module.fan_in_fan_out else [-1] + [1] * (gain.dim() - 1 or 1))


def _scaled(
    gain: torch.Tensor,
    result: torch.Tensor,
    hidden: torch.Tensor,
    B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """gain ⊙ (result - b + s·hidden·Bᵀ) + b."""
    if bias is None:
        return gain * add_product(result, hidden, B, scaling)
    bias = bias if bias.dtype is result.dtype else bias.to(result.dtype)
    return torch.addcmul(bias, gain, add_product(result - bias, hidden, B, scaling))


@register_variant("use_dora", kinds=("linear", "conv1d_transformers"))
class DoraLinearVariant(LoraVariant):
    """DoRA on a linear layer: the output gains (m/‖V‖ - 1)·W·x + m/‖V‖·s·B·A·x."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        _add_magnitude(module, adapter_name, DoraLinearLayer)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        held = (module._modules[name]._modules[active_adapter] for name in ("lora_dropout", "lora_A", "lora_B"))
        dropout, A, B = held
        undropped = isinstance(dropout, nn.Identity) or not module.training
        if undropped and is_bare(A) and is_bare(B) and result.dtype is x.dtype is A._parameters["weight"].dtype:
            a, b = A._parameters["weight"], B._parameters["weight"]
            scaling, base_layer = module._scaling[active_adapter], module.get_base_layer()
            gain = module._modules["lora_magnitude_vector"]._modules[active_adapter].gain(base_layer, a, b, scaling)
            return _scaled(gain, result, nn.functional.linear(x, a), b, scaling, base_layer.bias)
        return result + module.lora_magnitude_vector[active_adapter](
            dropout(x),
            lora_A=A,
            lora_B=B,
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=result if undropped else None,
        )

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        merged = _gain(module, active_adapter) * (orig_weight + module.get_delta_weight(active_adapter))
        return merged.to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        base = orig_weight / _gain(module, active_adapter) - module.get_delta_weight(active_adapter)
        return base.to(orig_weight.dtype)


@register_variant("use_dora", kinds=("embedding",))
class DoraEmbeddingVariant(DoraLinearVariant):
    """DoRA on an embedding: the rows become m/‖V‖ ⊙ (W + s·B·A)[x]."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        _add_magnitude(module, adapter_name, DoraEmbeddingLayer)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        A, B = _factors(module, active_adapter)
        gain, added = module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=A,
            lora_B=B,
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            embed_fn=module.embed,
        )
        return gain * result + added


class _DoraConvNdVariant(DoraLinearVariant):
    """DoRA on a convolution, with one magnitude per output channel."""


@register_variant("use_dora", kinds=("conv1d",))
class DoraConv1dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv1d`."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        _add_magnitude(module, adapter_name, DoraConv1dLayer)


@register_variant("use_dora", kinds=("conv2d",))
class DoraConv2dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv2d`."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        _add_magnitude(module, adapter_name, DoraConv2dLayer)


@register_variant("use_dora", kinds=("conv3d",))
class DoraConv3dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv3d`."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: Any, **kwargs: Any) -> None:
        _add_magnitude(module, adapter_name, DoraConv3dLayer)
