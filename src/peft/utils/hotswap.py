"""Putting another LoRA adapter in the place of one, without the model being built or compiled anew."""
# layer: top

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..engine.auxiliary import TrainableTokensWrapper
from ..engine.checkpoint import load_peft_weights
from ..engine.layer import BaseTunerLayer
from ..engine.lifecycle import Entry, holders_of
from ..engine.matching import get_pattern_key
from ..engine.state import AdapterState, Slot, check_finite
from ..mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from ..tuners.lora import LoraConfig, LoraLayer
from ..tuners.lora.layer import Conv2d, Linear
from ..tuners.lora.rank import (
    by_rank,
    config_key,
    divides,
    factor_of,
    fill,
    fit_module,
    groups_of,
    rank_in,
    rank_of,
    with_rank,
)
from ..tuners.lora.variant import requested_variants
from .devices import infer_device
from .hub import download_parameters
from .naming import did_you_mean
from .peft_types import PeftType

CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
"""Fields in which an adapter must agree with the one whose place it takes."""


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Put a saved LoRA adapter in the place of an adapter of a model, in place.

    Layers that the new adapter has nothing for stop changing the output. The model's configuration of the adapter is the
    new one's afterwards.

    Args:
        model: a `PeftModel` or a model with injected adapters, compiled or not.
        model_name_or_path: folder or repository of the new adapter.
        adapter_name: the adapter whose place it takes.
        torch_device: where to read the weights to; the accelerator if there is one.
        kwargs: `subfolder`, `revision`, `token` and others of the hub client.

    Raises:
        ValueError: the two do not go together, or the adapter is merged; the model is as it was.
        RuntimeError: the new adapter has weights that the model has no place for; the model is as it was.
    """
    inner = _uncompiled(model)
    current = _config_of(inner, adapter_name)
    hub = {key: value for key, value in kwargs.items() if key in download_parameters() or key == "use_auth_token"}
    peft_type = PeftConfig._get_peft_type(model_name_or_path, **hub)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(model_name_or_path, **hub)
    check_hotswap_configs_compatible(current, config)
    device = infer_device() if torch_device is None else torch_device
    state = load_peft_weights(model_name_or_path, device=device, **kwargs)
    adapter = AdapterState(inner, adapter_name)
    live = {saved: slot.live for saved, slot in adapter.slots.items()}
    names = {key: adapter.file_key(key) for key in state}
    _refuse_unknown([key for key, name in names.items() if name not in live], live, adapter_name)
    _Swap(inner, adapter, {live[names[key]]: value for key, value in state.items()}, config).run()


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise unless an adapter of one configuration can take the place of one of the other.

    Args:
        config0: of the adapter that is there.
        config1: of the adapter that is to take its place; rank, alpha and the patterns of the rank may differ.

    Raises:
        ValueError: they are not both LoRA, or differ in a field that a swap cannot change.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(
            f"An adapter can only take the place of one of the same method, not {config1.peft_type} that of "
            f"{config0.peft_type}."
        )
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(f"Only LoRA adapters can be swapped in place, not those of {config0.peft_type}.")
    for field in CONFIG_KEYS_TO_CHECK[config0.peft_type]:
        before, after = getattr(config0, field), getattr(config1, field)
        if before != after:
            raise ValueError(
                f"The adapters differ in {field}, which cannot be changed in place: {before!r}, {after!r}."
            )
    before, after = ([name for name in requested_variants(config) if name != "mica"] for config in (config0, config1))
    if before != after:
        raise ValueError(
            "The adapters are of different variants, which cannot be changed in place: "
            f"{' and '.join(before) or 'plain LoRA'}, {' and '.join(after) or 'plain LoRA'}."
        )


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Put the weights of another LoRA adapter in the place of an adapter of a model, in place.

    Args:
        model: a `PeftModel` or a model with injected adapters, compiled or not.
        state_dict: tensors by their names in the model, the adapter's name in them.
        adapter_name: the adapter whose place they take.
        config: the new adapter's configuration, which becomes the model's.
        parameter_prefix: what names of the tensors contain that may be missing; these become zero.

    Raises:
        RuntimeError: names that the model does not have; nothing is changed.
        KeyError: names of the model that are not the adapter's; nothing is changed.
        ValueError: the adapter is merged, or weights do not fit or are not finite; nothing is changed.
    """
    inner = _uncompiled(model)
    _config_of(inner, adapter_name)
    _Swap(inner, AdapterState(inner, adapter_name), state_dict, config, parameter_prefix).run()


def _uncompiled(model: nn.Module) -> nn.Module:
    return model.__dict__.get("_modules", {}).get("_orig_mod", model)


def _plain(name: str) -> str:
    """A name without the components that compiling adds to it."""
    return name.replace("_orig_mod.", "")


def _config_of(model: nn.Module, adapter_name: str) -> PeftConfig:
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise ValueError(
            f"There is no adapter {adapter_name!r} to take the place of; known are {sorted(configs)}."
            f"{did_you_mean(adapter_name, configs)}"
        )
    return configs[adapter_name]


def _refuse_unknown(names: list[str], known: Any, adapter_name: str) -> None:
    if names:
        shown = ", ".join(f"{name}{did_you_mean(name, known, 1)}" for name in sorted(names)[:5])
        raise RuntimeError(
            f"The model has no place in the adapter {adapter_name!r} for {len(names)} of the new weights: {shown}. Nothing "
            "was changed."
        )


@dataclass
class _Change:
    """One tensor of the adapter, and what takes its place; nothing for zeros."""

    slot: Slot
    value: torch.Tensor | None

    @property
    def entry(self) -> Entry:
        return self.slot.entry

    @property
    def factor(self) -> str | None:
        return factor_of(self.entry.live) if isinstance(self.slot.holder, LoraLayer) else None

    def check(self) -> None:
        """Raise unless the value fits: of the same shape, or a factor of another rank."""
        expected, found = self.entry.tensor, self.value
        if found is None or found.shape == expected.shape:
            return
        if self.factor is not None and found.dim() == expected.dim() and self._differs_in_rank_only():
            return
        raise ValueError(
            f"The new weight {self.slot.live} has shape {tuple(found.shape)}, which does not fit {tuple(expected.shape)}. "
            "Nothing was changed."
        )

    def _differs_in_rank_only(self) -> bool:
        layer, factor, found = self.slot.holder, self.factor, self.value
        if not divides(layer, factor, found):
            return False
        (blocks, _, *rest), (new_blocks, _, *new_rest) = (
            by_rank(layer, factor, tensor).shape for tensor in (self.entry.tensor, found)
        )
        return blocks == new_blocks and rest == new_rest

    def grows(self) -> bool:
        return self.value is not None and self.value.numel() > self.entry.tensor.numel()

    def apply(self) -> None:
        current = self.entry.tensor
        if self.value is None:
            current.data.zero_()
        elif self.grows():
            _grow(current, self.value.to(current.device, current.dtype, copy=True))
            fit_module(self.entry.owner)
        elif self.factor is not None:
            fill(self.slot.holder, self.factor, current.data, self.value)
        else:
            current.data.copy_(self.value)
        if hasattr(self.entry.owner, "_norm"):
            self.entry.owner._norm = None  # of the magnitude or factors before


def _grow(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Let a parameter, which others may refer to, be a larger one."""
    try:
        torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))
    except RuntimeError:  # something holds a weak reference to it
        parameter.data = value


class _Swap:
    """One adapter taking the place of another; all is checked before the first value is written.

    Args:
        model: the model, not compiled.
        adapter: the adapter that is there.
        state: the new tensors by their names in memory.
        config: the new adapter's configuration.
        prefix: what names of the tensors contain that may be missing.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: AdapterState,
        state: dict[str, torch.Tensor],
        config: LoraConfig,
        prefix: str = "lora_",
    ) -> None:
        self.model, self.adapter_name, self.config, self.prefix = model, adapter.adapter_name, config, prefix
        self.slots = {_plain(slot.live): slot for slot in adapter.slots.values()}
        self.state = {_plain(name): value for name, value in state.items()}

    def run(self) -> None:
        self._check_unmerged()
        self._check_names()
        changes = [_Change(slot, self.state.get(name)) for name, slot in self.slots.items()]
        for change in changes:
            change.check()
        check_finite(self.state)
        self._check_ranks(changes)
        self._check_tokens()
        scalings = [(layer, self._scaling_of(layer)) for layer in self._layers()]
        with torch.no_grad():
            for change in changes:
                change.apply()
        for layer, scaling in scalings:
            self._set_scaling(layer, *scaling)
        if any(change.grows() for change in changes):
            for _, holder in holders_of(self.model):
                holder._plan = holder._make_plan()
        self._set_config()

    # -------------------------------------------------------------------------------------------------------- checking

    def _check_unmerged(self) -> None:
        merged = [name for name, holder in holders_of(self.model) if self.adapter_name in holder.merged_adapters]
        if merged:
            raise ValueError(
                f"The adapter {self.adapter_name!r} is merged into {merged[0]} and {len(merged) - 1} other modules. Call "
                "unmerge_adapter() before it is swapped."
            )

    def _check_names(self) -> None:
        others = [name for name in self.state if name not in self.slots]
        _refuse_unknown([name for name in others if not _resolves(self.model, name)], self.slots, self.adapter_name)
        if others:
            raise KeyError(f"{others[0]} is no weight of the adapter {self.adapter_name!r}. Nothing was changed.")
        missing = [name for name, slot in self.slots.items() if name not in self.state and not self._may_be_zero(slot)]
        if missing:
            raise ValueError(
                f"The adapter {self.adapter_name!r} has weights that the new one has nothing for and that cannot be zero: "
                f"{', '.join(missing[:5])}. Load the new one under another name. Nothing was changed."
            )

    def _may_be_zero(self, slot: Slot) -> bool:
        """Whether a tensor can be zero where the new adapter lacks it: the factors and their bias."""
        return self.prefix in slot.entry.live and (
            factor_of(slot.entry.live) is not None or slot.live.endswith(".bias")
        )

    def _check_ranks(self, changes: list[_Change]) -> None:
        """Raise unless A and B of each layer fit each other afterwards."""
        ranks: dict[int, dict[str, int]] = {}
        for change in changes:
            if change.factor is not None:
                value = change.value if change.grows() else change.entry.tensor
                layer = change.slot.holder
                ranks.setdefault(id(layer), {})[change.factor] = rank_of(layer, change.factor, value)
        for change in changes:
            found = set(ranks.get(id(change.slot.holder), {}).values())
            if len(found) > 1:
                raise ValueError(f"The factors at {change.slot.live} would have the ranks {sorted(found)}.")

    def _check_tokens(self) -> None:
        before = self.model.peft_config[self.adapter_name]
        indices = [getattr(config, "trainable_token_indices", None) for config in (before, self.config)]
        if any(isinstance(holder, TrainableTokensWrapper) for _, holder in holders_of(self.model)):
            if indices[0] != indices[1]:
                raise ValueError(f"The adapters train the rows of different tokens: {indices[0]}, {indices[1]}.")

    # --------------------------------------------------------------------------------------------------------- scaling

    def _layers(self) -> Iterator[LoraLayer]:
        for _, holder in holders_of(self.model):
            if isinstance(holder, LoraLayer) and self.adapter_name in holder.scaling:
                yield holder

    def _scaling_of(self, layer: LoraLayer) -> tuple[int, float, float]:
        """Rank, alpha and scaling that the new configuration gives a layer."""
        if not isinstance(layer.scaling[self.adapter_name], (int, float, torch.Tensor)):
            raise TypeError(
                f"The scaling of {layer._label} must be a number or a tensor, found "
                f"{type(layer.scaling[self.adapter_name]).__name__}."
            )
        config, rank = self.config, rank_in(self.config, layer)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, config_key(layer)), config.lora_alpha)
        return rank, alpha, alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def _set_scaling(self, layer: LoraLayer, rank: int, alpha: float, scaling: float) -> None:
        layer.r[self.adapter_name], layer.lora_alpha[self.adapter_name] = rank, alpha
        current = layer.scaling[self.adapter_name]
        if torch.is_tensor(current):
            current.fill_(scaling)
        else:
            layer.scaling[self.adapter_name] = scaling

    def _set_config(self) -> None:
        config = copy.copy(self.config)
        config.inference_mode = self.model.peft_config[self.adapter_name].inference_mode
        self.model.peft_config[self.adapter_name] = config


def _resolves(model: nn.Module, name: str) -> bool:
    plain = {_plain(live) for live, _ in model.named_parameters()} | {
        _plain(live) for live, _ in model.named_buffers()
    }
    return name in plain


# ------------------------------------------------------------------------------------------------------------ compiled models


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make adapters of different scalings and ranks swappable in a model that is going to be compiled.

    Scalings become tensors, and factors are padded to a common rank, so that a swap changes values only.

    Args:
        model: a model with LoRA adapters, not compiled yet.
        target_rank: the largest rank that is going to be swapped in; None if all have the same.
        config: a configuration or configurations by adapter name; their ranks are set to `target_rank` (in place).
        check_compiled: what to do if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: the model is compiled, has no LoRA layers, or has an adapter of a larger rank; nothing is changed.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        _complain_of_compiled(check_compiled)
    if config is not None and target_rank is None:
        raise ValueError("A config can only be prepared for a target_rank; pass one.")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("The model has no LoRA layers to prepare. Load the first adapter before.")
    for layer in layers:
        _check_preparable(layer, target_rank)
    for layer in layers:
        device = layer._adapter_device_and_dtype()[0]
        for name, scaling in layer.scaling.items():
            if not torch.is_tensor(scaling):
                layer.scaling[name] = torch.tensor(float(scaling), device=device)
        if target_rank is not None:
            _pad(layer, target_rank)
    for each in config.values() if isinstance(config, dict) else [config] if config is not None else []:
        each.r = target_rank
        each.rank_pattern = dict.fromkeys(each.rank_pattern or {}, target_rank)


def _complain_of_compiled(check_compiled: str) -> None:
    message = "The model is compiled; it must be prepared for hotswapping before."
    if check_compiled == "error":
        raise ValueError(message)
    if check_compiled == "warn":
        warnings.warn(message)
    elif check_compiled != "ignore":
        raise ValueError(f"check_compiled is 'error', 'warn' or 'ignore', got {check_compiled!r}.")


def _factors(layer: LoraLayer) -> Iterator[tuple[str, Entry]]:
    for adapter in layer._get_available_adapters():
        for entry in layer.state_entries(adapter):
            factor = factor_of(entry.live)
            if factor is not None:
                yield factor, entry


def _check_preparable(layer: LoraLayer, target_rank: int | None) -> None:
    for name, scaling in layer.scaling.items():
        if not isinstance(scaling, (float, torch.Tensor)):
            raise TypeError(
                f"The scaling of the adapter {name!r} in {layer._label} must be a float or a tensor, found "
                f"{type(scaling).__name__}."
            )
    if target_rank is None:
        return
    for name, variant in layer.lora_variant.items():
        if not variant.can_be_padded and layer.r[name] < target_rank:
            raise ValueError(
                f"{layer._label} has the adapter {name!r} of rank {layer.r[name]}, a {type(variant).__name__}, whose tensors "
                f"cannot be padded to target_rank={target_rank}. Swap adapters of its rank only."
            )
    if target_rank % groups_of(layer):
        raise ValueError(
            f"{layer._label} has {groups_of(layer)} groups, so target_rank must be a multiple of that, got {target_rank}."
        )
    for factor, entry in _factors(layer):
        rank = rank_of(layer, factor, entry.tensor)
        if rank > target_rank:
            raise ValueError(f"{layer._label} has an adapter of rank {rank}, more than target_rank={target_rank}.")


def _pad(layer: LoraLayer, rank: int) -> None:
    for factor, entry in list(_factors(layer)):
        current = entry.tensor
        if rank_of(layer, factor, current) == rank:
            continue
        padded = nn.Parameter(with_rank(layer, factor, current.data, rank), current.requires_grad)
        entry.owner._parameters[entry.attribute] = padded
        fit_module(entry.owner)
    layer._plan = layer._make_plan()


__all__ = [
    "CONFIG_KEYS_TO_CHECK",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "BaseTunerLayer",
    "Conv2d",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "PeftConfig",
    "PeftType",
    "check_hotswap_configs_compatible",
    "get_pattern_key",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_compiled_hotswap",
]
