"""Configuration of VeRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from ...config import PeftConfig
from ...utils.peft_types import PeftType


@dataclass
class VeraConfig(PeftConfig):
    """Vector-based random matrix adaptation (arXiv 2310.11454): W' = W + diag(λ_b)·B·diag(λ_d)·A, with A and B random.

    Args:
        r: rank; larger than LoRA's would be, since only r + out numbers per layer train.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        projection_prng_key: seed of A and B. All adapters of a model have the same.
        save_projection: store A and B with the adapter. Without them the file is small, but it is right only where the
            seed gives the same numbers again: the same torch, and a base model of the same dtype.
        vera_dropout: probability of dropping an input of A.
        d_initial: what the elements of λ_d start as.
        fan_in_fan_out: whether the base layers store their weights (in, out); corrected by layer.
        bias: which biases train too: "none", "all", "vera_only".
        modules_to_save: modules of which the adapter trains and saves a copy.
        init_weights: start with λ_b = 0, so that the adapter changes nothing; otherwise λ_b = 1 and λ_d is normal.
        layers_to_transform: numbers of the layers in which suffixes count.
        layers_pattern: name of the list of layers that is numbered.

    Raises:
        ValueError: `layers_pattern` without `layers_to_transform`.
    """

    r: int = 256
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.VERA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} says where layers are numbered, which matters only with "
                "layers_to_transform; set that too."
            )
        if not self.save_projection:
            warnings.warn(
                "With save_projection=False, A and B are drawn again whenever the adapter is loaded. Another version "
                "of torch or another dtype of the base model may give other numbers than it was trained with."
            )
