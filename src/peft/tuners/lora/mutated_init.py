"""Turning an adapter that started by changing the base weight into one for the base weight as it was.

With A₀ and B₀ as it started, the trained adapter computes W - s·B₀·A₀ + s·B·A. Stacked up, [A; A₀] and [B, -B₀] say
the same about W itself, at twice the rank.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...engine.checkpoint import load_peft_weights
from ...engine.state import AdapterState
from .config import LoraConfig
from .initialisers import changes_base

FACTOR = re.compile(r"\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")
"""The end of the names on disk of A and B."""

State = dict[str, torch.Tensor]


def warn_of_changed_base(configs: Mapping[str, Any]) -> None:
    """Warn if several adapters are to share base weights that the start of one of them changes.

    Args:
        configs: configurations of all by adapter name.
    """
    starts = {name: getattr(config, "init_lora_weights", True) for name, config in configs.items()}
    changing = {name: start for name, start in starts.items() if changes_base(start)}
    if changing:
        name, start = next(iter(changing.items()))
        warnings.warn(
            f"The adapter {name!r} with init_lora_weights={start!r} changes the base weights, which all adapters use: "
            f"{sorted(configs)}. One that was not trained together with it gives other outputs. Save {name!r} with "
            "path_initial_model_for_weight_conversion, and load what that gives."
        )


def convert_mutated_init(
    model: nn.Module, adapter_name: str, state: State, initial: str | os.PathLike
) -> tuple[State, LoraConfig]:
    """What to save of an adapter so that it can be loaded onto the original base model.

    DoRA's magnitudes, biases, copies of modules and whatever else there is stay as they are.

    Args:
        model: the `PeftModel`.
        adapter_name: the adapter.
        state: its tensors by their names on disk.
        initial: where the adapter was saved before it was trained.

    Returns:
        The new tensors and configuration.

    Raises:
        ValueError: rank-stabilised scaling together with patterns, or what is at `initial` is another adapter.
    """
    config = model.peft_config[adapter_name]
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            f"The adapter {adapter_name!r} cannot be converted by path_initial_model_for_weight_conversion: it has "
            "use_rslora=True together with rank_pattern or alpha_pattern. Save it as it is."
        )
    if config.init_lora_weights is not True and not changes_base(config.init_lora_weights):
        warnings.warn(
            f"The adapter {adapter_name!r} with init_lora_weights={config.init_lora_weights!r} did not change the base model, "
            "so path_initial_model_for_weight_conversion only doubles its rank."
        )
    stacks = {
        saved: slot.holder.num_experts
        for saved, slot in AdapterState(model, adapter_name).slots.items()
        if hasattr(slot.holder, "num_experts")
    }
    before = load_peft_weights(os.fspath(initial), device="cpu")
    return stacked_state(state, before, stacks, os.fspath(initial)), doubled_config(config)


def stacked_state(state: State, initial: State, stacks: dict[str, int], where: str = "the initial adapter") -> State:
    """An adapter's tensors with what it started as taken off.

    Args:
        state: the trained adapter's tensors by their names on disk.
        initial: the same adapter's before training.
        stacks: for factors of stacked experts, how many there are.
        where: what `initial` is, for messages.

    Raises:
        ValueError: `initial` lacks a factor, or has it in another shape.
    """
    result = dict(state)
    for name, tensor in state.items():
        match = FACTOR.search(name)
        if match is None:
            continue
        if name not in initial or initial[name].shape != tensor.shape:
            found = f"of shape {tuple(initial[name].shape)}" if name in initial else "not"
            raise ValueError(
                f"{where} has {name} {found}, expected {tuple(tensor.shape)}. It must be the same adapter, saved before it was "
                "trained."
            )
        before = initial[name].to(tensor)
        if match["factor"] == "B":
            result[name] = torch.cat([tensor, -before], 1)
        elif name in stacks:  # expert by expert
            parts = [factor.unflatten(0, (stacks[name], -1)) for factor in (tensor, before)]
            result[name] = torch.cat(parts, 1).flatten(0, 1)
        else:
            result[name] = torch.cat([tensor, before])
    return result


def doubled_config(config: LoraConfig) -> LoraConfig:
    """A copy of a configuration for twice the rank with the same scaling, and an ordinary start."""
    config = copy.deepcopy(config)
    config.init_lora_weights, config.corda_config, config.lora_ga_config, config.loftq_config = True, None, None, {}
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: 2 * alpha for key, alpha in config.alpha_pattern.items()}
    return config


def without_initial(tuner: Any, state: State, initial_adapter: str) -> State:
    """The same with the initial adapter loaded into the model, and only the factors of the result.

    Args:
        tuner: the model's `LoraModel`.
        state: the trained adapter's tensors by their names on disk.
        initial_adapter: the name of the adapter as it was before training.

    Raises:
        ValueError: the initial adapter is set to start by changing the base weight, which it must not do twice.
    """
    init = tuner.peft_config[initial_adapter].init_lora_weights
    if changes_base(init):
        raise ValueError(
            f"The initial adapter {initial_adapter!r} has init_lora_weights={init!r}, so that loading it changed the base "
            "weights. Save it with init_lora_weights=True."
        )
    slots = AdapterState(tuner, initial_adapter)
    before = {f"base_model.{name}": tensor for name, tensor in slots.read().items()}
    stacks = {
        f"base_model.{saved}": slot.holder.num_experts
        for saved, slot in slots.slots.items()
        if hasattr(slot.holder, "num_experts")
    }
    factors = {name: tensor for name, tensor in state.items() if FACTOR.search(name)}
    return stacked_state(factors, before, stacks, f"The adapter {initial_adapter!r}")
