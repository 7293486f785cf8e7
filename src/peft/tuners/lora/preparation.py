"""What the initialisers that look at data have in common: which layers they prepare, and files that keep what they found."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.injection import Injection
from ...engine.kinds import CONV1D_TRANSFORMERS, LINEAR
from ...engine.lifecycle import modules_of
from ...engine.matching import TargetMatcher, _maybe_include_all_linear_layers
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from ...utils.files import replacing
from ...utils.naming import near_misses

if TYPE_CHECKING:
    from .config import LoraConfig


def linear_targets(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each linear layer (or transformers' `Conv1D`) that a configuration targets.

    Args:
        model: a model without adapters.
        config: with `target_modules`.
    """
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    matcher = TargetMatcher(config)
    for name, module in modules_of(model):
        if (LINEAR.matches(module) or CONV1D_TRANSFORMERS.matches(module)) and matcher.check(name) is True:
            yield name, module


def some_linear_targets(model: nn.Module, config: LoraConfig, initialiser: str) -> dict[str, nn.Module]:
    """The same by name. A configuration without targets is given those that LoRA has for this type of model.

    Args:
        model: a model without adapters.
        config: the adapter's configuration.
        initialiser: its name, for messages.

    Raises:
        ValueError: there are none.
    """
    if config.target_modules is None:
        model_type = Injection.model_config(model).get("model_type")
        if model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise ValueError(
                f"target_modules is not set, and LoRA has no default for the model type {model_type!r}. Name the modules to "
                "adapt, or use target_modules='all-linear'."
            )
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model_type]
        config.target_modules = known if isinstance(known, str) else set(known)
    targets = dict(linear_targets(model, config))
    if not targets:
        entries = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or ()
        leaves = {name.rpartition(".")[2] for name, module in modules_of(model) if LINEAR.matches(module)}
        near = {match for entry in entries for match in near_misses(entry.rpartition(".")[2], leaves)}
        raise ValueError(
            f"target_modules={config.target_modules} selects no linear layer, and init_lora_weights={initialiser!r} is for "
            f"linear layers only.{f' Did you mean {sorted(near)}?' if near else ''}"
        )
    return targets


def device_of(model: nn.Module) -> str:
    """The type of the device that a model's parameters are on.

    Args:
        model: the model; of a `PeftModel` or a model spread by a device map, its first parameter counts.
    """
    return next(model.parameters()).device.type


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Context in which a model is in training or evaluation mode; every module's own mode is brought back."""
    before = {module: module.training for module in model.modules()}
    try:
        yield model.train(training)
    finally:
        for module, flag in before.items():
            module.training = flag


@contextmanager
def only_trainable(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which just these parameters require grad; all flags and gradients are brought back."""
    weights = list(weights)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [weight.grad for weight in weights]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
        yield
    finally:
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def has_content(path: str | os.PathLike | None) -> bool:
    """Whether a path is given and there is something in that file."""
    return path is not None and os.path.exists(path) and os.path.getsize(path) > 0


def read_tensors(path: str | os.PathLike, what: str) -> dict[str, torch.Tensor]:
    """A dictionary of tensors from a file, on the CPU; nothing else is unpickled.

    Raises:
        ValueError: the file has something else in it.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"The {what} {os.fspath(path)!r} cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(value) for value in tensors.values()):
        raise ValueError(f"The {what} {os.fspath(path)!r} is no dictionary of tensors.")
    return tensors


def write_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor]) -> None:
    """Write a dictionary of tensors beside and rename; the folder is made if there is none."""
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(tensors, temporary)


def entry_of(tensors: dict[str, torch.Tensor], key: str, shape: Iterable[int], where: str) -> torch.Tensor:
    """A tensor of a file, checked.

    Args:
        tensors: as `read_tensors` gives them.
        key: its name.
        shape: what it must have.
        where: the file, for messages.

    Raises:
        ValueError: it is missing, or has another shape.
    """
    if key not in tensors:
        near = near_misses(key, tensors)
        raise ValueError(
            f"{where} has nothing for {key!r}{f' (nearest: {near[0]})' if near else ''}. It belongs to another model or "
            "configuration; remove it, or name another file."
        )
    if tensors[key].shape != torch.Size(shape):
        raise ValueError(
            f"{where} has {key!r} of shape {tuple(tensors[key].shape)}, expected {tuple(shape)}. It belongs to another model "
            "or configuration; remove it, or name another file."
        )
    return tensors[key]
