"""LoRA adapters for models whose weights newer releases of transformers name or lay out differently.

transformers describes how a checkpoint of an older release becomes today's model as a list of renamings and
conversions. From these follows what becomes of an adapter: its names change alike, and factors of experts that were one
module each are stacked as `ParamWrapper` holds them. This module needs transformers 5.
"""
# layer: tuners

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from ..config import PeftConfig
from ..engine.matching import _maybe_include_all_linear_layers, check_target_module_exists
from ..engine.state import BASE_PREFIX, AdapterState, base_model_of
from ..tuners.lora.fused_experts import FusedExperts, convert_peft_config_for_transformers, fused_experts
from .constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from .peft_types import PeftType
from .registry import all_methods, method

Tensors = dict[str, Any]


def _single(tensors: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


class _OneWay(ConversionOps):
    """A step that adapters need when they are loaded; they are saved as they are in memory, so it has no reverse."""

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError(f"{type(self).__name__} has no reverse: adapters are saved as the model holds them.")


class FlattenDims(_OneWay):
    """Makes one dimension of several neighbouring ones.

    Args:
        dims: the dimensions, ascending.
    """

    def __init__(self, dims: int | tuple[int, ...]) -> None:
        self.dims = dims

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> Tensors:
        """Flatten every tensor; the names stay."""
        dims = (self.dims,) if isinstance(self.dims, int) else tuple(self.dims)
        return {name: _single(tensors).flatten(dims[0], dims[-1]) for name, tensors in input_dict.items()}

    def __repr__(self) -> str:
        return f"FlattenDims(dims={self.dims})"


class PermuteDims(_OneWay):
    """Puts the dimensions of a tensor into another order.

    Args:
        dims: for each dimension of the result, where it comes from.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims

    def convert(
        self,
        input_dict: Tensors,
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **kwargs: Any,
    ) -> Tensors:
        """Permute every tensor; the names stay."""
        return {name: _single(tensors).permute(*self.dims).contiguous() for name, tensors in input_dict.items()}

    def __repr__(self) -> str:
        return f"PermuteDims(dims={self.dims})"


class PeftConcatenate(Concatenate):
    """Joins the factors B of projections that are one now, so that each goes on seeing its own factor A only.

    Per expert they become the blocks of a block-diagonal matrix, as B of the joined projection.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: Tensors,
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs: Any,
    ) -> Tensors:
        """Join them.

        Args:
            input_dict: for each projection, B of all experts: (experts, out, r).
            source_patterns: the projections in order.
            target_patterns: not needed.
            full_layer_name: what to call the result.

        Returns:
            B as `ParamWrapper` holds it: (sum of out, sum of r * experts), experts fastest.
        """
        stacks = [_single(input_dict.pop(pattern)) for pattern in source_patterns if pattern in input_dict]
        rows, columns = (sum(stack.shape[dim] for stack in stacks) for dim in (1, 2))
        joined = stacks[0].new_zeros(rows, columns, stacks[0].shape[0])
        row = column = 0
        for stack in stacks:
            joined[row : row + stack.shape[1], column : column + stack.shape[2]] = stack.permute(1, 2, 0)
            row, column = row + stack.shape[1], column + stack.shape[2]
        return {full_layer_name: joined.flatten(1)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("PeftConcatenate has no reverse: adapters are saved as the model holds them.")


# ----------------------------------------------------------------------------------------------- what happens to names


class _AdapterRenaming(WeightRenaming):
    """A renaming of adapter tensors, which transformers must not undo when it saves the base model."""

    __slots__ = ()

    def was_used(self) -> bool:
        return False


class _AdapterConverter(WeightConverter):
    """A conversion of adapter tensors, which transformers must not undo when it saves the base model."""

    __slots__ = ()

    def was_used(self) -> bool:
        return False


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """How the tensors of an adapter file become those of an adapter in a model, for transformers' loader.

    Args:
        weight_conversions: the conversions of the base model.
        adapter_name: what the adapter is called in the model.
        peft_config: its configuration, converted or not; without it, all methods' names are renamed, and both fused
            parameters of a layer's experts are taken to be adapted.

    Returns:
        Renamings and conversions in the order in which they apply; an empty list for an empty one.
    """
    if not weight_conversions:
        return []
    mapping: list[Any] = [
        _AdapterRenaming(r"^base_model\.model\.model\.", "model."),
        _AdapterRenaming(r"^base_model\.model\.", ""),
        *_name_insertions(adapter_name, peft_config),
    ]
    for conversion in weight_conversions:
        if isinstance(conversion, WeightRenaming):
            mapping.append(conversion)
            continue
        fused = FusedExperts.of(conversion)
        if fused is not None:
            inside = _is_inside(fused, fused_experts(weight_conversions), peft_config)
            mapping += [_lora_conversion(conversion, fused, factor, adapter_name, inside) for factor in ("A", "B")]
    return mapping


def _name_insertions(adapter_name: str, config: PeftConfig | None) -> list[WeightRenaming]:
    """Renamings that put the adapter's name behind the names of a method's tensors."""
    prefixes = (
        {entry.prefix for entry in all_methods().values()} if config is None else {method(config.peft_type).prefix}
    )
    insertions = []
    for prefix in sorted(prefixes):
        if prefix == "lora_":
            # In memory a magnitude is the weight of a module, in a file it has no `.weight`.
            insertions.append(_AdapterRenaming(r"(lora_magnitude_vector)(?:\.weight)?$", rf"\1.{adapter_name}.weight"))
            prefix = "lora_(?!magnitude_vector)"
        insertions.append(_AdapterRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}"))
    return insertions


def _is_inside(fused: FusedExperts, groups: Iterable[FusedExperts], config: PeftConfig | None) -> bool:
    """Whether the wrapper of a fused parameter is inside that of another one: the last parameter's is outermost."""
    others = [other for other in groups if other.path.rpartition(".")[0] == fused.path.rpartition(".")[0]]
    after = others[others.index(fused) + 1 :]
    return any(_may_target(config, other) for other in after)


def _may_target(config: PeftConfig | None, fused: FusedExperts) -> bool:
    if config is None:
        return True
    parameters = [entry.rpartition(".")[2] for entry in getattr(config, "target_parameters", None) or ()]
    if parameters:
        return fused.name in parameters
    targets = getattr(config, "target_modules", None) or ()
    if not isinstance(targets, str):
        return bool({entry.rpartition(".")[2] for entry in targets} & set(fused.branches))
    if targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return True
    parent = fused.path.rpartition(".")[0]
    names = (f"model.layers.0.{middle}{parent}.0.{branch}" for branch in fused.branches for middle in ("", "mlp."))
    return any(re.fullmatch(targets, name) for name in names)


def _lora_conversion(base: Any, fused: FusedExperts, factor: str, adapter_name: str, inside: bool) -> WeightConverter:
    """What makes factor A or B of a fused parameter from those of single experts.

    `ParamWrapper` holds A as (experts * r, in) and B as (out, r * experts), experts slowest in A and fastest in B.
    """
    stack = MergeModulelist(dim=0)
    if factor == "A":
        branches = [Concatenate(dim=1)] if len(fused.branches) > 1 else []
        operations = [stack, *branches, FlattenDims((0, 1))]
    elif len(fused.branches) > 1:
        operations = [stack, PeftConcatenate(dim=1)]
    else:
        operations = [stack, PermuteDims((1, 2, 0)), FlattenDims((1, 2))]
    suffix = f"lora_{factor}.{adapter_name}.weight"
    parent = fused.target.removesuffix(fused.name)
    conversion = _AdapterConverter(
        source_patterns=[source.removesuffix("weight") + re.escape(suffix) for source in fused.sources],
        target_patterns=f"{parent}base_layer.{suffix}" if inside else f"{parent}{suffix}",
        operations=operations,
    )
    conversion.scope_prefix, conversion.base_model_prefix = base.scope_prefix, base.base_model_prefix
    return conversion


# --------------------------------------------------------------------------------------------- what happens to tensors


_STAND_IN = "default"
"""The adapter's name while its tensors are converted; on disk they have none."""


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
) -> dict[str, torch.Tensor]:
    """Bring the tensors of a LoRA file up to date with the model that they are to be loaded into.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        peft_config: the adapter's configuration, converted.
        adapter_state_dict: tensors by their names on disk.
        adapter_name: the adapter; what it has places for already is left alone.

    Returns:
        Tensors by the names on disk that they have today; the same dictionary where nothing is to be done.
    """
    base = base_model_of(model)
    if peft_config.peft_type != PeftType.LORA or not isinstance(base, PreTrainedModel):
        return adapter_state_dict
    known = (
        set(AdapterState(model, adapter_name).slots) if adapter_name in getattr(model, "peft_config", {}) else set()
    )
    strangers = [name for name in adapter_state_dict if name not in known]
    mapping = (
        build_peft_weight_mapping(get_model_conversion_mapping(base), _STAND_IN, peft_config) if strangers else []
    )
    if not mapping:
        return adapter_state_dict
    prefix = BASE_PREFIX if base is not model else ""
    converted: dict[str, torch.Tensor] = {}
    groups: dict[str, tuple[WeightConverter, dict[str, list[torch.Tensor]]]] = {}
    for name in sorted(strangers, key=_numbers_as_numbers):
        tensor = adapter_state_dict[name]
        live, converter, source = _renamed(name, mapping)
        if converter is not None:
            groups.setdefault(live, (converter, {}))[1].setdefault(source, []).append(tensor)
            continue
        today = prefix + _as_saved(live)
        # What the model has no place for under today's name either is reported under its own.
        converted[today if today in known or (".lora_" in name and not known) else name] = tensor
    for live, (converter, tensors) in groups.items():
        converted[prefix + _as_saved(live)] = _applied(converter, tensors, live, base)
    return {name: tensor for name, tensor in adapter_state_dict.items() if name in known} | converted


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts experts by number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _renamed(name: str, mapping: list[Any]) -> tuple[str, WeightConverter | None, str | None]:
    """Today's name in memory, and the conversion that the tensor is one of the sources of, with its pattern."""
    for step in mapping:
        if isinstance(step, WeightRenaming):
            name, _ = step.rename_source_key(name)
    for step in mapping:
        if isinstance(step, WeightConverter):
            name, source = step.rename_source_key(name)
            if source is not None:
                return name, step, source
    return name, None, None


def _as_saved(live: str) -> str:
    name = re.sub(rf"(\.lora_[^.]+)\.{_STAND_IN}(?=\.|$)", r"\1", live)
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def _applied(converter: WeightConverter, tensors: Tensors, live: str, base: nn.Module) -> torch.Tensor:
    for operation in converter.operations:
        tensors = operation.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=live,
            model=base,
            config=base.config,
        )
    (result,) = tensors.values()
    return result


__all__ = [
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "FlattenDims",
    "PeftConcatenate",
    "PeftConfig",
    "PeftType",
    "PermuteDims",
    "_maybe_include_all_linear_layers",
    "build_peft_weight_mapping",
    "check_target_module_exists",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
    "get_model_conversion_mapping",
]
