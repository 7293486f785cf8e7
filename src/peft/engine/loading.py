"""What is left to do when an adapter's weights have been loaded: fill what the file lacked, and move to the base's device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import BaseTunerLayer
from .lifecycle import Entry, holders_of


def finish_loading(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Give every tensor of an adapter that was made without storage and not loaded its proper start, and move all.

    Args:
        tuner: the method's tuner.
        model: the `PeftModel`.
        adapter_name: the adapter.
    """
    for name, holder in holders_of(tuner.model):
        if not isinstance(holder, BaseTunerLayer):
            continue
        entries = list(holder.state_entries(adapter_name))
        if any(entry.tensor.is_meta for entry in entries):
            _start_over(tuner, holder, name, adapter_name, entries)
        to_base_device(holder, adapter_name)
        holder._plan = holder._make_plan()


def _start_over(tuner: Any, holder: BaseTunerLayer, name: str, adapter_name: str, entries: list[Entry]) -> None:
    device, _ = holder._adapter_device_and_dtype()
    if device is None or device.type == "meta" or not hasattr(holder, "start_over"):
        return
    loaded = {entry.live: entry.tensor for entry in entries if not entry.tensor.is_meta}
    dtypes = {entry.live: entry.tensor.dtype for entry in entries}
    config = tuner.peft_config[adapter_name]
    parameter_name = getattr(holder, "parameter_name", None)
    key = name if parameter_name is None else f"{name}.{parameter_name}"
    holder.start_over(adapter_name, config, **tuner.layer_options(config, adapter_name, key, holder))
    for entry in holder.state_entries(adapter_name):
        tensor = loaded.get(entry.live, entry.tensor.detach()).detach().to(dtypes.get(entry.live))
        parameters = entry.owner._parameters
        if entry.attribute in parameters:
            parameters[entry.attribute] = nn.Parameter(tensor, requires_grad=entry.tensor.requires_grad)
        else:
            entry.owner._buffers[entry.attribute] = tensor
    holder.refresh([adapter_name])


def to_base_device(holder: BaseTunerLayer, adapter_name: str) -> None:
    device, _ = holder._adapter_device_and_dtype()
    if device is None or device.type == "meta":
        return
    for attribute in holder.adapter_layer_names + holder.other_param_names:
        container = holder._modules.get(attribute)
        if isinstance(container, nn.Module) and adapter_name in container:
            entry = container[adapter_name]
            if isinstance(entry, nn.Module):
                if any(tensor.device != device and not tensor.is_meta for tensor in entry.parameters()):
                    entry.to(device)
            elif torch.is_tensor(entry) and entry.device != device:
                moved = entry.data.to(device)
                container[adapter_name] = (
                    nn.Parameter(moved, entry.requires_grad) if isinstance(entry, nn.Parameter) else moved
                )


def refuse_other_rank(field: str, rank: int, ranks: set[int]) -> None:
    """Raise if the rank in a configuration is none of those that its file has.

    Args:
        field: the field's name.
        rank: its value.
        ranks: of the file's tensors; none if it has none to tell them by.

    Raises:
        RuntimeError: it is none of them.
    """
    if ranks and rank not in ranks:
        raise RuntimeError(
            f"The weights do not fit the configuration (size mismatch): {field} is {rank}, and the file's tensors are of "
            f"rank {', '.join(map(str, sorted(ranks)))}. Nothing was loaded."
        )
