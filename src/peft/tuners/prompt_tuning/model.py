"""The encoder of prompt tuning: an embedding, and where it starts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.encoders import BasePromptEncoder
from ...engine.lifecycle import AdapterHolder
from ...engine.offload import execution_device
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
            self.embedding.weight = nn.Parameter(embedded(ids, word_embeddings))

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


@torch.no_grad()
def embedded(ids: torch.Tensor, word_embeddings: nn.Module) -> torch.Tensor:
    """The base model's embeddings of tokens: (tokens, width), float32, in storage of their own.

    Args:
        ids: (tokens,), long.
        word_embeddings: the base model's, whose weights may be kept elsewhere; or the wrapper around them.
    """
    own = word_embeddings.get_base_layer() if isinstance(word_embeddings, AdapterHolder) else word_embeddings
    device = execution_device(own) or next(own.parameters()).device
    with gather_params_ctx(word_embeddings.parameters()):
        return word_embeddings(ids.to(device)).to(torch.float32, copy=True)


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
