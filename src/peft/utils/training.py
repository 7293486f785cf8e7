"""Getting a base model ready for training: quantised ones, mixed precision, and what FSDP shards as one."""
# layer: engine

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..engine.backends import make_trainable
from ..engine.encoders import BasePromptEncoder
from .registry import all_methods

QUANTIZED_ELSEWHERE = ("gptq", "aqlm", "eetq", "torchao", "hqq")
"""Methods whose models keep their other weights in the precision that they were loaded in."""


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a quantised model, bring its unquantised weights to float32 and turn gradient checkpointing on.

    A model that is not quantised is only frozen and brought to float32.

    Args:
        model: changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`, such as `use_reentrant`.
        auto_clear_cache: give memory of the weights that were replaced back to the accelerator.

    Returns:
        The model that was passed.
    """
    method = getattr(model, "quantization_method", None)
    elsewhere = method in QUANTIZED_ELSEWHERE or bool(getattr(model, "hqq_quantized", False))
    model.requires_grad_(False)
    make_trainable(model)
    if not elsewhere:
        _upcast_half_precision(model)
        if auto_clear_cache:
            _clear_cache()
    in_bits = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    if use_gradient_checkpointing and (in_bits or elsewhere):
        _checkpoint_gradients(model, gradient_checkpointing_kwargs or {})
    return model


def _upcast_half_precision(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()


def _clear_cache() -> None:
    for name in ("cuda", "xpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            backend.empty_cache()


def _checkpoint_gradients(model: nn.Module, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):
        # A re-entrant segment gives its weights gradients only if its input asks for one.
        require_input_grads(model)
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        return
    if _takes_options(enable):
        enable(gradient_checkpointing_kwargs=options)
        return
    if options:
        warnings.warn(
            f"{type(model).__name__}.gradient_checkpointing_enable takes no options, so gradient_checkpointing_kwargs="
            f"{options} has no effect.",
            FutureWarning,
        )
    enable()


def may_use_checkpointing(model: nn.Module) -> bool:
    """Whether a model says that it checkpoints activations, or doesn't say.

    Args:
        model: a base model; one of transformers can tell, under one name or, since 5.23, another.
    """
    renamed = hasattr(type(model), "is_activation_checkpointing")
    return getattr(model, "is_activation_checkpointing" if renamed else "is_gradient_checkpointing", True)


def also_requiring_input_grads(enable: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """A model's `gradient_checkpointing_enable` that lets gradients through re-entrant segments, frozen as the model is.

    transformers 5 does so by itself. Version 4 leaves it to the caller, and checkpoints re-entrantly unless told not to.

    Args:
        enable: the bound method.
        model: whose method it is.
    """

    @functools.wraps(enable)
    def enable_and_require(*args: Any, **kwargs: Any) -> Any:
        result = enable(*args, **kwargs)
        if not any(hasattr(model, hooks) for hooks in ("_require_grads_hooks", "_require_grads_hook")):
            require_input_grads(model)
        return result

    return enable_and_require


def require_input_grads(model: nn.Module) -> None:
    """Let the output of a model's input embeddings require grad; nothing for a model without embeddings.

    Args:
        model: a transformers model, or one with `get_input_embeddings`.
    """
    while "get_base_model" in dir(type(model)):  # a wrapper has `get_input_embeddings` whatever is inside
        model = model.get_base_model()
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad_of_output)


def _takes_options(enable: Callable[..., Any]) -> bool:
    return "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters


def _require_grad_of_output(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring frozen parameters to one dtype and trainable ones to float32, as mixed-precision training wants them.

    Args:
        model: changed in place; integer parameters, which hold quantised weights, stay as they are.
        dtype: of the frozen parameters, usually float16 or bfloat16.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A policy by which FSDP shards trainable leaves, prompt encoders and the model's blocks each on their own.

    Trainable and frozen weights cannot share a flat parameter, so that each trainable leaf must be a unit of its own.

    Args:
        model: a transformers model with adapters. The environment variable `FSDP_TRANSFORMER_CLS_TO_WRAP` names the
            classes of its blocks, separated by commas; the model's `_no_split_modules` are the default.

    Returns:
        For FSDP's `auto_wrap_policy`.

    Raises:
        TypeError: the model has no module of a class that is named.
    """
    blocks = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(getattr(model, "_no_split_modules", None) or ()))
    classes = {type(module).__name__: type(module) for module in model.modules()}
    names = [name.strip() for name in blocks.split(",") if name.strip()]
    missing = [name for name in names if name not in classes]
    if missing:
        raise TypeError(f"FSDP is to wrap modules of the classes {missing}, and the model has none of these.")
    encoders = [entry.model_cls for entry in all_methods().values() if issubclass(entry.model_cls, BasePromptEncoder)]
    return functools.partial(_wraps, classes=(*encoders, *(classes[name] for name in names)))


def _wraps(module: nn.Module, recurse: bool, nonwrapped_numel: int, classes: tuple[type, ...]) -> bool:
    """Whether FSDP makes a module a unit of its own; it looks inside every module (`recurse`)."""
    if recurse:
        return True
    weight = getattr(module, "weight", None)
    is_trainable_leaf = next(module.children(), None) is None and weight is not None and weight.requires_grad
    return is_trainable_leaf or isinstance(module, classes)
