"""The configuration of OFT."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from ...config import PeftConfig
from ...utils.peft_types import PeftType

_FIRST_EXACT = Version("0.22.0")
_FIRST_WITH_SERIES = Version("0.18.0")


@dataclass
class OFTConfig(PeftConfig):
    """Orthogonal fine-tuning (arXiv 2306.07280): W' = W·Tᵀ with a block-diagonal rotation T of the input.

    Exactly one of `r` and `oft_block_size` is given; the other follows. One that does not divide the layer's size is
    replaced by the nearest divisor.

    The series (`use_cayley_neumann`) approximates the transpose of what the exact form gives. Adapters are trained
    with one or the other, so both stay as they are, and changing the option on a trained adapter inverts its rotation.

    Adapters with a `peft_version` before 0.22 compute what they were trained with: on a `Conv2d`, a window larger than
    1 is rotated as `peft.tuners.oft.rotation.rotate_and_fold` describes and blocks may reach across the groups, and
    `module_dropout` has no effect.

    Args:
        r: number of blocks; 0 to follow from `oft_block_size`.
        oft_block_size: size of a block; 0 to follow from `r`.
        module_dropout: in training, the probability of replacing a block's rotation by the identity.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        fan_in_fan_out: whether the base layers store their weights (in, out); corrected by layer.
        bias: which biases train too: "none", "all", "oft_only".
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        init_weights: True for the identity, False for small random rotations, as for tests.
        layers_to_transform: numbers of the layers in which suffixes count.
        layers_pattern: name of the list of layers that is numbered.
        modules_to_save: modules of which the adapter trains and saves a copy.
        coft: keep each block's skew matrix within a distance of zero (constrained OFT).
        eps: that distance, divided by the square root of the number of blocks.
        block_share: use one block for all.
        use_cayley_neumann: approximate the Cayley transform by a series instead of solving a linear system.
        num_cayley_neumann_terms: number of terms of the series.

    Raises:
        ValueError: not exactly one of `r` and `oft_block_size` is positive and the other zero, or `layers_pattern`
            without `layers_to_transform`.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.OFT
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform.")
        given = (self.r, self.oft_block_size)
        if min(given) < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                "Exactly one of r (number of blocks) and oft_block_size must be positive and the other 0, got "
                f"r={self.r} and oft_block_size={self.oft_block_size}. For r blocks, set oft_block_size=0."
            )

    @property
    def keeps_old_arithmetic(self) -> bool:
        """Whether the adapter comes from a version before 0.22 and goes on computing what it was trained with."""
        return _release(self.peft_version) < _FIRST_EXACT

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse the files of the former OFT, which was another parametrisation.

        Raises:
            ValueError: the file has no `oft_block_size`.
        """
        if "oft_block_size" not in kwargs:
            raise ValueError(
                "This OFT adapter has no oft_block_size, so it was made by an earlier method of the same name, which "
                "has other parameters. Train it anew, or merge it with the version that it was made with."
            )
        # A file that does not say its version is older than those that do.
        kwargs["peft_version"] = kwargs.get("peft_version") or "0.0.0"
        if kwargs.get("use_cayley_neumann", False) and _release(kwargs["peft_version"]) < _FIRST_WITH_SERIES:
            warnings.warn(
                "The series of the Cayley transform (use_cayley_neumann) changed in version 0.18, and this OFT "
                f"adapter was made with {kwargs['peft_version']}: its output may differ from what it was then."
            )
        return kwargs


def _release(version: str) -> Version:
    """A version as configurations state it, possibly with the commit behind `@`."""
    try:
        return Version(version.partition("@")[0])
    except InvalidVersion as error:
        raise ValueError(f"peft_version must be a version such as '0.18.0', got {version!r}.") from error


__all__ = ["OFTConfig", "PeftConfig", "PeftType"]
