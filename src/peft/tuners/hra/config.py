"""The configuration of HRA."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import PeftConfig
from ...utils.peft_types import PeftType


@dataclass
class HRAConfig(PeftConfig):
    """Householder reflection adaptation (arXiv 2405.17484): W' = W·H with H a product of r reflections.

    Args:
        r: number of reflections. An even number starts as the identity, in pairs that cancel.
        apply_GS: make the reflections' directions orthogonal (Gram-Schmidt); such an H is never the identity.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        init_weights: true to start with pairs of equal directions, false with independent ones.
        layers_to_transform: numbers of the layers in which suffixes count.
        layers_pattern: name of the list of layers that is numbered.
        bias: which biases train too: "none", "all", "hra_only".
        modules_to_save: modules of which the adapter trains and saves a copy.

    Raises:
        ValueError: `layers_pattern` without `layers_to_transform`, or one of them with a regular expression.
    """

    r: int = 8
    apply_GS: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.HRA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs target_modules to be a list; the regular expression "
                    f"{self.target_modules!r} selects layers by itself."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform.")


__all__ = ["HRAConfig", "PeftConfig", "PeftType"]
