"""Finding modules of a model by name, and small questions about inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Parent, module and attribute name of a dotted name.

    Raises:
        AttributeError: there is no such module.
    """
    parent_name, _, name = key.rpartition(".")
    return model.get_submodule(parent_name), model.get_submodule(key), name


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which an object has another attribute than its class says."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Freeze the parameters that belong to an adapter, by a component of their names."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            parameter.requires_grad_(False)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a name is the target or ends in it, at a dot."""
    return key == target_key or key.endswith(f".{target_key}")


def _get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """Number of rows of whichever input is given.

    Raises:
        ValueError: neither is.
    """
    if input_ids is None and inputs_embeds is None:
        raise ValueError("Pass input_ids or inputs_embeds.")
    return len(inputs_embeds if input_ids is None else input_ids)


def str_to_bool(value: str) -> int:
    """1 for yes, 0 for no, as words for them go.

    Raises:
        ValueError: neither.
    """
    word = value.strip().lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"{value!r} is neither yes nor no; use 'true' or 'false'.")
