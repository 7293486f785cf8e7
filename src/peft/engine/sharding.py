"""Models whose parameters are spread over processes: by FSDP2 or tensor parallelism (`DTensor`s), FSDP1, or ZeRO-3.

What is done here, all processes do together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..utils.tensors import is_spread, spread_like, whole
from ..utils.warning import PeftWarning

FLATTENED = "_fsdp_wrapped_module"
WRAPPERS = (FLATTENED, "_checkpoint_wrapped_module", "_orig_mod")
"""What FSDP1, activation checkpointing and `torch.compile` call the module inside the one that they put in its place."""


def without_wrappers(name: str) -> str:
    """A dotted name without the parts that stand for wrappers of training libraries."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def several_processes() -> bool:
    """Whether this process is one of a group, so that parameters may be spread at all."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reshard(model: nn.Module) -> None:
    """Let FSDP2 take back what a forward has left whole, so that the modules hold the parameters that it keeps.

    What is changed about the others, values or `requires_grad`, is lost in the next forward.

    Args:
        model: any model; nothing happens unless it was given to `fully_shard`.
    """
    if not several_processes():
        return
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()


def same_parameter(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two are one parameter, though `gathered` may have made one of them whole."""
    return getattr(first, "stands_for", first) is getattr(second, "stands_for", second)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 keeps parameters of a model."""
    by_tensor_parallelism = getattr(model, "_device_mesh", None) is not None and getattr(model, "_tp_plan", None)
    if not several_processes() or by_tensor_parallelism or getattr(model, "_tp_size", None):
        return False
    return any(is_spread(parameter) for parameter in model.parameters())


def warn_if_trained(adapter_name: str, config: Any) -> None:
    """Say so if an adapter that may train has come too late for FSDP2 to know its weights."""
    if not config.inference_mode:
        warnings.warn(
            f"The adapter {adapter_name!r} was added to a model that fully_shard() has spread over processes before. Each "
            "process holds all of its weights, and their gradients are not averaged: use it for inference, or add it "
            "before fully_shard() to train it.",
            PeftWarning,
        )


def check_merges_alone(model: nn.Module, holders: Iterable[tuple[str, Any]]) -> None:
    """Raise unless merging into spread weights changes nothing else.

    FSDP2 keeps one parameter for modules that share it, and there is no giving one of them its own.

    Args:
        model: the model.
        holders: name and module of those that are to be merged.

    Raises:
        RuntimeError: modules share a weight that would change.
    """
    if not is_sharded(model):
        return
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            places.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, holder in holders:
        if getattr(getattr(holder, "token_adapter", holder), "shares_merged_weight", False) or not holder.held:
            continue
        for parameter in holder.get_base_layer().parameters():
            if is_spread(parameter) and len(places[id(parameter)]) > 1:
                raise RuntimeError(
                    f"{name} cannot be merged while fully_shard() spreads the model over processes: its weight is shared, "
                    f"as {' and '.join(places[id(parameter)])}, and all of them would change. Save the adapter, and merge it "
                    "in a process that has the whole model. Nothing was merged."
                )


def check_deletable(adapter_name: str, holders: Iterable[tuple[str, Any]]) -> None:
    """Raise if FSDP2 would look for an adapter's parameters where they have been deleted.

    It remembers each by the module that holds it; one that is a module's own can go with that.

    Args:
        adapter_name: the adapter.
        holders: name and module of all that may hold it.

    Raises:
        RuntimeError: it would.
    """
    for name, holder in holders if several_processes() else ():
        for container_name, container in holder.adapter_containers():
            if isinstance(container, nn.ParameterDict) and is_spread(container.get(adapter_name)):
                raise RuntimeError(
                    f"The adapter {adapter_name!r} cannot be deleted while fully_shard() spreads the model over processes: "
                    f"{container_name} of {name} is to stay where it is. Activate another adapter, or disable this one. "
                    "Nothing was deleted."
                )


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP1 has made flat parameters of a model's own, or of a part of it."""
    return several_processes() and any(FLATTENED in module._modules for module in model.modules())


def unwrapped(module: nn.Module) -> nn.Module:
    """The module in what FSDP1 has put in its place."""
    return module._modules.get(FLATTENED, module)


def with_values(module: nn.Module, values: dict[str, torch.Tensor]) -> nn.Module:
    """A twin of a module without FSDP1's units and without hooks, with other parameters; all else is shared.

    Args:
        module: any module.
        values: all its parameters by name.
    """
    module = unwrapped(module)
    twin = module.__new__(type(module))
    flat = {name.partition(".")[0] for name in values}
    twin.__dict__.update((key, value) for key, value in module.__dict__.items() if key not in flat)
    twin.__dict__.update((key, {}) for key in module.__dict__ if key.endswith("_hooks"))  # ZeRO-3's would miss its own
    twin._parameters = {name: nn.Parameter(value, False) for name, value in values.items() if "." not in name}
    twin._modules = {
        name: None if child is None else with_values(child, below(values, f"{name}."))
        for name, child in module._modules.items()
    }
    return twin


def unhooked(module: nn.Module) -> nn.Module:
    """A twin of a `gathered` module, whose call no training library takes for a step, after which to let go of parts."""
    named = module.named_parameters(remove_duplicate=False)
    return with_values(module, {without_wrappers(name): parameter.data for name, parameter in named})


def below(values: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The values whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


@contextmanager
def gathered(module: nn.Module, store: bool = False) -> Iterator[None]:
    """Within it, the parameters of a module that are spread over processes are whole.

    Args:
        module: any module; one at a time, so that no more than its parameters need memory.
        store: whether what is changed about their values stays.
    """
    if not several_processes():
        yield
    elif is_flattened(module):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(module, writeback=store):
            yield
    else:
        with (
            partitions_gathered(module.parameters(), store),
            _whole_in_place(module, store),
            _kept_in_place(module, store),
        ):
            yield


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps a parameter, which has no elements itself while nobody uses it."""
    return hasattr(tensor, "ds_id")


@contextmanager
def partitions_gathered(tensors: Iterable[torch.Tensor], store: bool = False) -> Iterator[None]:
    """Within it, parameters that ZeRO-3 has partitioned are whole; others may be among them.

    Args:
        tensors: parameters and other tensors.
        store: whether the values that the first process gives them stay; not within another such context.
    """
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor) and (store or not tensor.numel())]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if store else None):
        yield


def whole_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All of some tensors, without their gradients; of those that are partitioned, copies."""
    with partitions_gathered(tensors.values()):
        return {
            key: tensor.detach().clone() if is_partitioned(tensor) else whole(tensor.detach())
            for key, tensor in tensors.items()
        }


@contextmanager
def _whole_in_place(module: nn.Module, store: bool) -> Iterator[None]:
    spread = list(_spread_parameters(module))
    made: dict[int, nn.Parameter] = {}
    for owner, name, parameter in spread:
        if id(parameter) not in made:
            value = whole(parameter.detach()).clone()  # which may be the part itself, where there is one only
            made[id(parameter)] = whole_one = nn.Parameter(value, requires_grad=parameter.requires_grad)
            whole_one.stands_for = parameter
        owner._parameters[name] = made[id(parameter)]
    try:
        yield
    finally:
        for owner, name, parameter in spread:
            now = owner._parameters.get(name)
            if now is None:
                continue
            owner._parameters[name] = parameter
            if parameter.is_leaf and parameter.requires_grad != now.requires_grad:
                parameter.requires_grad_(now.requires_grad)
            if store:
                parameter.data.copy_(spread_like(now.data.to(parameter.dtype), parameter))


@contextmanager
def _kept_in_place(module: nn.Module, store: bool) -> Iterator[None]:
    """Let ZeRO-3 find its own parameters where they were, with the values of what took their places meanwhile."""
    held = [(owner, name, parameter) for owner in module.modules() for name, parameter in owner._parameters.items()]
    partitioned = [place for place in held if place[2] is not None and is_partitioned(place[2])]
    try:
        yield
    finally:
        for owner, name, parameter in partitioned:
            now = owner._parameters.get(name)
            if now is not None and now is not parameter:
                owner._parameters[name] = parameter
                if store:
                    parameter.data.copy_(now.data)


def _spread_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if is_spread(parameter):
                yield owner, name, parameter
