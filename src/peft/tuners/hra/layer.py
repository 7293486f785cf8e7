"""HRA on linear layers and convolutions (arXiv 2405.17484): W' = W·H with H a product of Householder reflections."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.layer import BaseTunerLayer, MultiplicativeLayer, check_adapters_to_merge
from .reflections import orthogonal_reflection, product_of_reflections, reflect

if TYPE_CHECKING:
    from .config import HRAConfig


class HRALayer(MultiplicativeLayer):
    """Holds the directions of any number of adapters' reflections beside a base layer.

    A direction of zeros is none, and makes the output NaN.

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("hra_u",)
    other_param_names = ("hra_r", "hra_apply_GS")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.hra_r: dict[str, int] = {}
        self.hra_apply_GS: dict[str, bool] = {}

    # ------------------------------------------------------------------------------------------------------ adding

    def update_layer(self, adapter_name: str, r: int, config: HRAConfig, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            r: number of reflections.
            config: everything else.
            kwargs: what depends on the module, such as `target_name`.

        Raises:
            ValueError: `r` is not positive.
        """
        where = self._label or kwargs.get("target_name") or f"An {type(self).__name__}"
        if r <= 0:
            raise ValueError(
                f"{where}: the adapter {adapter_name!r} must have a positive number of reflections, got r={r}; the "
                "smallest that starts as the identity is 2."
            )
        self.hra_r[adapter_name] = r
        self.hra_apply_GS[adapter_name] = config.apply_GS
        self.hra_u[adapter_name] = nn.Parameter(self.empty(self._size(), r))
        if config.init_weights and config.apply_GS:
            warnings.warn(
                f"{where}: with apply_GS=True the adapter {adapter_name!r} does not start as the identity: the second "
                "of each pair of equal directions adds nothing to the first until training tells them apart."
            )
        if config.init_weights:
            self.reset_hra_parameters(adapter_name)
        else:
            self.reset_hra_parameters_random(adapter_name)
        self._settle(adapter_name, inference_mode=config.inference_mode)

    def _size(self) -> int:
        """d, the number of weights of one output feature."""
        return math.prod(self.kind.shape(self.get_base_layer())[1:])

    def reset_hra_parameters(self, adapter_name: str) -> None:
        """Start over with pairs of equal directions, whose reflections cancel; an odd number starts at random.

        Args:
            adapter_name: the adapter.
        """
        u = self.hra_u[adapter_name]
        if u.shape[1] % 2:
            warnings.warn(
                f"{self._label or type(self).__name__}: r={u.shape[1]} is odd, so the adapter {adapter_name!r} cannot "
                "start as the identity and starts at random."
            )
            self.reset_hra_parameters_random(adapter_name)
            return
        half = torch.empty(len(u), u.shape[1] // 2, dtype=u.dtype, device=u.device)
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        u.data = half.repeat_interleave(2, dim=1)

    def reset_hra_parameters_random(self, adapter_name: str) -> None:
        """Start over with independent directions.

        Args:
            adapter_name: the adapter.
        """
        nn.init.kaiming_uniform_(self.hra_u[adapter_name], a=math.sqrt(5))

    # ------------------------------------------------------------------------------------------------- the product

    def compact_form(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """U (d, r) and S (r, r) with H = I - U·S·Uᵀ, in float32 at least."""
        u = self.hra_u[adapter]
        u = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
        return orthogonal_reflection(u) if self.hra_apply_GS[adapter] else product_of_reflections(u)

    def get_delta_weight(self, adapter_name: str, reverse: bool = False) -> torch.Tensor:
        """H itself, (d, d), in the adapter's dtype: no difference of weights.

        Args:
            adapter_name: a name this layer holds.
            reverse: the reflections in the opposite order, which is the inverse.
        """
        U, S = self.compact_form(adapter_name)
        identity = torch.eye(len(U), dtype=U.dtype, device=U.device)
        return reflect(identity, U, S.mT if reverse else S).to(self.hra_u[adapter_name].dtype)

    def adapted_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """W·H, in the wider of the two dtypes."""
        U, S = self.compact_form(adapter)
        wide = torch.promote_types(weight.dtype, U.dtype)
        return reflect(weight.flatten(1).to(wide), U.to(wide), S.to(wide)).view_as(weight)

    def __repr__(self) -> str:
        return f"hra.{super().__repr__()}"


class _Layer(HRALayer, nn.Module):
    """An HRA layer with its first adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        config: its configuration.
        r: number of reflections.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HRAConfig, r: int = 0, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        HRALayer.__init__(self, base_layer, **kwargs)
        self.update_layer(adapter_name, r, config=config, **kwargs)


class HRALinear(_Layer):
    """HRA on `nn.Linear`, quantised ones included, and transformers' `Conv1D`: H is (in, in).

    Since W·H·x = W·(H·x), the input is reflected and the base layer's own forward does the rest.
    """

    def _size(self) -> int:
        return self.in_features

    def reflected(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """H·x of one adapter, computed in float32 at least.

        Args:
            x: (..., in).
            adapter: a name this layer holds.
        """
        U, S = self.compact_form(adapter)
        x = self._cast_input_dtype(x, U.dtype)
        return reflect(x, U.to(x.dtype), S.mT.to(x.dtype))

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = x.dtype
        for adapter in reversed(plan):  # W·H₁·H₂·x: the last acts first
            x = self.reflected(x, adapter)
        return self.base_layer(x.to(dtype), *args, **kwargs).to(dtype)

    def mixed_forward(self, x: torch.Tensor, rows: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        for adapter, index in rows.items():
            x = x.index_copy(0, index, self.reflected(x[index], adapter).to(x.dtype))
        return self.base_layer(x, *args, **kwargs)


class _HRAConvNd(_Layer):
    """HRA on a convolution: W is taken as (out, C·k·k), C the input channels of a group.

    H is the same for all groups.
    """


class HRAConv1d(_HRAConvNd):
    """HRA on `nn.Conv1d`."""


class HRAConv2d(_HRAConvNd):
    """HRA on `nn.Conv2d`."""


class HRAConv3d(_HRAConvNd):
    """HRA on `nn.Conv3d`."""


__all__ = [
    "BaseTunerLayer",
    "HRAConv1d",
    "HRAConv2d",
    "HRAConv3d",
    "HRALayer",
    "HRALinear",
    "check_adapters_to_merge",
]
