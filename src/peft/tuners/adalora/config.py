"""The configuration of AdaLoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from ...utils.peft_types import PeftType
from ..lora.config import LoraConfig
from ..lora.variant import SWITCHES


@dataclass
class AdaLoraConfig(LoraConfig):
    """Adaptive budget allocation (arXiv 2303.10512): W' = W + (s/ρ)·B·(A ⊙ E) with ρ the initial rank.

    During training, ranks are pruned until `target_r` is left on average, more where the weights matter less:

    * steps up to `tinit` train all ranks;
    * then, until `total_step - tfinal`, the budget falls as a cubic, and every `deltaT` steps E is set to zero for what is
      beyond it; a rank can come back;
    * in the last `tfinal` steps the choice stays.

    For that, `update_and_allocate(step)` of the tuner is to be called in every step, between the optimiser's step and
    `zero_grad()`.

    Args:
        rank_pattern: not LoRA's meaning: for the name of a module's E which of its initial ranks are kept. It is set
            during training; an adapter that is made of a configuration with a pattern has no more than these ranks, and
            saving it leaves out the others.
        target_r: rank that is left on average.
        init_r: rank to start with.
        tinit: steps before the first pruning.
        tfinal: steps after the last one.
        deltaT: steps between prunings.
        beta1: how much of the mean sensitivity is kept in each step; between 0 and 1.
        beta2: how much of its mean uncertainty is kept; between 0 and 1.
        orth_reg_weight: weight of the penalty that keeps the rows of A, and the columns of B, orthogonal.
        total_step: number of training steps.
        r: of no effect; see `init_r`.
        lora_alpha: the scaling s, which is not divided by the rank a second time.
        lora_dropout: as in `LoraConfig`, and so are the other fields that have an effect: `target_modules`,
            `exclude_modules`, `fan_in_fan_out`, `bias`, `modules_to_save`, `layers_to_transform`, `layers_pattern`,
            `trainable_token_indices`, `layer_replication`. The fields of LoRA's variants, `alpha_pattern` and `use_rslora`
            have none.
        init_lora_weights: whether E starts with zeros, and A and B as normal with standard deviation 0.02; all are
            standard normal otherwise. Names of LoRA's initialisers mean the same as True.

    Raises:
        ValueError: options that exclude each other, no positive `total_step`, a negative `orth_reg_weight`, or a schedule
            without steps to prune in.
    """

    module_patterns: ClassVar[tuple[str, ...]] = ()
    fractional: ClassVar[tuple[str, ...]] = ("lora_alpha", "tinit", "tfinal", "deltaT", "total_step")

    rank_pattern: dict | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if self.use_dora:
            raise ValueError("AdaLoRA has no form with use_dora=True; leave it False, or use LoRA.")
        if self.loftq_config:
            raise ValueError(f"AdaLoRA has no LoftQ initialisation; leave out loftq_config, got {self.loftq_config}.")
        self._check_schedule()
        self._warn_about_idle_fields()

    def _check_schedule(self) -> None:
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(f"AdaLoRA needs total_step, the number of training steps, got {self.total_step}.")
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight must not be negative, got {self.orth_reg_weight}.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"The schedule leaves no step to prune in: tinit={self.tinit} is not before total_step - tfinal = "
                f"{self.total_step} - {self.tfinal}."
            )

    def _warn_about_idle_fields(self) -> None:
        if self.r != 8:
            warnings.warn(f"r={self.r} has no effect on AdaLoRA; the rank to start with is init_r={self.init_r}.")
        switches = [
            name for name in (*SWITCHES, "use_rslora", "lora_bias", "alpha_pattern") if getattr(self, name, None)
        ]
        if isinstance(self.init_lora_weights, str):
            switches.append("init_lora_weights")
        if switches:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in switches)
            warnings.warn(f"These have no effect on AdaLoRA: {values}.")


__all__ = ["AdaLoraConfig", "LoraConfig", "PeftType"]
