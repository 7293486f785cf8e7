"""Configuration of prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...config import PromptLearningConfig
from ...utils.peft_types import PeftType


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (arXiv 2101.00190): keys and values of virtual tokens are learned for every attention layer.

    With `num_key_value_heads` in the base model's configuration, `token_dim` and `num_attention_heads` become those of
    its keys, whatever they were set to.

    Args:
        init_weights: None for a random start, "zero" for a prefix of zeros.
        encoder_hidden_size: width inside the network of `prefix_projection`; `token_dim` by default.
        prefix_projection: learn an embedding of the width `token_dim` and a network (linear, tanh, linear) that makes
            keys and values of it. The network is not saved, only what it makes.

    Raises:
        ValueError: an unknown start.
    """

    init_weights: Literal["zero"] | None = field(default=None, metadata={"help": "None (random) or 'zero'"})
    encoder_hidden_size: int = field(default=None, metadata={"help": "Width inside the network of the projection"})
    prefix_projection: bool = field(default=False, metadata={"help": "Whether a network makes the prefix"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights={self.init_weights!r} is none of None (a random start) and 'zero'.")
