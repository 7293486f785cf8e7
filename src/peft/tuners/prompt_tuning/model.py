"""The encoder of prompt tuning: an embedding, and where it starts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.encoders import BasePromptEncoder
from ...utils.integrations import gather_params_ctx
from .config import PromptTuningInit

if TYPE_CHECKING:
    from .config import PromptTuningConfig


class PromptEmbedding(BasePromptEncoder):
    """Virtual tokens whose embeddings are learned (arXiv 2104.08691).

    Args:
        config: its completed configuration.
        word_embeddings: the base model's, where the tokens may start.
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(tokens, config.token_dim)
        if config.inference_mode:  # what a file holds takes the place of any start
            return
        ids = start_ids(config, tokens, word_embeddings)
        if ids is not None:
            with torch.no_grad(), gather_params_ctx(word_embeddings.parameters()):
                start = word_embeddings(ids.to(next(word_embeddings.parameters()).device))
                self.embedding.weight = nn.Parameter(start.detach().to(torch.float32, copy=True))

    @classmethod
    def build(cls, config: PromptTuningConfig, word_embeddings: nn.Module, base_model: nn.Module) -> PromptEmbedding:
        return cls(config, word_embeddings)

    @classmethod
    def promised_shapes(cls, config: PromptTuningConfig) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeddings": (config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim)}

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Embeddings of virtual tokens.

        Args:
            indices: (batch, tokens), long.

        Returns:
            (batch, tokens, width).
        """
        return self.embedding(indices)


def start_ids(config: PromptTuningConfig, tokens: int, word_embeddings: nn.Module) -> torch.Tensor | None:
    """Ids of the vocabulary's tokens that virtual tokens start at, (tokens,); None for a random start.

    Args:
        config: the configuration.
        tokens: how many there are.
        word_embeddings: the base model's.
    """
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        return torch.randint(word_embeddings.num_embeddings, (tokens,))
    if config.prompt_tuning_init == PromptTuningInit.TEXT:
        return torch.tensor(list(itertools.islice(itertools.cycle(text_ids(config)), tokens)))
    return None


def text_ids(config: PromptTuningConfig) -> list[int]:
    """The ids of the text to start at, special tokens included.

    Raises:
        ValueError: the tokenizer makes no token of it.
    """
    from transformers import AutoTokenizer  # when it is needed: transformers is slow to import

    options = {name: value for name, value in (config.tokenizer_kwargs or {}).items() if name != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(
            f"The tokenizer {config.tokenizer_name_or_path!r} makes no token of prompt_tuning_init_text="
            f"{config.prompt_tuning_init_text!r}."
        )
    return ids
