"""LoRA on convolutions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.kinds import same_kind_layer
from ...utils.tensors import product
from .layer import LoraLayer

if TYPE_CHECKING:
    from .config import LoraConfig


class _ConvNd(LoraLayer, nn.Module):
    """LoRA on a convolution: A convolves over the base layer's window into r channels, B is pointwise.

    With groups, A sees all input channels; such an adapter has no merged weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        if self.get_base_layer().groups > 1:
            warnings.warn(
                f"{kwargs.get('target_name') or 'A convolution'} has {self.get_base_layer().groups} groups, while A "
                "sees all channels: the adapter cannot be merged."
            )
        self._kernel_dim = self.weight.dim()
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _check_kernel(self, dimensions: int) -> None:
        if self._kernel_dim != dimensions + 2:
            raise ValueError(
                f"{type(self).__name__} adapts convolutions over {dimensions} dimensions, got a "
                f"{type(self.get_base_layer()).__name__}; use Conv{self._kernel_dim - 2}d."
            )

    def _check_config(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        super()._check_config(adapter_name, r, config)
        groups = self.get_base_layer().groups
        if r % groups:
            raise ValueError(
                f"{self.called} has {groups} groups, so its rank must be a multiple of {groups}, "
                f"got r={r}; nearest is {max(groups, round(r / groups) * groups)}."
            )

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        layer = self.get_base_layer()
        device = self.empty(0).device
        A = same_kind_layer(layer, layer.in_channels, r, pointwise=False, bias=False, device=device)
        B = same_kind_layer(layer, r, layer.out_channels, pointwise=True, bias=bias, device=device)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = A, B

    def plain_delta(self, adapter: str, gains: torch.Tensor | None = None) -> torch.Tensor:
        A, B = self.factors(adapter)
        if self.get_base_layer().groups > 1:
            raise NotImplementedError(
                f"{self.called} has {self.get_base_layer().groups} groups, while LoRA's A sees all "
                f"channels: the adapter {adapter!r} has no weight of the base's shape and cannot be merged."
            )
        return self.scaling[adapter] * product(B.flatten(1), A.flatten(1), gains).view(len(B), *A.shape[1:])


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_kernel(1)


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_kernel(2)


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_kernel(3)
