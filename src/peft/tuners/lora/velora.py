"""VeLoRA: the input of A is kept compressed until the backward pass (arXiv 2405.17991).

The gradient of A takes the layer's input, which is most of what training has to keep in memory. Each token is split into
`num_groups` sub-tokens, and of each sub-token only its coordinate along a direction e is kept:

    c[t, j] = ⟨x[t, j], e⟩          x̃[t, j] = scale · c[t, j] · e

The output and the gradient of the input are exact; the gradient of A is that for x̃ instead of x. The tokens of a
convolution are its pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from ...utils.buffer_dict import BufferDict
from .variant import LoraVariant, register_variant

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


def sub_tokens(x: torch.Tensor, num_groups: int, width: int) -> torch.Tensor:
    """Tokens split into groups of features, the last ones padded by zeros.

    Args:
        x: (..., in) with in ≤ num_groups · width.
        num_groups: groups per token.
        width: features per group.

    Returns:
        (tokens, num_groups, width).
    """
    tokens = x.reshape(-1, x.shape[-1])
    return F.pad(tokens, (0, num_groups * width - x.shape[-1])).view(-1, num_groups, width)


def unit(vector: torch.Tensor) -> torch.Tensor:
    """A vector scaled to length one; all ones scaled to it for the zero vector, which has no direction."""
    norm = vector.norm()
    return torch.where(norm > 0, vector / norm, len(vector) ** -0.5)


class VeloraFunction(torch.autograd.Function):
    """x·Wᵀ + b that keeps of x one number per sub-token for the gradient of W."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        embed: torch.Tensor,
        num_groups: int,
        velora_scale: float,
    ) -> torch.Tensor:
        """The exact output.

        Args:
            ctx: what is kept for the backward pass.
            input: x, (..., in).
            weight: W, (r, in).
            bias: (r,), or None.
            embed: the direction e, (⌈in / num_groups⌉,).
            num_groups: sub-tokens per token.
            velora_scale: factor of the reconstruction.

        Returns:
            (..., r).
        """
        coordinates = sub_tokens(input, num_groups, len(embed)) @ embed.to(input.dtype)
        ctx.save_for_backward(coordinates, weight, embed)
        ctx.velora_scale = velora_scale
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The exact gradients of x and b, and that of W for the reconstructed x."""
        coordinates, weight, embed = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            # Gᵀ·x̃ is (Gᵀ·c) ⊗ e, so that x̃ is never formed.
            along = ctx.velora_scale * (grad.T @ coordinates.to(grad.dtype))
            grad_weight = (along.unsqueeze(-1) * embed.to(grad.dtype)).flatten(1)[:, : weight.shape[1]]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, grad_bias, None, None, None


class VeloraConvFunction(torch.autograd.Function):
    """A convolution without bias that keeps of x one number per sub-token of a pixel for the gradient of W."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: torch.Tensor,
        weight: torch.Tensor,
        embed: torch.Tensor,
        num_groups: int,
        velora_scale: float,
        convolve: Callable[[torch.Tensor, torch.Tensor, None], torch.Tensor],
    ) -> torch.Tensor:
        """The exact output.

        Args:
            ctx: what is kept for the backward pass.
            input: x, (channels, ...), with or without a batch.
            weight: W, (r, channels, *kernel).
            embed: the direction e, (⌈channels / num_groups⌉,).
            num_groups: sub-tokens per pixel.
            velora_scale: factor of the reconstruction.
            convolve: of x, W and no bias.
        """
        pixels = input.movedim(1 - weight.dim(), -1)
        coordinates = sub_tokens(pixels, num_groups, len(embed)) @ embed.to(input.dtype)
        ctx.save_for_backward(coordinates, weight, embed)
        ctx.velora_scale, ctx.convolve, ctx.pixels = velora_scale, convolve, pixels.shape
        return convolve(input, weight, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x, which does not depend on x, and that of W for the reconstructed x."""
        coordinates, weight, embed = ctx.saved_tensors
        dtype, (*places, channels) = grad_output.dtype, ctx.pixels
        pixels = ctx.velora_scale * (coordinates.unsqueeze(-1) * embed.to(coordinates.dtype)).flatten(1)[:, :channels]
        x = pixels.view(*places, channels).movedim(-1, 1 - weight.dim()).to(dtype).requires_grad_()
        W = weight.detach().to(dtype).requires_grad_()
        with torch.enable_grad():
            grads = torch.autograd.grad(ctx.convolve(x, W, None), (x, W), grad_output)
        return *grads, None, None, None, None


@register_variant("velora_config", kinds=("linear", "conv1d_transformers"))
class VeloraLinearVariant(LoraVariant):
    """VeLoRA on a linear layer: plain LoRA but for what is kept to train it.

    The direction e is saved with the adapter, so that training goes on from a file as it would have without one.
    """

    containers: ClassVar[dict[str, Callable[[], Any]]] = {
        "lora_velora_embed": partial(BufferDict, persistent=True),
        "lora_velora_initialized": dict,
        "lora_velora_num_groups": dict,
        "lora_velora_init_type": dict,
        "lora_velora_scale": dict,
    }
    plain_at_inference = True

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        velora = config.velora_config
        is_random = velora.init_type == "random"
        embed = module.empty(-(-module.in_features // velora.num_groups))
        if not embed.is_meta:
            embed = unit(embed.normal_()) if is_random else embed.zero_()
        module.lora_velora_embed[adapter_name] = embed
        module.lora_velora_initialized[adapter_name] = is_random
        module.lora_velora_num_groups[adapter_name] = velora.num_groups
        module.lora_velora_init_type[adapter_name] = velora.init_type
        module.lora_velora_scale[adapter_name] = velora.scale

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x)
        if module.training and torch.is_grad_enabled() and A.weight.requires_grad:
            hidden = _compressed(module, active_adapter, A, x)
        else:
            hidden = A(x)
        return result + B(hidden) * module.scaling[active_adapter]


@register_variant("velora_config", kinds=("conv1d", "conv2d", "conv3d"))
class VeloraConvNdVariant(VeloraLinearVariant):
    """VeLoRA on a convolution."""


def _compressed(module: LoraLayer, adapter: str, A: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A(x), for which x is kept compressed."""
    options = module.lora_velora_num_groups[adapter], module.lora_velora_scale[adapter]
    if isinstance(A, nn.Linear):
        return VeloraFunction.apply(x, A.weight, A.bias, direction(module, adapter, x), *options)
    e = direction(module, adapter, x.movedim(1 - A.weight.dim(), -1))
    return VeloraConvFunction.apply(x, A.weight, e, *options, A._conv_forward)


@torch.no_grad()
def direction(module: LoraLayer, adapter: str, x: torch.Tensor) -> torch.Tensor:
    """The direction e for a training step; estimated from its input if the adapter's `init_type` says so.

    Args:
        module: the layer.
        adapter: the adapter.
        x: the input of A, (..., in), with the channels last.

    Returns:
        (⌈in / num_groups⌉,), not the buffer itself: that may change before the backward pass.
    """
    embed = module.lora_velora_embed[adapter]
    if x.numel() and _is_to_be_estimated(module, adapter, embed):
        groups = sub_tokens(x, module.lora_velora_num_groups[adapter], len(embed))
        embed.copy_(unit(groups.mean((0, 1), dtype=torch.float32)))
        module.lora_velora_initialized[adapter] = True
    return embed.clone()


def _is_to_be_estimated(module: LoraLayer, adapter: str, embed: torch.Tensor) -> bool:
    init_type = module.lora_velora_init_type[adapter]
    if init_type == "batch_average":
        return True
    if module.lora_velora_initialized[adapter]:
        return False
    # Zero until it is estimated, and a unit vector from then on: so is one that came from a file.
    module.lora_velora_initialized[adapter] = bool(embed.any())
    return not module.lora_velora_initialized[adapter]
