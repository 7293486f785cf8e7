"""LoftQ (arXiv 2310.08659): low-rank factors that make up for what quantisation rounds away."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..import_utils import is_bnb_4bit_available, is_bnb_available, is_xpu_available
from .devices import infer_device
from .integrations import dequantize_bnb_weight, get_bnb_param_type
from .naming import near_misses

BLOCK = 64
"""How many values of a 4-bit weight share a scale."""

# -------------------------------------------------------------------------------------------------------- the mathematics


def residual_factors(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of a matrix by a product A, B of that rank, evenly split: √S·Vᵀ and U·√S.

    Args:
        residual: (out, in).
        rank: r.

    Returns:
        A (r, in) and B (out, r).
    """
    U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
    root = S[:rank].sqrt()
    return root.unsqueeze(1) * Vh[:rank], U[:, :rank] * root


def alternate(
    weight: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor], rank: int, num_iter: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Find A and B with W ≈ Q + B·A, where Q is quantised: each in turn approximates what the other leaves.

    Args:
        weight: W, (out, in), in float32.
        rounded: gives the values that a matrix has after quantisation.
        rank: r.
        num_iter: turns.

    Returns:
        A (r, in) and B (out, r) of each turn.
    """
    turns: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(num_iter):
        turns.append(residual_factors(weight - quantised_part(weight, rounded, turns), rank))
    return turns


def quantised_part(
    weight: torch.Tensor,
    rounded: Callable[[torch.Tensor], torch.Tensor],
    turns: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Q for the factors of the turns so far: W itself, or what the last ones leave of it, quantised."""
    if not turns:
        return rounded(weight)
    A, B = turns[-1]
    return rounded(weight - (B @ A).to(weight.device))


def rounded_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes makes of a matrix in 4 bits (normal float, one scale for every 64 values)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(
        _on_accelerator(weight).contiguous(), quant_type="nf4", compress_statistics=False, blocksize=BLOCK
    )
    return dequantize_4bit(codes, state).to(weight)


def rounded_to_int8(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes makes of a matrix in 8 bits (whole numbers, one scale for every row)."""
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, largest, _ = int8_vectorwise_quant(_on_accelerator(weight).half())
    return codes.to(weight) * largest.to(weight).unsqueeze(1) / 127


def _on_accelerator(weight: torch.Tensor) -> torch.Tensor:
    """A matrix where the computing is done: not all releases of bitsandbytes quantise on a CPU."""
    return weight.to(infer_device()) if weight.device.type == "cpu" else weight


ROUNDING = {4: rounded_to_nf4, 8: rounded_to_int8}


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start a low-rank adapter of a weight that is going to be quantised.

    Args:
        weight: W, (out, in); it stays as it is.
        num_bits: 4 (normal float) or 8 (whole numbers).
        reduced_rank: r.
        num_iter: alternating steps.

    Returns:
        Q (out, in) in the dtype of W, and in float32 A (r, in) and B (out, r), such that W ≈ Q + B·A.

    Raises:
        ValueError: another number of bits, no step, or bitsandbytes is not installed.
    """
    turns = loftq_turns(weight.float(), num_bits, reduced_rank, num_iter)
    A, B = (factor.to(weight.device) for factor in turns[-1])
    return quantised_part(weight.float(), ROUNDING[num_bits], turns[:-1]).to(weight.dtype), A, B


MOST_STEPS = 1000
"""Whoever asks for more, in a file that others load too, asks for a process that does not end."""


def loftq_turns(
    weight: torch.Tensor, num_bits: int, rank: int, num_iter: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`alternate` with bitsandbytes; arguments and errors as `loftq_init`."""
    if num_bits not in ROUNDING:
        raise ValueError(f"LoftQ quantises to 4 or 8 bits, got loftq_bits={num_bits!r}.")
    if num_iter <= 0:
        raise ValueError(f"LoftQ takes one step at least, got loftq_iter={num_iter}.")
    if num_iter > MOST_STEPS:
        raise ValueError(
            f"LoftQ takes {MOST_STEPS} steps at most, which are far more than help, got loftq_iter={num_iter}."
        )
    if not is_bnb_available() or (num_bits == 4 and not is_bnb_4bit_available()):
        raise ValueError("LoftQ quantises by bitsandbytes, which is not installed; pip install bitsandbytes.")
    return alternate(_on_accelerator(weight), ROUNDING[num_bits], rank, num_iter)


# --------------------------------------------------------------------------------------- a model that is quantised already


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start the adapter of a 4-bit model from what its quantisation has rounded away: one step of LoftQ.

    The original weights are read from safetensors files one by one. A progress bar is shown, unless the environment has
    TQDM_DISABLE=1.

    Args:
        peft_model: a `PeftModel` with a LoRA adapter on a model that bitsandbytes has quantised to 4 bits.
        model_path: the safetensors file with the original weights, or the folder with one or its parts; by default what
            the hub client has cached under the model's name.
        adapter_name: the adapter.
        callback: called with the model and the name of each module after its replacement; where it gives False, the module's
            factors are put back.

    Raises:
        ValueError: bitsandbytes is not installed, there is no such adapter on a 4-bit layer, the model has no name to look
            for, or the file lacks a weight. Whatever is raised, the adapter is as it was.
        TypeError: `peft_model` is not the whole `PeftModel`.
        FileNotFoundError: there is no such file.
    """
    if not is_bnb_4bit_available():
        raise ValueError(
            "replace_lora_weights_loftq is for models in 4 bits, which need bitsandbytes; pip install bitsandbytes."
        )
    from ..engine.undo import Undo  # lazy: the engine stands above

    layers = _quantised_layers(peft_model, adapter_name)
    weights = OriginalWeights.of(peft_model, model_path)
    with Undo() as undo:
        for name, layer in tqdm(layers.items(), desc="LoftQ"):
            factors = [layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight]
            before = [factor.detach().clone() for factor in factors]
            undo.push(_write, factors, before)
            quantised = dequantize_bnb_weight(layer.weight).float()
            residual = weights.read(f"{name}.weight").to(quantised) - quantised
            _start(factors, residual_factors(residual, layer.r[adapter_name]))
            if callback is not None and not callback(peft_model, name):
                _write(factors, before)


def _start(factors: list[nn.Parameter], values: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write A and B; where the weight has a lower rank than the adapter, what is left of it adds nothing at first."""
    (A, B), rank = factors, len(values[0])
    A.data[:rank] = values[0]
    B.data.zero_()[:, :rank] = values[1]


def _write(factors: list[nn.Parameter], values: Any) -> None:
    for factor, value in zip(factors, values):
        factor.data.copy_(value)


def _quantised_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The LoRA layers of an adapter on 4-bit weights, by their names in the base model."""
    from ..engine.lifecycle import holders_of  # lazy: the engine stands above
    from ..engine.state import BASE_PREFIX  # lazy: the engine stands above

    layers = {
        name: layer
        for name, layer in holders_of(model)
        if adapter_name in getattr(layer, "lora_A", ())
        and get_bnb_param_type(getattr(layer.get_base_layer(), "weight", None)) == "4bit"
    }
    if not layers:
        raise ValueError(
            f"No layer of the model has both a LoRA adapter {adapter_name!r} and a weight in 4 bits by bitsandbytes; adapters "
            f"are {sorted(getattr(model, 'peft_config', ()))}."
        )
    outside = [name for name in layers if not name.startswith(BASE_PREFIX)]
    if outside:
        raise TypeError(
            f"replace_lora_weights_loftq takes the PeftModel itself, whose modules are called {BASE_PREFIX}...; got a "
            f"{type(model).__name__} with {outside[0]!r}."
        )
    return {name.removeprefix(BASE_PREFIX): layer for name, layer in layers.items()}


class OriginalWeights:
    """The weights of a model in safetensors files, read one by one.

    Args:
        folder: where the files are.
        files: name of each tensor -> the file that has it.
        prefix: what the names of a model with a head have in front, and those of a model without it do not.
    """

    def __init__(self, folder: Path, files: dict[str, str], prefix: str = "") -> None:
        self.folder, self.files, self.prefix = folder, files, prefix
        self.older_names: dict[str, str] = {}

    @classmethod
    def of(cls, model: nn.Module, path: str | os.PathLike | None) -> OriginalWeights:
        """The original weights of a model; arguments and errors as `replace_lora_weights_loftq`."""
        base = model.get_base_model()
        prefix = getattr(base, "base_model_prefix", "")
        if path is None:
            name = base.__dict__.get("name_or_path") or getattr(getattr(base, "config", None), "_name_or_path", None)
            if not name:
                raise ValueError(
                    "The model does not say where it is from: pass model_path, a safetensors file or its folder."
                )
            path = name if os.path.exists(name) else _cached(name)
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no {path}, nor {FILES[1]} beside it, with the model's original weights."
            )
        weights = cls.in_file(path, prefix)
        weights.older_names = older_names(base, weights.files)
        return weights

    @classmethod
    def in_file(cls, path: Path, prefix: str = "") -> OriginalWeights:
        """The weights in a safetensors file, or in the parts that an index names.

        Raises:
            ValueError: it is neither.
        """
        from safetensors import SafetensorError, safe_open

        try:
            if path.suffix == ".json":
                return cls(path.parent, json.loads(path.read_text(encoding="utf-8"))["weight_map"], prefix)
            with safe_open(path, framework="pt") as file:
                return cls(path.parent, dict.fromkeys(file.keys(), path.name), prefix)
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path} is neither a safetensors file nor an index of such: {error}") from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Args:
            name: as the model has it.

        Raises:
            ValueError: there is none of that name.
        """
        from safetensors import safe_open

        names = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        today = (self.older_names.get(key, key) for key in names)
        found = next((key for key in today if key in self.files), None)
        if found is None:
            near = near_misses(name, self.files)
            raise ValueError(
                f"The files in {self.folder} have no weight {name!r}{f' (nearest: {near[0]})' if near else ''}. Pass the path "
                "of the model that was quantised."
            )
        with safe_open(self.folder / self.files[found], framework="pt") as file:
            return file.get_tensor(found)


def older_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Today's name of each tensor of a file that transformers has renamed since -> its name in the file.

    Args:
        model: a base model.
        names: in its file; transformers goes on saving under the older ones.
    """
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return {}
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    renamed = {}
    for name in names:
        today = name
        for renaming in renamings:
            today, _ = renaming.rename_source_key(today)
        renamed[today] = name
    return {today: name for today, name in renamed.items() if today != name}


FILES = ("model.safetensors", "model.safetensors.index.json")


def _cached(name: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    for file in FILES:
        path = try_to_load_from_cache(name, file)
        if isinstance(path, str):
            return path
    raise ValueError(
        f"The weights of {name!r} are not in the hub client's cache as safetensors: pass model_path, a safetensors file or its "
        "folder."
    )


__all__ = ["is_bnb_4bit_available", "is_bnb_available", "is_xpu_available", "loftq_init", "replace_lora_weights_loftq"]
