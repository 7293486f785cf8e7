"""LoRA on `nn.MultiheadAttention`: on its packed in-projection and, by a layer inside it, on its out-projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.layer import BaseTunerLayer
from .layer import Linear, LoraLayer

if TYPE_CHECKING:
    from .config import LoraConfig


class MultiheadAttention(LoraLayer, nn.Module):
    """A of the in-projection is (r, E), B is (3E, r); the out-projection has a LoRA layer of its own."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        if not isinstance(base_layer.out_proj, (nn.Linear, BaseTunerLayer)):
            raise TypeError(f"out_proj must be a Linear, got {type(base_layer.out_proj).__name__}.")
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter here and on the out-projection; arguments as `LoraLayer.update_layer`."""
        LoraLayer.update_layer(self, *args, **kwargs)
        projection = self.base_layer.out_proj
        if isinstance(projection, Linear):
            projection.update_layer(*args, **kwargs)
        else:
            adapter_name, r = (*args, *kwargs.values())[:2] if len(args) < 2 else args[:2]
            options = {key: value for key, value in kwargs.items() if key not in ("adapter_name", "r")}
            self.base_layer.out_proj = Linear(projection, adapter_name, r=r, **options)

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        Linear._make_factors(self, adapter_name, r, bias)

    # What torch's own transformer layers read from an attention module.

    @property
    def embed_dim(self) -> int:
        return self.get_base_layer().embed_dim

    @property
    def kdim(self) -> int:
        return self.get_base_layer().kdim

    @property
    def vdim(self) -> int:
        return self.get_base_layer().vdim

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.get_base_layer()._qkv_same_embed_dim

    @property
    def num_heads(self) -> int:
        return self.get_base_layer().num_heads

    @property
    def dropout(self) -> float:
        return self.get_base_layer().dropout

    @property
    def batch_first(self) -> bool:
        return self.get_base_layer().batch_first

    @property
    def head_dim(self) -> int:
        return self.get_base_layer().head_dim

    @property
    def in_proj_weight(self) -> nn.Parameter:
        return self.get_base_layer().in_proj_weight

    @property
    def in_proj_bias(self) -> nn.Parameter | None:
        return self.get_base_layer().in_proj_bias

    @property
    def out_proj(self) -> nn.Module:
        projection = self.get_base_layer().out_proj
        return projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection

    @property
    def bias_k(self) -> nn.Parameter | None:
        return self.get_base_layer().bias_k

    @property
    def bias_v(self) -> nn.Parameter | None:
        return self.get_base_layer().bias_v

    @property
    def add_zero_attn(self) -> bool:
        return self.get_base_layer().add_zero_attn

    def merge_masks(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's."""
        return self.get_base_layer().merge_masks(*args, **kwargs)

    @property
    def weight(self) -> torch.Tensor:
        return self.get_base_layer().in_proj_weight

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return self.delta_weight(adapter)

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        return {"in_proj_weight": tensors["in_proj_weight"] + self.get_delta_weight(adapter)}

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Raise if a mixed batch is asked for: the heads of an attention see the batch as one.

        Raises:
            TypeError: `adapter_names` is given.
        """
        if "adapter_names" in kwargs:
            raise TypeError(f"{self.called} does not support mixed batches (adapter_names).")

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base layer's output and attention weights with the active adapters applied.

        Args:
            query: as `nn.MultiheadAttention` takes it; so are `args` and `kwargs`.

        Raises:
            ValueError: the out-projection has other active adapters.
        """
        if "adapter_names" in kwargs or self.roster.batch is not None:
            self._check_forward_args(query, adapter_names=None)
        projection = self.base_layer.out_proj
        plan, inner_plan = self.plan, projection.plan
        if [name for name, _ in plan] != [name for name, _ in inner_plan]:
            raise ValueError(
                f"{self.called} has the active adapters {self.active_adapters}, but its "
                f"out_proj {projection.active_adapters}; activate the same ones."
            )
        if not plan:
            return self.base_layer(query, *args, **kwargs)
        tensors = self._adapted_tensors([name for name, _ in plan])
        output, weights = self.kind.call_with(self.base_layer, tensors, query, *args, **kwargs)
        return output.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def _adapted_tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Weights with the adapters in them, differentiable, by their names inside the base layer."""
        projection = self.base_layer.out_proj
        folded = dict(self._folded(self, names))
        return folded | {f"out_proj.base_layer.{key}": value for key, value in self._folded(projection, names).items()}

    @staticmethod
    def _folded(layer: LoraLayer, names: list[str]) -> dict[str, torch.Tensor]:
        before = layer.base_tensors()
        after = dict(before)
        for name in names:
            after.update({key: value.to(before[key].dtype) for key, value in layer.fold(after, name).items()})
        return {key: value for key, value in after.items() if value is not before[key]}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain attention module, adapters folded in if asked."""
        projection = self.base_layer.out_proj
        for layer in (self, projection):
            if merge:
                layer.merge_for_good(safe_merge=safe_merge, adapter_names=adapter_names)
            elif layer.merged_adapters:
                layer.unmerge()
        self.base_layer.out_proj = projection.get_base_layer()
        return self.base_layer
