"""OFT on every kind of layer (arXiv 2306.07280): W' = W·Tᵀ with a block-diagonal rotation T.

Since W·Tᵀ·x = W·(Tᵀ·x), a rotation acts on the input wherever that is cheap, and the base layer's own forward does the
rest, whatever form its weight has.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.layer import BaseTunerLayer, MultiplicativeLayer, check_adapters_to_merge
from .rotation import MultiplicativeDropoutLayer, OFTRotationModule

if TYPE_CHECKING:
    from .config import OFTConfig


class OFTLayer(MultiplicativeLayer):
    """Holds the rotations of any number of adapters beside a base layer.

    Several active adapters rotate the input one after the other, x·T₁·T₂⋯, so the first stands last in the weight:
    W⋯T₂ᵀ·T₁ᵀ. Merging keeps this order, whatever was merged before.

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("oft_R", "oft_embedding_R")
    other_param_names = ("r", "oft_block_size", "oft_dropout")
    rotations_name = "oft_R"

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.r: dict[str, int] = {}
        self.oft_block_size: dict[str, int] = {}
        self.oft_dropout = nn.ModuleDict()

    def _new_container(self, name: str) -> nn.Module:
        return nn.ModuleDict()

    @property
    def rotations(self) -> nn.ModuleDict:
        """The rotations by adapter name."""
        return getattr(self, self.rotations_name)

    # ------------------------------------------------------------------------------------------------------ adding

    def update_layer(
        self, adapter_name: str, r: int, config: OFTConfig, inference_mode: bool = False, **kwargs: Any
    ) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            r: number of blocks; 0 to follow from the configuration's block size.
            config: everything else.
            inference_mode: the adapter is used, not trained.
            kwargs: what depends on the module, such as `target_name`.

        Raises:
            ValueError: `init_weights` is neither True nor False.
        """
        if config.init_weights is not True and config.init_weights is not False:
            raise ValueError(
                f"{self._where(kwargs)}: init_weights of the adapter {adapter_name!r} must be True (the identity) or "
                f"False (random rotations), got {config.init_weights!r}."
            )
        blocks, size = self._layout(r, config, self._where(kwargs))
        self.r[adapter_name], self.oft_block_size[adapter_name] = blocks, size
        self.oft_dropout[adapter_name] = MultiplicativeDropoutLayer(
            0.0 if config.keeps_old_arithmetic else config.module_dropout
        )
        with self.empty(0).device:
            self.rotations[adapter_name] = OFTRotationModule(
                1 if config.block_share else blocks,
                size * (size - 1) // 2,
                size,
                blocks * size,
                coft=config.coft,
                eps=config.eps,
                block_share=config.block_share,
                kernel_size=self._folded_window(config),
                use_cayley_neumann=config.use_cayley_neumann,
                num_cayley_neumann_terms=config.num_cayley_neumann_terms,
            )
        self.reset_oft_parameters(adapter_name, config.init_weights)
        self._settle(adapter_name, inference_mode=inference_mode or config.inference_mode)

    def _where(self, options: dict[str, Any]) -> str:
        return self._label or options.get("target_name") or f"An OFT {type(self).__name__}"

    def _folded_window(self, config: OFTConfig) -> tuple[int, int]:
        return (0, 0)

    def _sizes(self, config: OFTConfig) -> tuple[int, int]:
        """The size of T, and the size of its parts that no block reaches out of."""
        return self.in_features, self.in_features

    def _layout(self, r: int, config: OFTConfig, where: str) -> tuple[int, int]:
        """Number and size of the blocks of this layer, as near to what was asked for as they fit."""
        total, part = self._sizes(config)
        if r:
            size = part // self.adjust_oft_parameters(part, max(1, r * part // total))
        else:
            size = self.adjust_oft_parameters(part, config.oft_block_size)
        blocks = total // size
        name, wanted, found = ("r", r, blocks) if r else ("oft_block_size", config.oft_block_size, size)
        if wanted != found:
            whole = f"{part}" if part == total else f"{part}, its size in each of {total // part} groups"
            warnings.warn(
                f"{where}: {name}={wanted} does not divide {whole}; used are {blocks} blocks of size {size}."
            )
        return blocks, size

    def adjust_oft_parameters(self, in_features: int, params: int) -> int:
        """The divisor of a size that is nearest to the given one, the smaller of two.

        Args:
            in_features: the size.
            params: a number or a size of blocks.
        """
        if params >= in_features:
            return in_features
        divisors = (k for k in range(1, in_features + 1) if in_features % k == 0)
        return params if in_features % params == 0 else min(divisors, key=lambda k: (abs(k - params), k))

    def reset_oft_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Start an adapter's parameters over.

        Args:
            adapter_name: the adapter.
            init_weights: True for the identity, False for small random rotations.
        """
        weight = self.rotations[adapter_name].weight
        if init_weights:
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, mean=0.0, std=0.1)

    # ----------------------------------------------------------------------------------------------------- forward

    def rotated(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """x·T of one adapter, computed in its dtype.

        Args:
            x: (..., d).
            adapter: a name this layer holds.
        """
        rotation = self.rotations[adapter]
        return rotation(self._cast_input_dtype(x, rotation.weight.dtype), dropout=self.oft_dropout[adapter])

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = x.dtype
        for adapter in plan:
            x = self.rotated(x, adapter)
        return self.base_layer(x.to(dtype), *args, **kwargs).to(dtype)

    def mixed_forward(self, x: torch.Tensor, rows: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        for adapter, index in rows.items():
            x = x.index_copy(0, index, self.rotated(x[index], adapter).to(x.dtype))
        return self.base_layer(x, *args, **kwargs)

    # ----------------------------------------------------------------------------------------------------- merging

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """T of one adapter, (d, d): the rotation itself, no difference of weights.

        Args:
            adapter: a name this layer holds.
        """
        return self.rotations[adapter].get_weight()

    def adapted_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """W·Tᵀ, in the wider of the two dtypes."""
        rotation = self.rotations[adapter]
        wide = weight.to(torch.promote_types(weight.dtype, rotation.weight.dtype))
        return rotation(wide.flatten(1), transposed=True).view_as(weight)

    def folded(self, adapter_names: list[str], check: bool = False) -> dict[str, torch.Tensor]:
        return super().folded(adapter_names[::-1], check)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight, those before that are merged already; `unmerge` takes all out again.

        Args:
            safe_merge: check the result for NaN and infinity before anything is written.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: with `safe_merge`, the result is not finite; nothing is changed.
            TypeError: the base weight is kept in a form that cannot be written.
        """
        before = list(self.merged_adapters)
        if not before:
            super().merge(safe_merge, adapter_names)
            return
        fresh = check_adapters_to_merge(self, adapter_names)
        if not self._get_available_adapters().intersection(fresh):
            return
        # The factor of a later adapter belongs to the left of theirs.
        self.unmerge()
        try:
            super().merge(safe_merge, before + fresh)
        except Exception:
            super().merge(adapter_names=before)
            raise

    def extra_repr(self) -> str:
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={backend.backend_name!r}"

    def __repr__(self) -> str:
        return f"oft.{super().__repr__()}"


class _Layer(OFTLayer, nn.Module):
    """An OFT layer with its first adapter.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        config: its configuration.
        r: number of blocks; 0 to follow from the configuration's block size.
        fan_in_fan_out: of no effect, a layer knows how it stores its weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: OFTConfig,
        r: int = 8,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        OFTLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = self.kind is not None and self.kind.transposed
        self.update_layer(adapter_name, r, config=config, **kwargs)


class Linear(_Layer):
    """OFT on `nn.Linear`, quantised ones included, and transformers' `Conv1D`: T is (in, in)."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: OFTConfig,
        r: int = 8,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, config, r, fan_in_fan_out, **kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer or self.fan_in_fan_out


class Embedding(_Layer):
    """OFT on `nn.Embedding`: the rows of the table are rotated, E' = E·T₁·T₂⋯, so T is (width, width)."""

    rotations_name = "oft_embedding_R"

    def _sizes(self, config: OFTConfig) -> tuple[int, int]:
        return self.out_features, self.out_features

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in plan:
            result = self.rotated(result, adapter)
        return result.to(dtype)

    def mixed_forward(self, x: torch.Tensor, rows: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for adapter, index in rows.items():
            result = result.index_copy(0, index, self.rotated(result[index], adapter).to(result.dtype))
        return result

    def adapted_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """(E·T)ᵀ, in the wider of the two dtypes; the weight is Eᵀ."""
        rotation = self.rotations[adapter]
        wide = weight.to(torch.promote_types(weight.dtype, rotation.weight.dtype))
        return rotation(wide.T).T

    def folded(self, adapter_names: list[str], check: bool = False) -> dict[str, torch.Tensor]:
        return MultiplicativeLayer.folded(self, adapter_names, check)


class _ConvNd(_Layer):
    """OFT on a convolution, over its input channels and window: y = conv(x, W·Tᵀ) with W as (out, C·k·k).

    With a window of 1 the channels of each pixel are rotated; otherwise the weight is. With groups, T has one part for
    each group, and a block lies within one of them.

    Adapters from versions before 0.22 (see `OFTConfig`) go on computing what they were trained with. Those on a
    `Conv2d` with a larger window rotate the patches of the input and add these up again, which is no convolution:
    merging gives the weight W·Tᵀ, as it did there, and warns that the output differs from the forward's. Those whose
    blocks reach across groups cannot be merged.
    """

    @property
    def _pointwise(self) -> bool:
        return all(size == 1 for size in self.get_base_layer().kernel_size)

    @property
    def _window_axes(self) -> int:
        return len(self.get_base_layer().kernel_size)

    def _sizes(self, config: OFTConfig) -> tuple[int, int]:
        layer = self.get_base_layer()
        total = layer.in_channels * math.prod(layer.kernel_size)
        return total, total if self._is_old(config) else total // layer.groups

    def _is_old(self, config: OFTConfig) -> bool:
        """Whether the adapter may come from a version that could adapt this layer, and computed something else."""
        layer = self.get_base_layer()
        return (
            config.keeps_old_arithmetic
            and self.kind.name == "conv2d"
            and layer.kernel_size[0] == layer.kernel_size[1]
            and layer.dilation[0] == 1
        )

    def _folded_window(self, config: OFTConfig) -> tuple[int, int]:
        return self.get_base_layer().kernel_size if self._is_old(config) and not self._pointwise else (0, 0)

    def _folds(self, adapter: str) -> bool:
        return self.rotations[adapter].kernel_size[0] > 0

    def rotated(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """The input of the base layer for an adapter that does not act on its weight.

        Args:
            x: (batch, C, *size), or without the batch.
            adapter: a name this layer holds.
        """
        if self._folds(adapter):
            return super().rotated(x if x.dim() == 4 else x.unsqueeze(0), adapter).view_as(x)
        channels = -1 - self._window_axes
        return super().rotated(x.movedim(channels, -1), adapter).movedim(-1, channels)

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        on_weight = tuple(name for name in plan if not (self._pointwise or self._folds(name)))
        on_input = tuple(name for name in plan if name not in on_weight)
        if not on_weight:
            return super().adapted_forward(x, on_input, *args, **kwargs)
        dtype = x.dtype
        for adapter in on_input:
            x = self.rotated(x, adapter)
        return MultiplicativeLayer.adapted_forward(self, x.to(dtype), on_weight[::-1], *args, **kwargs)

    def mixed_forward(self, x: torch.Tensor, rows: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if all(self._pointwise or self._folds(name) for name in rows):
            return super().mixed_forward(x, rows, *args, **kwargs)
        return MultiplicativeLayer.mixed_forward(self, x, rows, *args, **kwargs)

    def adapted_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """W·Tᵀ, group by group, in the wider of the two dtypes."""
        groups, rotation = self.get_base_layer().groups, self.rotations[adapter]
        if groups == 1:
            return self._rotated_weight(weight, adapter)
        part, size = weight[0].numel(), rotation.block_size
        if part % size:
            raise NotImplementedError(
                f"{self._label or 'A convolution'} has {groups} groups of size {part}, and the blocks of the adapter "
                f"{adapter!r} have size {size} and reach across them: there is no weight to merge it into. Block "
                f"sizes that divide {part} can be merged, such as {self.adjust_oft_parameters(part, size)}."
            )
        # One filter of each group side by side: (out/groups, groups·part).
        beside = weight.reshape(groups, -1, part).transpose(0, 1).flatten(1)
        turned = self._rotated_weight(beside, adapter)
        return turned.view(-1, groups, part).transpose(0, 1).reshape(weight.shape)

    def _rotated_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        return super().adapted_weight(weight, adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        super().merge(safe_merge, adapter_names)
        folding = [name for name in self.merged_adapters if self._folds(name)]
        if folding:
            warnings.warn(
                f"{self._label or 'A convolution'}: the adapters {folding} come from a version before 0.22, which "
                "computed something else than a convolution. Merged, they give another output than before."
            )


class Conv1d(_ConvNd):
    """OFT on `nn.Conv1d`."""


class Conv2d(_ConvNd):
    """OFT on `nn.Conv2d`."""


class Conv3d(_ConvNd):
    """OFT on `nn.Conv3d`."""


__all__ = [
    "BaseTunerLayer",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "MultiplicativeDropoutLayer",
    "OFTLayer",
    "OFTRotationModule",
    "check_adapters_to_merge",
]
