"""The configuration of FourierFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...config import PeftConfig
from ...utils.peft_types import PeftType


@dataclass
class FourierFTConfig(PeftConfig):
    """Fourier fine-tuning (arXiv 2405.03003): ΔW is the inverse Fourier transform of a sparse spectrum.

    Where the frequencies are is not saved with the weights but drawn again from `random_loc_seed`, so an adapter can
    be used only with the configuration that it was trained with.

    Args:
        n_frequency: trained entries of the spectrum of each layer.
        scaling: factor of ΔW.
        random_loc_seed: decides where in the spectrum these entries are.
        fan_in_fan_out: whether the base layers store their weights (in, out); corrected by layer.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        bias: which biases train too: "none", "all", "fourier_only".
        modules_to_save: modules of which the adapter trains and saves a copy.
        layers_to_transform: numbers of the layers in which suffixes count.
        layers_pattern: name of the list of layers that is numbered.
        n_frequency_pattern: regular expression for the end of a module's name, from after a dot, or a whole name as
            it stands -> `n_frequency`.
        init_weights: true to start with ΔW = 0, false with a random spectrum.

    Raises:
        ValueError: `layers_pattern` without `layers_to_transform`, or one of them with a regular expression.
    """

    module_patterns: ClassVar[tuple[str, ...]] = ("n_frequency_pattern",)
    # Not LoRA's form: files made so far hold the numbers of frequencies that this one gave.
    pattern_form: ClassVar[str] = r".*\.{}$"

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict | None = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FOURIERFT
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        selecting = {name: getattr(self, name) for name in ("layers_to_transform", "layers_pattern")}
        given = {name: value for name, value in selecting.items() if value is not None}
        if given and isinstance(self.target_modules, str):
            raise ValueError(
                f"{' and '.join(given)} need target_modules to be a list of suffixes: the regular expression "
                f"{self.target_modules!r} selects layers by itself."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} says where layers are numbered; set layers_to_transform to "
                "say which of them."
            )


__all__ = ["FourierFTConfig", "PeftConfig", "PeftType"]
