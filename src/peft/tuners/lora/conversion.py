"""Turning an adapter of another method into a LoRA adapter: ΔW ≈ B·A, of a fixed rank or of as much energy as asked."""

from __future__ import annotations

import copy
import math
import numbers
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...config import PeftConfig
from ...engine.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from ...engine.layer import AdditiveLayer, BaseTunerLayer
from ...engine.lifecycle import holders_of
from ...engine.matching import TargetMatcher
from ...engine.state import BASE_PREFIX, base_model_of, file_name
from ...utils.constants import SAFETENSORS_WEIGHTS_NAME
from ...utils.naming import did_you_mean
from ...utils.peft_types import PeftType
from ...utils.tensor_files import write_weights
from .config import LoraConfig

OUT_PROJECTION = ".base_layer.out_proj"
"""What follows the name of an attention layer in that of the LoRA layer inside it, which its configuration does not name."""


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter that comes closest to an adapter of another method.

    Every method whose layers add a fixed ΔW can be converted. Modules that the adapter trains in full are kept as they
    are. The model does not change.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        rank: an int is the rank of every layer. A float in (0, 1] is the share of the sum of squared singular values
            that each layer's rank is to keep.
        adapter_name: the adapter to convert.
        progressbar: show one.
        compile_kwargs: compile the decomposition by `torch.compile` with these arguments.

    Returns:
        The configuration, and the weights by their names on disk.

    Raises:
        ValueError: a rank that is not positive, above 1 as a float, or above what a layer's size allows; an adapter that
            does not exist, trains biases, or changes nothing.
        TypeError: a layer whose adapter adds no fixed ΔW.
    """
    rank = _checked_rank(rank)
    config = _config_of(model, adapter_name)
    layers = _layers_to_convert(model, adapter_name)
    for layer in layers:
        layer.check_rank(rank)
    decompose = singular_vectors if compile_kwargs is None else torch.compile(singular_vectors, **compile_kwargs)
    for layer in tqdm(layers, disable=not progressbar, desc="Converting to LoRA"):
        layer.convert(rank, decompose)
    state: dict[str, Tensor] = {}
    for layer in layers:
        state |= layer.state(max(other.rank for other in layers if other.target == layer.target))
    if not state:
        raise ValueError(f"The adapter {adapter_name!r} changes no weight, so there is nothing to convert.")
    return _lora_config(model, config, rank, layers), state | _copies(model, adapter_name)


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Convert an adapter to LoRA and save it, to be loaded like any LoRA adapter.

    Args:
        path: a folder, which is made.
        model: as `convert_to_lora`; so are the other arguments.
        rank: the same.
        adapter_name: the same.
        progressbar: the same.
        compile_kwargs: the same.

    Raises:
        ValueError: the path is a file, or as `convert_to_lora`; nothing is written.
        TypeError: as `convert_to_lora`.
    """
    if os.path.isfile(path):
        raise ValueError(f"{os.fspath(path)!r} is a file; an adapter is saved to a folder.")
    config, state = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, state)
    config.inference_mode = True
    base = base_model_of(model)
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(folder, auto_mapping_dict=mapping if config.task_type is None else None)


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of the reduced decomposition."""
    return torch.linalg.svd(matrix, full_matrices=False)


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """The smallest k for which the first k singular values have this share of the sum of squares; 0 if all are zero.

    Args:
        singular_values: in descending order.
        share: in (0, 1].
    """
    noise = singular_values[0] * torch.finfo(singular_values.dtype).eps * len(singular_values)
    energy = torch.where(singular_values > noise, singular_values, 0).double().square().cumsum(0)
    if energy[-1] == 0:
        return 0
    return int((energy < share * energy[-1]).sum()) + 1


# ---------------------------------------------------------------------------------------------------------------- a layer


@dataclass
class ConvertedLayer:
    """One layer on its way to LoRA.

    Args:
        layer: the layer.
        adapter_name: the adapter.
        path: the layer's name in the file, without prefix.
    """

    layer: AdditiveLayer
    adapter_name: str
    path: str
    factors: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    @property
    def target(self) -> str:
        """The name by which a configuration knows the layer."""
        return self.path.removesuffix(OUT_PROJECTION)

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else len(self.factors[0])

    @property
    def shape(self) -> tuple[int, int]:
        """ΔW's, as a matrix."""
        out, *rest = self.layer.kind.shape(self.layer.get_base_layer())
        return out, math.prod(rest)

    def check_rank(self, rank: int | float) -> None:
        if isinstance(rank, int) and rank > min(self.shape) and self.layer.exact_factors(self.adapter_name) is None:
            out, inner = self.shape
            raise ValueError(
                f"rank={rank} does not fit {self.path!r}: its update is a {out} x {inner} matrix, so that the rank is at "
                f"most {min(out, inner)}. Give a float to have the rank of each layer chosen."
            )

    def convert(self, rank: int | float, decompose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        """Find A (r, in, *kernel) and B (out, r)."""
        self.factors = self.layer.exact_factors(self.adapter_name)
        if self.factors is not None:
            return
        delta = self.layer.effective_delta(self.adapter_name)
        U, S, Vh = decompose(delta.float().flatten(1))
        k = rank if isinstance(rank, int) else rank_for_energy(S, rank)
        if k:
            self.factors = (Vh[:k].to(delta.dtype).unflatten(1, delta.shape[1:]), (U[:, :k] * S[:k]).to(delta.dtype))

    def state(self, rank: int) -> dict[str, Tensor]:
        """The layer's tensors by their names on disk, padded to a rank."""
        if not rank:
            return {}
        out, *inner = self.layer.kind.shape(self.layer.get_base_layer())
        weight = self.layer.weight
        A, B = self.factors or (weight.new_zeros(0, *inner), weight.new_zeros(out, 0))
        A = torch.cat([A, A.new_zeros(rank - len(A), *inner)])
        B = torch.cat([B, B.new_zeros(out, rank - B.shape[1])], dim=1)
        B = B.view(*B.shape, *[1] * (A.dim() - 2))
        names = ("lora_embedding_A", "lora_embedding_B") if self._is_embedding else ("lora_A.weight", "lora_B.weight")
        return {f"{BASE_PREFIX}{self.path}.{name}": value.contiguous() for name, value in zip(names, (A, B))}

    @property
    def _is_embedding(self) -> bool:
        return self.layer.kind.name == "embedding"


# -------------------------------------------------------------------------------------------------------- what there is


def _checked_rank(rank: int | float) -> int | float:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Real):
        raise TypeError(f"rank must be an int or a float, got {rank!r}.")
    if isinstance(rank, numbers.Integral):
        if rank < 1:
            raise ValueError(f"A rank must be at least 1, got {rank}.")
        return int(rank)
    if not 0 < rank <= 1:
        raise ValueError(
            f"A float is the share of the update to keep and lies in (0, 1], got {rank}. Give an int for a fixed rank."
        )
    return float(rank)


def _config_of(model: nn.Module, adapter_name: str) -> PeftConfig | None:
    """The adapter's configuration, None if the model has none for any adapter."""
    configs = getattr(model, "peft_config", None) or {}
    if not configs:
        return None
    if adapter_name not in configs:
        known = sorted(configs)
        raise ValueError(
            f"There is no adapter {adapter_name!r}; known are {known}.{did_you_mean(adapter_name, known)}"
        )
    config = configs[adapter_name]
    if config.peft_type == PeftType.LORA:
        warnings.warn(f"The adapter {adapter_name!r} is a LoRA adapter already; converting it only changes its ranks.")
    for name in ("bias", "lora_bias"):
        if getattr(config, name, "none") not in ("none", False, None):
            raise ValueError(
                f"The adapter {adapter_name!r} trains biases ({name}={getattr(config, name)!r}), which a conversion would "
                f"lose; only adapters with {name}={'none' if name == 'bias' else False!r} can be converted."
            )
    return config


def _layers_to_convert(model: nn.Module, adapter_name: str) -> list[ConvertedLayer]:
    layers, inside = [], "\0"
    for name, holder in holders_of(model):
        if isinstance(holder, AuxiliaryTrainingWrapper):
            inside = f"{name}."
        elif adapter_name in holder._get_available_adapters() and not name.startswith(inside):
            path = file_name(model, name, adapter_name).removeprefix(BASE_PREFIX)
            if not holder.supports_lora_conversion(adapter_name):
                raise TypeError(
                    f"The adapter {adapter_name!r} of {path!r} cannot be converted to LoRA: {type(holder).__name__} adds no "
                    "fixed update that a LoRA layer can represent."
                )
            layers.append(ConvertedLayer(holder, adapter_name, path))
    if not layers:
        raise TypeError(
            f"The {type(model).__name__} has no layer with an adapter {adapter_name!r} that can be converted to LoRA."
        )
    return layers


def _copies(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter trains in full, by its names on disk."""
    found = {}
    for name, holder in holders_of(model):
        if isinstance(holder, AuxiliaryTrainingWrapper):
            path = file_name(model, name, adapter_name).removeprefix(BASE_PREFIX)
            for entry in holder.state_entries(adapter_name):
                found[f"{BASE_PREFIX}{path}.{entry.saved}"] = entry.tensor.detach().clone()
    return found


# -------------------------------------------------------------------------------------------------------- the new config


def _lora_config(
    model: nn.Module, source: PeftConfig | None, rank: int | float, layers: list[ConvertedLayer]
) -> LoraConfig:
    """A configuration under which each layer gets its rank and scaling 1."""

    def given(name: str, default: Any = None) -> Any:
        return copy.copy(getattr(source, name, default))

    general = rank if isinstance(rank, int) else 1
    targets = given("target_modules")
    config = LoraConfig(
        r=general,
        lora_alpha=general,
        target_modules=targets if isinstance(targets, str) else list(targets or ()),
        exclude_modules=given("exclude_modules"),
        layers_to_transform=given("layers_to_transform"),
        layers_pattern=given("layers_pattern"),
        modules_to_save=given("modules_to_save"),
        trainable_token_indices=given("trainable_token_indices"),
        fan_in_fan_out=all(layer.layer.kind.name == "conv1d_transformers" for layer in layers),
        task_type=given("task_type"),
        base_model_name_or_path=given("base_model_name_or_path"),
        revision=given("revision"),
    )
    ranks: dict[str, int] = {}
    for layer in layers:
        ranks[layer.target] = max(layer.rank, ranks.get(layer.target, 0))
    for target, found in ranks.items():
        _add_target(config, target, found, ranks)
    return config


def _add_target(config: LoraConfig, target: str, rank: int, ranks: dict[str, int]) -> None:
    by_pattern = isinstance(config.target_modules, str)
    ends_others = any(other.endswith(f".{target}") for other in ranks)  # so that its name alone would select these too
    if rank == 0 and not ends_others:
        _exclude(config, target)
    elif rank and (rank != config.r or by_pattern):
        pattern = ("^" if ends_others else "") + re.escape(target).replace("\\.", ".")
        config.rank_pattern[pattern] = config.alpha_pattern[pattern] = rank
    if rank and not by_pattern and (rank == config.r or TargetMatcher(config).check(target) is not True):
        config.target_modules.add(target)


def _exclude(config: LoraConfig, target: str) -> None:
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = f"(?:{config.exclude_modules})|{re.escape(target)}"
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), target}


__all__ = [
    "SAFETENSORS_WEIGHTS_NAME",
    "BaseTunerLayer",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "convert_to_lora",
    "save_as_lora",
]
