"""Configuration of prompt tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar

from ...config import PromptLearningConfig
from ...utils.naming import did_you_mean
from ...utils.peft_types import PeftType


class PromptTuningInit(str, enum.Enum):
    """Where the virtual tokens start: at the tokens of a text, at random tokens of the vocabulary, or at noise."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


def check_start(start: str, starts: type[enum.Enum]) -> None:
    """Refuse a start that does not exist.

    Args:
        start: what a configuration says.
        starts: what there is.

    Raises:
        ValueError: it is none of these.
    """
    known = [member.value for member in starts]
    if start not in known:
        hint = did_you_mean(str(start), known)
        raise ValueError(f"prompt_tuning_init={start!r} is none of {', '.join(known)}.{hint}")


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (arXiv 2104.08691): embeddings of virtual tokens are learned and put before the input's.

    Args:
        prompt_tuning_init: "RANDOM" (standard normal), "SAMPLE_VOCAB" or "TEXT"; the paper finds that starting at
            tokens helps small models.
        prompt_tuning_init_text: the text to start at, cut or repeated to `num_virtual_tokens`.
        tokenizer_name_or_path: the tokenizer of that text.
        tokenizer_kwargs: further arguments to load it with; `trust_remote_code` among them is left out, so that a
            configuration file cannot have code run.

    Raises:
        ValueError: an unknown start, "TEXT" without text or tokenizer, or arguments for a tokenizer that is not used.
    """

    starts: ClassVar[type[enum.Enum]] = PromptTuningInit

    prompt_tuning_init: PromptTuningInit | str = field(
        default=PromptTuningInit.RANDOM, metadata={"help": "Where the virtual tokens start"}
    )
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "The text to start at"})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "The tokenizer of that text"})
    tokenizer_kwargs: dict | None = field(default=None, metadata={"help": "Arguments to load the tokenizer with"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        check_start(self.prompt_tuning_init, self.starts)
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            # A text may be empty: its tokens are the special ones.
            given = {
                "tokenizer_name_or_path": bool(self.tokenizer_name_or_path),
                "prompt_tuning_init_text": self.prompt_tuning_init_text is not None,
            }
            for name in (name for name, is_given in given.items() if not is_given):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {name}, got {getattr(self, name)!r}.")
        elif self.tokenizer_kwargs:
            start = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
            raise ValueError(f"tokenizer_kwargs are used with prompt_tuning_init='TEXT' only, not with {start!r}.")
