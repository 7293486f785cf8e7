"""Operations over all adapter-holding modules of a model that need no tuner: only the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .backends import make_trainable
from .lifecycle import (
    BEFORE_DISABLING,
    AdapterHolder,
    Roster,
    as_names,
    belongs_to_adapter,
    flag_before_disabling,
    holders_of,
    set_trains,
)
from .protocol import BaseTunerLayer
from .sharding import check_deletable, reshard


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type = BaseTunerLayer,
) -> None:
    """Make these adapters the active ones in every layer of a model, and exactly their weights trainable.

    Args:
        model: a model with injected adapters.
        adapter_name: one name or several.
        inference_mode: use them, but train nothing.
        layer_cls: only layers of this class; wrappers take part in any case.

    Raises:
        ValueError: an unknown name, or adapters that exclude each other; nothing is changed.
    """
    names = as_names(adapter_name)
    holders = _selected(model, layer_cls)
    configs = getattr(model, "peft_config", None) or {}
    if holders:
        holders[0].roster.check(names, extra=configs)
    reshard(model)
    for holder in holders:
        holder.activate(names, inference_mode)
    refresh_biases(model, configs, names, enabled=not inference_mode)
    if not inference_mode:
        make_trainable(model)


def _selected(model: nn.Module, layer_cls: type) -> list[AdapterHolder]:
    return [
        holder
        for _, holder in holders_of(model)
        if isinstance(holder, layer_cls) or hasattr(holder, "unload_and_optionally_merge_module")
    ]


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: type = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter's weights from every layer of a model.

    Args:
        model: a model with injected adapters; its `peft_config` is not touched.
        adapter_name: the adapter.
        prefix: the method's parameter prefix. Layers are found by their class; nothing is matched by it.
        layer_cls: only layers of this class; wrappers take part in any case.

    Returns:
        The adapters that are active now, None if the model has no layers.
    """
    holders = _selected(model, layer_cls)
    reshard(model)
    check_deletable(adapter_name, holders_of(model))
    for holder in holders:
        holder.delete_adapter(adapter_name)
    return holders[0].active_adapters if holders else None


def set_requires_grad(model: nn.Module, adapter_names: str | list[str], requires_grad: bool = True) -> None:
    """Set by hand whether the weights of adapters require grad, in tuner layers and wrappers.

    Args:
        model: a model with adapters.
        adapter_names: one name or several; those that a layer does not hold are ignored.
        requires_grad: the flag.
    """
    reshard(model)
    for _, holder in holders_of(model):
        holder.set_requires_grad(adapter_names, requires_grad)


LOW_PRECISION = {torch.float16, torch.bfloat16} | {
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
}


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn an adapter's low-precision weights to float32, so that training is stable on a half-precision base.

    Copies of modules (`modules_to_save`) keep their dtype.

    Args:
        model: a model with adapters.
        adapter_name: the adapter.
        autocast_adapter_dtype: False for nothing.
    """
    if autocast_adapter_dtype:
        cast_holders([holder for _, holder in holders_of(model)], adapter_name)


def cast_holders(holders: list[AdapterHolder], adapter_name: str) -> None:
    for holder in holders:
        if getattr(holder, "keeps_dtype", False) or holder.exclusive:
            continue
        for attribute in holder.adapter_layer_names + holder.other_param_names:
            container = holder._modules.get(attribute)
            if container is not None and adapter_name in container:
                _upcast(container, adapter_name)


def _upcast(container: nn.Module, name: str) -> None:
    entry = container[name]
    if isinstance(entry, nn.Module):
        for module in entry.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in LOW_PRECISION:
                    module._parameters[key] = nn.Parameter(parameter.data.float(), parameter.requires_grad)
    elif entry.dtype in LOW_PRECISION:
        is_parameter = isinstance(entry, nn.Parameter)
        container[name] = nn.Parameter(entry.data.float(), entry.requires_grad) if is_parameter else entry.float()


def refresh_biases(model: nn.Module, configs: dict[str, Any], active: list[str], enabled: bool) -> None:
    """Let the biases outside tuner layers follow the adapter that asked for `bias="all"`."""
    owners = _owners_of_biases(configs)
    flag = enabled and _biases_train(model, owners, active)
    for parameter in _biases_outside(model, owners):
        parameter.__dict__.pop(BEFORE_DISABLING, None)
        set_trains(parameter, flag)


def enable_biases(model: nn.Module, configs: dict[str, Any], active: list[str], enabled: bool) -> None:
    """`refresh_biases` where adapters are disabled or enabled again: what was frozen by hand in between stays so."""
    owners = _owners_of_biases(configs)
    flag = enabled and _biases_train(model, owners, active)
    for parameter in _biases_outside(model, owners):
        before = parameter.__dict__.pop(BEFORE_DISABLING, True) if enabled else flag_before_disabling(parameter)
        set_trains(parameter, flag and before)


def _owners_of_biases(configs: dict[str, Any]) -> list[str]:
    return [name for name, config in configs.items() if getattr(config, "bias", "none") == "all"]


def _biases_train(model: nn.Module, owners: list[str], active: list[str]) -> bool:
    holder = next((holder for _, holder in holders_of(model)), None)
    return any(name in active and (holder is None or holder.trains(name, "bias")) for name in owners)


def _biases_outside(model: nn.Module, owners: list[str]) -> Iterator[nn.Parameter]:
    """The base model's biases but those that a tuner layer looks after."""
    if not owners:
        return
    inside = {id(parameter) for _, holder in holders_of(model) for parameter in holder.bias_parameters()}
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] == "bias" and id(parameter) not in inside:
            if not belongs_to_adapter(model, name) and not _has_copy(model, name, owners):
                yield parameter


def _has_copy(model: nn.Module, name: str, adapter_names: list[str]) -> bool:
    """Whether the tensor of that dotted name is an original that a copy of one of these adapters stands in for."""
    path, _, below = name.rpartition(".original_module.")
    wrapper = model.get_submodule(path) if below else None
    return isinstance(wrapper, AdapterHolder) and not wrapper._get_available_adapters().isdisjoint(adapter_names)


def uses_checkpointing(model: nn.Module) -> bool:
    """Whether some part of a transformers or diffusers model is computed again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def check_one_name_per_row(adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise unless a model's call names one adapter for each row of its input.

    Args:
        adapter_names: the adapter of each row.
        args, kwargs: the call's; whose rows they have cannot always be told, and the layers look again.

    Raises:
        ValueError: it does not.
    """
    given = next(
        (value for value in (*args[:1], *map(kwargs.get, ("input_ids", "inputs_embeds"))) if value is not None), None
    )
    if torch.is_tensor(given) and given.dim() > 1 and len(given) != len(adapter_names):
        raise ValueError(
            f"adapter_names must name one adapter per row, got {len(adapter_names)} names for {len(given)} rows."
        )


def check_mixed_batch(model: nn.Module, roster: Roster, adapter_names: list[str]) -> None:
    """Raise unless a batch of these adapters can be run.

    Raises:
        ValueError: in training mode, or an unknown name.
    """
    if model.training:
        raise ValueError("A mixed batch (adapter_names) is for inference; call model.eval() first.")
    unknown = sorted(set(adapter_names) - set(roster.holders) - {"__base__"})
    if unknown:
        raise ValueError(
            f"adapter_names has the unknown adapters {unknown}; known are {sorted(roster.holders)} and '__base__'."
        )
