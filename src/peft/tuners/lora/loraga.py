"""LoRA-GA (arXiv 2407.05000): A and B are singular vectors of the loss's gradient by the base weight.

`preprocess_loraga` finds the gradients on the model before the adapter is put in; the initialiser uses them up.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.undo import when_done
from ...utils.warning import PeftWarning
from .base_weight import Factors, start_by_decomposition
from .initialisers import initialiser, uniform_a
from .preparation import (
    device_of,
    entry_of,
    has_content,
    linear_targets,
    mode,
    only_trainable,
    read_tensors,
    some_linear_targets,
    write_tensors,
)

if TYPE_CHECKING:
    from .config import LoraConfig, LoraGAConfig
    from .layer import LoraLayer

GRADIENT = "_peft_loraga_grad"
"""Attribute of a base layer that holds the gradient by its weight, and end of its name in a cache file."""

# ---------------------------------------------------------------------------------------------------------- the gradients


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], None],
    cache_file: str | os.PathLike | None = None,
) -> None:
    """Find the gradients that adapters with `init_lora_weights="lora_ga"` start from; call it before `get_peft_model`.

    Args:
        model: a model without adapters.
        lora_config: the adapter's configuration, with `lora_ga_config`.
        train_step: runs forward and backward passes, as many as you like, and leaves the gradients where they add up. It
            runs with the model in training mode.
        cache_file: where the gradients are kept. If there is such a file they are read, and nothing is run.

    Raises:
        ValueError: there is no `lora_ga_config`, no targeted linear layer, no gradient after `train_step`, or the cache is
            another model's. Whatever is raised, the model is as it was.
    """
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "preprocess_loraga needs a configuration with init_lora_weights='lora_ga' and lora_ga_config=LoraGAConfig(...); "
            "lora_ga_config is None."
        )
    targets = _targets(model, lora_config)
    if has_content(cache_file):
        gradients = _read(cache_file, targets)
    else:
        gradients = _gradients(model, targets, train_step)
        if cache_file is not None:
            write_tensors(cache_file, {f"{name}.{GRADIENT}": gradient for name, gradient in gradients.items()})
    for name, gradient in gradients.items():
        setattr(targets[name], GRADIENT, gradient.to(targets[name].weight.device))


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    found = some_linear_targets(model, config, "lora_ga")
    quantised = [name for name, module in found.items() if hasattr(module, "quant_state")]
    if quantised:
        raise ValueError(
            f"{quantised[0]} is quantised, and LoRA-GA needs gradients by full weights. Load it unquantised."
        )
    return found


def get_target_modules(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each linear layer that a configuration targets.

    Args:
        model: a model without adapters.
        config: with `target_modules`.
    """
    return linear_targets(model, config)


def get_model_device(model: nn.Module) -> str:
    """The type of the device that the model is on.

    Args:
        model: the model.
    """
    return device_of(model)


def estimate_gradients(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None]) -> None:
    """Run `train_step`, and leave at each target the gradient by its weight, averaged over the backward passes.

    Args:
        model: a model without adapters.
        lora_config: selects the targets.
        train_step: as in `preprocess_loraga`.

    Raises:
        ValueError: no target got a gradient.
    """
    targets = dict(linear_targets(model, lora_config))
    for name, gradient in _gradients(model, targets, train_step).items():
        setattr(targets[name], GRADIENT, gradient)


def _gradients(
    model: nn.Module, targets: dict[str, nn.Module], train_step: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """The average gradient by each target's weight; without the targets that no backward pass went through."""
    passes: Counter[str] = Counter()
    hooks = [module.register_forward_hook(_counter(name, passes)) for name, module in targets.items()]
    try:
        weights = [module.weight for module in targets.values()]
        with mode(model, training=True), only_trainable(model, weights), torch.enable_grad():
            train_step()
            found = {name: module.weight.grad for name, module in targets.items()}
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {
        name: gradient.div_(passes[name]) for name, gradient in found.items() if passes[name] and gradient is not None
    }
    if not gradients:
        raise ValueError(
            f"train_step left no gradient at any of the {len(targets)} targets of LoRA-GA. It must call backward() on a loss "
            "of this model, and must not call zero_grad()."
        )
    missed = sorted(targets.keys() - gradients.keys())
    if missed:
        warnings.warn(
            f"train_step left no gradient at {missed[:5]}{f' and {len(missed) - 5} others' if len(missed) > 5 else ''}; these "
            "start as with init_lora_weights=True.",
            PeftWarning,
        )
    return gradients


def _counter(name: str, passes: Counter[str]) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
    def count(gradient: torch.Tensor) -> None:
        passes[name] += 1

    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:  # not in the first run of a checkpointed layer
            output.register_hook(count)

    return hook


def _read(path: str | os.PathLike, targets: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    tensors, where = read_tensors(path, "gradient cache"), f"The gradient cache {os.fspath(path)!r}"
    ending = f".{GRADIENT}"
    names = [key.removesuffix(ending) for key in tensors if key.endswith(ending)]
    known = {name: module for name, module in targets.items() if name in names} or targets
    return {name: entry_of(tensors, f"{name}{ending}", module.weight.shape, where) for name, module in known.items()}


# -------------------------------------------------------------------------------------------------------------- the start


@initialiser("lora_ga", changes_base=True)
def lora_ga(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """Start an adapter as `start_by_gradient`, with the settings of a configuration."""
    start_by_gradient(layer, adapter, None if config is None else config.lora_ga_config)


def start_by_gradient(layer: LoraLayer, adapter: str, config: LoraGAConfig | None) -> None:
    """Start along the gradient, so that the first steps go where full fine-tuning would; the base keeps W - s·B·A.

    Without a gradient at the base layer, as when a saved adapter is loaded, the start is uniform and changes no weight.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        config: direction and scale.

    Raises:
        ValueError: there is a gradient, but no configuration, or one with an unknown direction or scale.
    """
    base = layer.get_base_layer()
    gradient = getattr(base, GRADIENT, None)
    if gradient is None:
        _start_without_gradient(layer, adapter)
        return
    if config is None:
        raise ValueError(
            f"The adapter {adapter!r} with init_lora_weights='lora_ga' needs lora_ga_config=LoraGAConfig(...)."
        )
    gradient = gradient.T if layer.fan_in_fan_out else gradient
    rank, scaling, dtype = layer.r[adapter], layer.scaling[adapter], layer.weight.dtype
    height = layer.weight.shape[0]  # as it is stored, which for transformers' Conv1D is the input size

    def factorise(W: torch.Tensor) -> Factors:
        A, B = gradient_factors(W, gradient.float(), rank, scaling, config, height)
        return A.to(dtype), B.to(dtype)

    start_by_decomposition(layer, adapter, "lora_ga", factorise)
    when_done(base.__dict__.pop, GRADIENT, None)


def _start_without_gradient(layer: LoraLayer, adapter: str) -> None:
    warnings.warn(
        f"The adapter {adapter!r} with init_lora_weights='lora_ga' starts as with True and changes no base weight, since "
        "preprocess_loraga left no gradients. If it was trained with them, it gives other outputs now, unless it was saved "
        "with path_initial_model_for_weight_conversion.",
        PeftWarning,
    )
    if not layer.lora_A[adapter].weight.is_meta:
        uniform_a(layer, adapter)


def gradient_factors(
    W: torch.Tensor, G: torch.Tensor, rank: int, scaling: float, config: LoraGAConfig, height: int
) -> Factors:
    """A and B from the leading 2r singular vectors of the gradient.

    Args:
        W: the base weight, (out, in).
        G: the gradient by it, (out, in).
        rank: r.
        scaling: s.
        config: direction and scale.
        height: rows of the weight as it is stored.

    Returns:
        (r, in) and (out, r).

    Raises:
        ValueError: an unknown direction or scale.
    """
    U, S, V = torch.svd_lowrank(G, q=min(4 * rank, *G.shape), niter=4)
    rows, columns = directions(config.direction, rank, min(2 * rank, len(S)))
    A, sizes = V.T[rows], S[columns]
    B = U[:, columns] * sizes
    if config.scale == "stable":
        B = B * (height**0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd":
        _, largest, _ = torch.svd_lowrank(W, q=rank, niter=4)
        if sizes[0] > 0:
            B = B * (largest[0] / sizes[0])
    elif config.scale == "gd_scale":
        A, B = A / scaling, B / scaling
    elif config.scale != "unit":
        raise ValueError(
            f"lora_ga_config.scale must be 'stable', 'weight_svd', 'gd_scale' or 'unit', got {config.scale!r}."
        )
    return A, B


def directions(name: str, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the leading singular vectors A and B take.

    Args:
        name: the direction.
        rank: how many each takes.
        count: how many there are, 2r if the gradient is that large.

    Raises:
        ValueError: an unknown name.
    """
    if name == "ArBr":
        odd, even = torch.arange(1, count, 2), torch.arange(0, count, 2)
        return odd, even[: len(odd)]
    if name not in ("A2rBr", "ArB2r", "random"):
        raise ValueError(f"lora_ga_config.direction must be 'ArBr', 'A2rBr', 'ArB2r' or 'random', got {name!r}.")
    if count < 2 * rank:
        raise ValueError(
            f"LoRA-GA with direction={name!r} takes r={rank} of 2r singular vectors, but a weight has only {count}. Lower its "
            f"rank to {count // 2} by rank_pattern, or take the direction 'ArBr'."
        )
    if name == "random":
        chosen = torch.randperm(count)[:rank]
        return chosen, chosen
    leading, following = torch.arange(rank), torch.arange(rank, 2 * rank)
    return (leading, following) if name == "ArB2r" else (following, leading)
