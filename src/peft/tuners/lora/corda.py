"""CorDA (arXiv 2406.05223): the base weight is decomposed in view of the inputs that it gets.

`preprocess_corda` runs sample inputs through the model before the adapter is put in, and leaves the decomposition at the
layers; the initialiser uses it up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from ...engine.kinds import kind_of
from ...engine.matching import get_pattern_key
from ...engine.undo import when_done
from .base_weight import Factors, start_by_decomposition
from .initialisers import initialiser
from .preparation import (
    device_of,
    entry_of,
    has_content,
    linear_targets,
    mode,
    read_tensors,
    some_linear_targets,
    write_tensors,
)

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer

DAMPING = 0.01
"""What is first added to the diagonal of a covariance, as a part of its mean."""
TOLERANCE = 0.05
"""How far a covariance times its inverse may be from the identity; the damping is doubled until it is nearer."""
TEMPORARY = ("sample_count", "covariance_matrix", "corda_method", "rank")


@dataclass
class CordaEigens:
    """The part of a decomposition W·C = U·S·Vᵀ that an adapter takes.

    Args:
        S_WC: (r,).
        U_WC: (out, r).
        V_WC: C⁻¹·V, (in, r).
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


# ------------------------------------------------------------------------------------------------------- the preparation


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Decompose what adapters with `init_lora_weights="corda"` start from; call it before `get_peft_model`.

    A progress bar is shown, unless the environment has TQDM_DISABLE=1.

    Args:
        model: a model without adapters.
        lora_config: the adapter's configuration, with `corda_config`.
        run_model: runs the model on sample inputs. Not needed if there is a covariance file or a cache file.
        hooked_model: the model that `run_model` runs, if it is another one with the same module names.

    Raises:
        ValueError: there is no `corda_config`, no targeted linear layer, nothing to run, an input that is not finite, an
            unknown `corda_method`, or a file is another model's. Whatever is raised, the model is as it was.
    """
    config = lora_config.corda_config
    if config is None:
        raise ValueError(
            "preprocess_corda needs a configuration with corda_config=CordaConfig(...); corda_config is None."
        )
    _check_method(config.corda_method)
    targets = some_linear_targets(model, lora_config, "corda")
    if has_content(config.cache_file):
        eigens = _read_eigens(config.cache_file, targets, lora_config)
        for name, module in targets.items():
            module.eigens = eigens[name]
        return
    try:
        with mode(model if hooked_model is None else hooked_model, training=False):
            calib_cov_distribution(model, lora_config, run_model, hooked_model, config.covariance_file)
        for name, module in targets.items():
            module.corda_method, module.rank = config.corda_method, rank_of(lora_config, name)
        collect_eigens(model, lora_config, config.verbose)
        if config.cache_file:
            write_tensors(config.cache_file, _named_eigens(targets))
    except BaseException:
        _forget(targets.values(), [*TEMPORARY, "eigens"])
        raise
    if config.prune_temporary_fields:
        _forget(targets.values(), TEMPORARY)


def target_modules(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
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


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank of an adapter at a module.

    Args:
        config: the adapter's configuration.
        name: the module's.
    """
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)


def _check_method(name: str) -> None:
    if name not in ("ipm", "kpm"):
        raise ValueError(f"corda_config.corda_method must be 'ipm' or 'kpm', got {name!r}.")


def _forget(modules: Iterable[nn.Module], attributes: Iterable[str]) -> None:
    for module in modules:
        for attribute in attributes:
            module.__dict__.pop(attribute, None)


# ---------------------------------------------------------------------------------------------------------- covariances


@torch.no_grad()
def calib_cov_distribution(
    model: nn.Module,
    config: LoraConfig,
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
    covariance_file: str | os.PathLike | None,
) -> None:
    """Leave at each target the second moment of its inputs, as `covariance_matrix`.

    Args:
        model: a model without adapters.
        config: selects the targets.
        run_model, hooked_model: as in `preprocess_corda`.
        covariance_file: where the matrices are kept. If there is such a file they are read, and nothing is run.

    Raises:
        ValueError: there is neither a file nor a model to run, it did not call a target, an input is not finite, or the
            file is another model's.
    """
    targets = dict(linear_targets(model, config))
    if has_content(covariance_file):
        covariances = _read_covariances(covariance_file, targets)
    elif run_model is None:
        raise ValueError(
            "Give run_model: there is neither a cache file nor a covariance file that could be read instead."
        )
    else:
        hooked = dict(linear_targets(model if hooked_model is None else hooked_model, config))
        covariances = _covariances(hooked, run_model, config.corda_config.use_float16_for_covariance)
        if covariance_file is not None:
            write_tensors(covariance_file, covariances)
    for name, module in targets.items():
        module.covariance_matrix = covariances[name].to(module.weight.device)


def _covariances(targets: dict[str, nn.Module], run_model: Callable[[], None], half: bool) -> dict[str, torch.Tensor]:
    sums = {name: _Covariance(name, half) for name in targets}
    hooks = [module.register_forward_hook(sums[name]) for name, module in targets.items()]
    try:
        run_model()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: covariance.mean() for name, covariance in sums.items()}


class _Covariance:
    """A forward hook that adds up xᵀ·x of a layer's inputs x, each call's scaled by its largest value.

    Args:
        name: the layer's.
        half: stay in the dtype of the inputs; otherwise all is done in float32.
    """

    def __init__(self, name: str, half: bool) -> None:
        self.name, self.half = name, half
        self.total: torch.Tensor | None = None
        self.calls = 0

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        x = x if self.half else x.float()
        x = x / x.max().abs()
        if not x.isfinite().all():
            raise ValueError(f"{self.name} got inputs for its covariance that are not finite, or all zero.")
        product = x.T @ x
        self.total = product if self.total is None else self.total.add_(product)
        self.calls += 1

    def mean(self) -> torch.Tensor:
        if self.total is None:
            raise ValueError(f"run_model did not call {self.name}, so there is no covariance of its inputs.")
        if not self.total.isfinite().all():
            raise ValueError(
                f"The covariance of the inputs of {self.name} is not finite. Set use_float16_for_covariance=False."
            )
        return self.total / self.calls


def _read_covariances(path: str | os.PathLike, targets: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    tensors, where = read_tensors(path, "covariance file"), f"The covariance file {os.fspath(path)!r}"
    return {
        name: entry_of(tensors, name, 2 * kind_of(module).features(module)[:1], where)
        for name, module in targets.items()
    }


# ------------------------------------------------------------------------------------------------------- decompositions


@torch.no_grad()
def collect_eigens(model: nn.Module, config: LoraConfig, verbose: bool) -> None:
    """Decompose the weight of each target, and leave the part that its `corda_method` and `rank` select as `eigens`.

    Args:
        model: a model whose targets have a `covariance_matrix`.
        config: selects the targets.
        verbose: print shapes.
    """
    for name, module in tqdm(list(linear_targets(model, config)), desc="Collecting eigens"):
        module.eigens = collect_eigens_for_layer(module, config)
        _crop(module)  # at once, so that only one layer's whole decomposition is held
        if verbose:
            shapes = {key: tuple(value.shape) for key, value in vars(module.eigens).items()}
            tqdm.write(f"{name}: {', '.join(f'{key} {shape}' for key, shape in shapes.items())}")


@torch.no_grad()
def collect_eigens_for_layer(linear: nn.Module, config: LoraConfig) -> CordaEigens:
    """Decompose W·C = U·S·Vᵀ for one layer.

    Args:
        linear: a linear layer with a `covariance_matrix`.
        config: of no effect.

    Returns:
        S, U and C⁻¹·V, whole.
    """
    W = kind_of(linear).flip(linear.weight.data).float()
    C, inverse = damped(linear.covariance_matrix.float())
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    return CordaEigens(S_WC=S, U_WC=U, V_WC=(Vh @ inverse).T)


def damped(C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A covariance with as much added to its diagonal as it needs to be inverted, and its inverse.

    Args:
        C: (in, in).
    """
    damping = DAMPING
    while True:
        candidate = C.clone()
        candidate.diagonal().add_(C.diagonal().mean() * damping)
        inverse = torch.linalg.inv(candidate)
        if torch.dist(candidate @ inverse, torch.eye(len(C), device=C.device)) < TOLERANCE:
            return candidate, inverse
        damping *= 2


def crop_corda_eigens(model: nn.Module, config: LoraConfig) -> None:
    """Leave of each target's `eigens` the part that its `corda_method` and `rank` select.

    Args:
        model: the model.
        config: selects the targets.

    Raises:
        ValueError: an unknown method.
    """
    for _, module in linear_targets(model, config):
        _crop(module)


def _crop(module: nn.Module) -> None:
    method, rank = getattr(module, "corda_method", None), getattr(module, "rank", None)
    if rank is None:
        return
    _check_method(method)
    eigens = module.eigens
    part = slice(None, rank) if method == "ipm" else slice(-rank, None)
    module.eigens = CordaEigens(eigens.S_WC[part].clone(), eigens.U_WC[:, part].clone(), eigens.V_WC[:, part].clone())


def _named_eigens(targets: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.eigens.{key}": value for name, module in targets.items() for key, value in vars(module.eigens).items()
    }


def _read_eigens(path: str | os.PathLike, targets: dict[str, nn.Module], config: LoraConfig) -> dict[str, CordaEigens]:
    tensors, where = read_tensors(path, "cache file"), f"The cache file {os.fspath(path)!r}"
    found = {}
    for name, module in targets.items():
        fan_in, fan_out = kind_of(module).features(module)
        rank = min(rank_of(config, name), fan_in, fan_out)
        shapes = {"S_WC": (rank,), "U_WC": (fan_out, rank), "V_WC": (fan_in, rank)}
        entries = {key: entry_of(tensors, f"{name}.eigens.{key}", shape, where) for key, shape in shapes.items()}
        found[name] = CordaEigens(**{key: value.to(module.weight.device) for key, value in entries.items()})
    return found


# ------------------------------------------------------------------------------------------------------------- the start


@initialiser("corda", changes_base=True)
def corda(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """Start with the part of the base weight that matters most (ipm) or least (kpm) to the sample inputs.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        value: "corda".
        config: of no effect.

    Raises:
        ValueError: `preprocess_corda` left nothing at the base layer, something that is not finite, or of another rank.
        TypeError: the base weight has a dtype that cannot be decomposed.
    """
    base, rank, scaling = layer.get_base_layer(), layer.r[adapter], layer.scaling[adapter]
    where, eigens = layer.called, getattr(base, "eigens", None)
    if eigens is None:
        raise ValueError(
            f"{where} has nothing for the adapter {adapter!r} with init_lora_weights='corda' to start from. Call "
            "preprocess_corda(model, config, ...) before the adapter is added or loaded; for loading, with the cache file or "
            "the data of its training. An adapter saved with path_initial_model_for_weight_conversion needs none of this."
        )
    _check_eigens(eigens, layer, rank, where)
    start_by_decomposition(layer, adapter, value, lambda W: context_factors(eigens, scaling))
    when_done(_forget, [base], ["eigens"])


def _check_eigens(eigens: CordaEigens, layer: LoraLayer, rank: int, where: str) -> None:
    expected = {"S_WC": (rank,), "U_WC": (layer.out_features, rank), "V_WC": (layer.in_features, rank)}
    for key, shape in expected.items():
        tensor = getattr(eigens, key)
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {key} of preprocess_corda has values that are not finite.")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{where}: {key} of preprocess_corda has the shape {tuple(tensor.shape)}, expected {shape} for r={rank}. "
                f"Call it with the configuration of the adapter; the rank can be {min(layer.in_features, layer.out_features)} "
                "at most."
            )


def context_factors(eigens: CordaEigens, scaling: float) -> Factors:
    """A = √S·Vᵀ·C⁻¹ and B = U·√S, such that s·B·A is the selected part of W.

    Args:
        eigens: the selected part of the decomposition of W·C.
        scaling: s.

    Returns:
        (r, in) and (out, r).
    """
    root = (eigens.S_WC / scaling).sqrt()
    return root.unsqueeze(1) * eigens.V_WC.T, eigens.U_WC * root
