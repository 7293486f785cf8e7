"""The configuration of LoKr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...utils.naming import did_you_mean
from ...utils.peft_types import PeftType
from ..lycoris_utils import LycorisConfig

INITIALISERS = ("lycoris",)


@dataclass
class LoKrConfig(LycorisConfig):
    """Low-rank Kronecker product (arXiv 2309.14859): ΔW = s·(w₁ ⊗ w₂) with s = alpha / r.

    w₁ is small and full; w₂, or both with `decompose_both`, is a product of rank r where r is less than half its size.

    Args:
        rank_pattern: regular expression for the end of a module's name -> rank.
        alpha_pattern: regular expression for the end of a module's name -> alpha.
        r: rank of the parts that are low-rank products. It divides alpha also where no part is one.
        alpha: numerator of the scaling.
        rank_dropout: in training, the probability of dropping an output feature of ΔW.
        module_dropout: in training, the probability of leaving the adapter out of a call; nothing is scaled up.
        use_effective_conv2d: factorise the window of a convolution apart from its channels.
        decompose_both: make w₁ a product of rank r too, where r is small beside it.
        decompose_factor: how to split the sizes of a layer between w₁ and w₂, see `factorization`; -1 for as evenly
            as possible.
        rank_dropout_scale: scale up the output features that rank dropout keeps.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        init_weights: True to start with ΔW = 0 by w₁ = 0, "lycoris" by w₂ = 0 as the LyCORIS library does; False to
            start everything at random, as for tests.
        layers_to_transform: numbers of the layers in which suffixes count.
        layers_pattern: name of the list of layers that is numbered.
        modules_to_save: modules of which the adapter trains and saves a copy.

    Raises:
        ValueError: `layers_pattern` without `layers_to_transform`, or an initialiser that does not exist.
    """

    r: int = 8
    alpha: int = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["lycoris"] = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOKR
        self._check_selection()
        if isinstance(self.init_weights, str) and self.init_weights not in INITIALISERS:
            hint = did_you_mean(self.init_weights, INITIALISERS)
            raise ValueError(f"init_weights is True, False or 'lycoris', got {self.init_weights!r}.{hint}")


__all__ = ["LoKrConfig", "LycorisConfig", "PeftType"]
