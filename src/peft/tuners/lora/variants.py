"""The variants by kind of layer: which requested switches are served by which class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .dora import (
    DoraConv1dLayer,
    DoraConv2dLayer,
    DoraConv3dLayer,
    DoraEmbeddingLayer,
    DoraLinearLayer,
)
from .variant import LoraVariant

if TYPE_CHECKING:
    from .layer import LoraLayer


class DoraLinearVariant(LoraVariant):
    """DoRA on a linear layer: the output gains (m/‖V‖ - 1)·W·x + m/‖V‖·s·B·A·x."""

    magnitude_cls: type[DoraLinearLayer] = DoraLinearLayer

    @classmethod
    def init(cls, module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        magnitude = cls.magnitude_cls(fan_in_fan_out=getattr(module, "fan_in_fan_out", False))
        A, B = cls.factors(module, adapter_name)
        place_on_cpu = module.ephemeral_gpu_offload and A.device.type == "cpu"
        magnitude.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=A,
            lora_B=B,
            scaling=module.scaling[adapter_name],
            place_on_cpu=place_on_cpu,
            weight=module.unmerged_weight() if module.merged_adapters else None,
        )
        module.lora_magnitude_vector[adapter_name] = magnitude

    @staticmethod
    def factors(module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        return module.lora_A[adapter].weight, module.lora_B[adapter].weight

    @classmethod
    def forward(
        cls, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        dropout = module.lora_dropout[active_adapter]
        undropped = isinstance(dropout, nn.Identity) or not module.training
        return result + module.lora_magnitude_vector[active_adapter](
            dropout(x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=result if undropped else None,
        )

    @classmethod
    def gain(cls, module: LoraLayer, adapter: str) -> torch.Tensor:
        """m/‖V‖ with V from the base weight without merged adapters, shaped to scale the base weight's own layout."""
        magnitude = module.lora_magnitude_vector[adapter]
        A, B = cls.factors(module, adapter)
        gain = magnitude.weight / magnitude.norm(module.unmerged_weight(), A, B, module.scaling[adapter])
        return gain.view([1, -1] if module.fan_in_fan_out else [-1] + [1] * (gain.dim() - 1 or 1))

    @classmethod
    def merge_safe(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        merged = cls.gain(module, active_adapter) * (orig_weight + module.get_delta_weight(active_adapter))
        return merged.to(orig_weight.dtype)

    @classmethod
    def unmerge(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        base = orig_weight / cls.gain(module, active_adapter) - module.get_delta_weight(active_adapter)
        return base.to(orig_weight.dtype)


class DoraEmbeddingVariant(DoraLinearVariant):
    """DoRA on an embedding: the rows become m/‖V‖ ⊙ (W + s·B·A)[x]."""

    magnitude_cls = DoraEmbeddingLayer

    @staticmethod
    def factors(module: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]

    @classmethod
    def forward(
        cls, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        A, B = cls.factors(module, active_adapter)
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


class DoraConv1dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv1d`."""

    magnitude_cls = DoraConv1dLayer


class DoraConv2dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv2d`."""

    magnitude_cls = DoraConv2dLayer


class DoraConv3dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv3d`."""

    magnitude_cls = DoraConv3dLayer


LINEAR_VARIANTS: dict[tuple[str, ...], type[LoraVariant]] = {("use_dora",): DoraLinearVariant}
EMBEDDING_VARIANTS: dict[tuple[str, ...], type[LoraVariant]] = {("use_dora",): DoraEmbeddingVariant}
CONV_VARIANTS: dict[str, dict[tuple[str, ...], type[LoraVariant]]] = {
    "conv1d": {("use_dora",): DoraConv1dVariant},
    "conv2d": {("use_dora",): DoraConv2dVariant},
    "conv3d": {("use_dora",): DoraConv3dVariant},
}
