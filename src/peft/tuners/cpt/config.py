"""Configuration of context-aware prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...config import PromptLearningConfig
from ...utils.naming import did_you_mean
from ...utils.peft_types import PeftType, TaskType

LOSS_TYPES = ("none", "decay")


@dataclass
class CPTConfig(PromptLearningConfig):
    """Context-aware prompt tuning (arXiv 2410.17222): the tokens of a context of examples are put before the input,
    and their embeddings are moved a little to make its labels, and those of the input, more likely. For causal
    language models.

    What a token is, its type says, one of the codes (modulo 4): 1 for the template around an input, 2 for an input, 3
    for the template around an output, 0 for a label. A context of several examples counts on: 1 to 4 for the first, 5
    to 8 for the second, and so on. A type of 0 itself is for what is none of these.

    Args:
        cpt_token_ids: the context's tokens. `num_virtual_tokens` is their number.
        cpt_mask: 1 for each token. It takes part in nothing: all tokens of the context are seen.
        cpt_tokens_type_mask: the type of each token.
        opt_weighted_loss_type: "none", all labels count alike; "decay", those of earlier examples count less.
        opt_loss_decay_factor: with "decay", what the labels of an example count as a multiple of those of the next.
        opt_projection_epsilon: how far the embedding of an input's token may move, in units of sqrt(token_dim / 2048).
        opt_projection_format_epsilon: the same for tokens of templates. Labels do not move.
        tokenizer_name_or_path: the tokenizer that the context was made with, for the record; it is not loaded.

    Raises:
        ValueError: another task than CAUSAL_LM, lists of different lengths, an unknown kind of loss, or a number that
            is None or negative.
    """

    cpt_token_ids: list[int] | None = field(default=None, metadata={"help": "The context's tokens; [0] by default"})
    cpt_mask: list[int] | None = field(default=None, metadata={"help": "1 for each token, without effect"})
    cpt_tokens_type_mask: list[int] | None = field(
        default=None, metadata={"help": "The type of each token; all 1 by default"}
    )
    opt_weighted_loss_type: Literal["none", "decay"] | None = field(
        default="none", metadata={"help": "'none', or 'decay' to let earlier examples count less"}
    )
    opt_loss_decay_factor: float | None = field(default=1.0, metadata={"help": "From an example to the one before"})
    opt_projection_epsilon: float | None = field(default=0.1, metadata={"help": "How far inputs may move"})
    opt_projection_format_epsilon: float | None = field(default=0.1, metadata={"help": "How far templates may move"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "The context's tokenizer"})

    is_prompt_learning = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CPT
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"CPT is for task_type='CAUSAL_LM' only, got {self.task_type!r}.")
        self._check_context()
        self._check_options()
        self.num_virtual_tokens = len(self.cpt_token_ids)
        self.num_transformer_submodules = 1
        self.num_layers = self.token_dim = self.num_attention_heads = None  # always the base model's

    def _check_context(self) -> None:
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * len(self.cpt_token_ids))
            if len(getattr(self, name)) != len(self.cpt_token_ids):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.cpt_token_ids)} cpt_token_ids, got "
                    f"{len(getattr(self, name))}."
                )

    def _check_options(self) -> None:
        if self.opt_weighted_loss_type not in LOSS_TYPES:
            hint = did_you_mean(str(self.opt_weighted_loss_type), LOSS_TYPES)
            raise ValueError(
                f"opt_weighted_loss_type={self.opt_weighted_loss_type!r} is none of {', '.join(LOSS_TYPES)}.{hint}"
            )
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            value = getattr(self, name)
            if value is None or not value >= 0:
                raise ValueError(f"{name} must be a number that is not negative, got {value!r}.")
