"""Configuration of cartridges."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import PromptLearningConfig
from ...utils.peft_types import PeftType


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Cartridges (arXiv 2506.06266): keys and values for every attention layer, started from those of a text.

    Used like a prefix of prefix tuning, except that the first tokens do not train: attention collects at the first
    token of a text, and training goes astray when that moves.

    Args:
        num_frozen_tokens: how many virtual tokens, from the first on, keep their values.

    Raises:
        ValueError: it is negative, or more than there are tokens.
    """

    num_frozen_tokens: int = field(default=1, metadata={"help": "How many of the first virtual tokens do not train"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        if self.num_frozen_tokens < 0:
            raise ValueError(f"num_frozen_tokens must be 0 or more, got {self.num_frozen_tokens}.")
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                f"num_frozen_tokens={self.num_frozen_tokens} is more than num_virtual_tokens={self.num_virtual_tokens}."
            )
