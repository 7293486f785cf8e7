"""Helpers around adapted models: signatures, temporary changes of scale and dtype rules, choosing what to adapt."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .config import PeftConfig
from .engine.inspection import plain_modules
from .engine.layer import AdditiveLayer, BaseTunerLayer
from .engine.state import base_model_of
from .peft_model import PeftModel
from .tuners.lora import LoraLayer, LoraModel, dora
from .utils.integrations import dequantize_module_weight

# ----------------------------------------------------------------------------------------------------------- signatures


def update_forward_signature(model: PeftModel) -> None:
    """Let `forward` report the base model's documentation and parameters, where its own says nothing of them.

    Args:
        model: a `PeftModel`; one whose `forward` names its parameters is left alone.
    """
    _adopt_signature(model, "forward", ({"args", "kwargs"},))


def update_generate_signature(model: PeftModel) -> None:
    """Let `generate` report the base model's documentation and parameters, where its own says nothing of them.

    Args:
        model: a `PeftModel`; one whose base model does not generate is left alone.
    """
    _adopt_signature(model, "generate", ({"args", "kwargs"}, {"kwargs"}))


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Let methods report the base model's documentation and parameters.

    Args:
        model: a `PeftModel`.
        method: "forward", "generate" or "all".

    Raises:
        ValueError: another method.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method is 'forward', 'generate' or 'all', got {method!r}.")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _adopt_signature(model: PeftModel, name: str, silent: tuple[set[str], ...]) -> None:
    source = getattr(base_model_of(model), name, None)
    own = getattr(model, name, None)
    if source is None or own is None or set(inspect.signature(own).parameters) not in silent:
        return

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    functools.update_wrapper(method, source, assigned=("__doc__", "__name__", "__annotations__"), updated=())
    del method.__wrapped__  # it would keep the base model's bound method, also in copies of this one
    signature, first = inspect.signature(source), inspect.Parameter("_wrapper", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    setattr(model, name, types.MethodType(method, model))


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether there is an adapter at a place.

    Args:
        model_name_or_path: a folder or a repository.
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever the reason why its configuration cannot be read, there is no usable adapter
        return False
    return True


# ----------------------------------------------------------------------------------------------------- temporary changes


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Context in which adapters count for more or less: their additive terms are scaled.

    Args:
        model: a model with LoRA adapters, or with others that add a scaled term.
        multiplier: what to multiply every scaling by.

    Raises:
        TypeError: the multiplier is no number.
        ValueError: the model has no layer with a scaling.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier must be a number, got {type(multiplier).__name__}.")
    layers = [layer for layer in model.modules() if isinstance(layer, AdditiveLayer) and hasattr(layer, "scaling")]
    if not layers:
        raise ValueError("There is nothing to rescale: the model has no LoRA layers, nor others that have a scaling.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {adapter: scaling * multiplier for adapter, scaling in layer.scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Context in which adapters take their input in the dtype that it has.

    Args:
        model: a model with adapters.
        active: False for no effect.
    """
    layers = [layer for layer in model.modules() if active and isinstance(layer, BaseTunerLayer)]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.cast_input_dtype_enabled = enabled


class DoraCaching:
    """Context in which DoRA layers in eval mode remember their norms; called, it switches that for good.

    Args:
        enabled: whether they do within the context.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __call__(self, enabled: bool = True) -> None:
        """Switch it for good."""
        dora.ENABLE_DORA_CACHING = enabled

    def __enter__(self) -> DoraCaching:
        self._before.append(dora.ENABLE_DORA_CACHING)
        dora.ENABLE_DORA_CACHING = self.enabled
        return self

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        dora.ENABLE_DORA_CACHING = self._before.pop()


class MontecloraTrainerMixin:
    """For a `Trainer` in front of its class: adds the variational loss of MonteCLoRA adapters to the training loss."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's loss plus the mean over the model's LoRA tuners of their variational losses.

        Args:
            model: the model that is trained, wrapped in whatever way.
            inputs: of the model.
            return_outputs: whether to return its outputs as well.
            kwargs: for the trainer's own `compute_loss`.

        Raises:
            TypeError: the model has no LoRA tuner.
        """
        tuners = [module for module in model.modules() if isinstance(module, LoraModel)]
        if not tuners:
            raise TypeError(
                f"{type(self).__name__} adds the variational loss of MonteCLoRA adapters, and the model has none. Make one "
                "with LoraConfig(monteclora_config=...), or use the Trainer without the mixin."
            )
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        variational = sum(tuner._get_monteclora_loss() for tuner in tuners) / len(tuners)
        loss = loss + torch.as_tensor(variational, device=loss.device)
        return (loss, outputs) if return_outputs else loss


# ------------------------------------------------------------------------------------------------------- what to adapt

EXPERT_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Ranks the weights of a model by their condition numbers kappa, so that the best conditioned ones are adapted.

    kappa is the largest over the smallest singular value. A weight of small kappa treats all directions alike: it stands
    for general features rather than special ones, and changing it disturbs less of what was learnt before
    (arXiv 2506.16289).

    Args:
        model: any model; adapters on it are looked through.
        max_dim_size_to_analyze: weights with a larger dimension are left out, since their decomposition takes long.
        moe_param_suffixes: ends of the names of parameters (experts, out, in) that hold experts.
        show_progress: show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = EXPERT_SUFFIXES if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.show_progress = show_progress
        self._condition_numbers: dict[str, float] | None = None
        self._parameter_condition_numbers: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear layers, best conditioned first.

        Args:
            top_p: give the best fraction, at least one.
            num_modules: give so many; goes before `top_p`.
            threshold: give those with at most this kappa, if neither of the others is given.
        """
        if self._condition_numbers is None:
            self._condition_numbers = self._measure(self._linear_layers())
        return _best(self._condition_numbers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of parameters that hold experts, best conditioned first; arguments as `get_best_targets`."""
        if self._parameter_condition_numbers is None:
            self._parameter_condition_numbers = self._measure(self._expert_parameters())
        return _best(self._parameter_condition_numbers, top_p, num_modules, threshold)

    def _linear_layers(self) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
        for name, module in plain_modules(base_model_of(self.model)):
            if isinstance(module, nn.Linear):
                yield name, (module.out_features, module.in_features), functools.partial(_dense_weight, module)

    def _expert_parameters(self) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
        for path, module in plain_modules(base_model_of(self.model)):
            for attribute, parameter in module._parameters.items():
                name = f"{path}.{attribute}"
                if parameter is not None and parameter.dim() == 3 and name.endswith(self.moe_param_suffixes):
                    yield name, tuple(parameter.shape[1:]), functools.partial(torch.detach, parameter)

    def _measure(self, weights: Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]) -> dict[str, float]:
        chosen = [(name, weight) for name, shape, weight in weights if max(shape) <= self.max_dim_size_to_analyze]
        bar = tqdm(chosen, desc="Condition numbers", disable=not self.show_progress)
        return {name: _kappa(weight()) for name, weight in bar}


def _dense_weight(module: nn.Module) -> torch.Tensor:
    return dequantize_module_weight(module).detach()


@torch.no_grad()
def _kappa(weight: torch.Tensor) -> float:
    """The condition number of a matrix; of a stack of them, the mean."""
    values = torch.linalg.svdvals(weight.float())
    return (values[..., 0] / (values[..., -1] + 1e-8)).mean().item()


def _best(
    numbers: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    names = sorted(numbers, key=numbers.__getitem__)
    if num_modules is not None:
        return names[:num_modules]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name in names if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Choose what to adapt by condition numbers; see `KappaTuneSelector`.

    Args:
        model: any model.
        top_p: the fraction of linear layers, and of parameters that hold experts, to choose.
        max_dim_size_to_analyze: weights with a larger dimension are left out.
        moe_param_suffixes: ends of the names of parameters (experts, out, in) that hold experts.
        show_progress: show a bar.

    Returns:
        `target_modules` and `target_parameters` for a configuration; the latter is None without such parameters.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


__all__ = [
    "BaseTunerLayer",
    "DoraCaching",
    "KappaTuneSelector",
    "LoraLayer",
    "LoraModel",
    "MontecloraTrainerMixin",
    "PeftConfig",
    "PeftModel",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]
