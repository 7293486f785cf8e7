"""The configuration of LoHa."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.peft_types import PeftType
from ..lycoris_utils import LycorisConfig


@dataclass
class LoHaConfig(LycorisConfig):
    """Low-rank Hadamard product (arXiv 2108.06098): ΔW = s·(A₁·B₁) ⊙ (A₂·B₂) with s = alpha / r.

    ΔW can have a rank of up to r², with the parameters of two products of rank r.

    Args:
        rank_pattern: regular expression for the end of a module's name -> rank.
        alpha_pattern: regular expression for the end of a module's name -> alpha.
        r: rank of each of the two products.
        alpha: numerator of the scaling.
        rank_dropout: in training, the probability of dropping an output feature of ΔW; the others are scaled up.
        module_dropout: in training, the probability of leaving the adapter out of a call; nothing is scaled up.
        use_effective_conv2d: factorise the window of a convolution apart from its channels.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        init_weights: true to start with ΔW = 0; false to start all factors at random, as for tests. Only whether it
            is true counts.
        layers_to_transform: numbers of the layers in which suffixes count.
        layers_pattern: name of the list of layers that is numbered.
        modules_to_save: modules of which the adapter trains and saves a copy.

    Raises:
        ValueError: `layers_pattern` without `layers_to_transform`.
    """

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA
        self._check_selection()


__all__ = ["LoHaConfig", "LycorisConfig", "PeftType"]
