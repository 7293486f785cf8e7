"""Configuration of trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...config import PeftConfig
from ...utils.peft_types import PeftType


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Training of selected rows of an embedding, as for tokens that were added to a vocabulary.

    Args:
        token_indices: the tokens whose rows train, from 0 to the number of rows less one; none of them is fine.
        target_modules: names or dotted suffixes of the embeddings; a string is a regular expression for whole names.
            By default the model's input embedding. What is tied to it follows.
        init_weights: start from the rows that are there; otherwise from normal numbers.
    """

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.TRAINABLE_TOKENS
        if hasattr(self.token_indices, "tolist"):  # a tensor or an array, which a file could not hold
            self.token_indices = self.token_indices.tolist()
