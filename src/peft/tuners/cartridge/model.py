"""The encoder of cartridges."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..prefix_tuning.model import KeyValueEncoder, check_shape

if TYPE_CHECKING:
    from .config import CartridgeConfig


class CartridgeEncoder(KeyValueEncoder):
    """Keys and values of virtual tokens, of which the first do not train (arXiv 2506.06266).

    Args:
        config: the completed configuration.
    """

    frozen = ("frozen_embedding",)
    resumes = False

    def __init__(self, config: CartridgeConfig) -> None:
        super().__init__()
        width, frozen = 2 * config.num_layers * config.token_dim, config.num_frozen_tokens
        self.num_frozen_tokens = frozen
        self.frozen_embedding = nn.Parameter(torch.empty(frozen, width), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(torch.empty(config.num_virtual_tokens - frozen, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: every entry standard normal."""
        for part in self._parts():
            nn.init.normal_(part)

    def _parts(self) -> list[nn.Parameter]:
        return [part for part in (self.frozen_embedding, self.trainable_embedding) if part is not None]

    @property
    def weight(self) -> torch.Tensor:
        """All tokens: (tokens, 2 * num_layers * token_dim)."""
        return torch.cat(self._parts())

    @property
    def embedding(self) -> SimpleNamespace:
        """What has that `weight`, as the encoders of other methods have."""
        return SimpleNamespace(weight=self.weight)

    def forward(self, prefix_tokens: torch.Tensor) -> torch.Tensor:
        """Keys and values of virtual tokens.

        Args:
            prefix_tokens: (batch, tokens), long, the tokens' indices.

        Returns:
            (batch, tokens, 2 * num_layers * token_dim).
        """
        return nn.functional.embedding(prefix_tokens, self.weight)

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Take keys and values as the cartridge, those of the frozen tokens too.

        Args:
            prompt_embeddings: (tokens, 2 * num_layers * token_dim).

        Raises:
            ValueError: the shape is another.
        """
        check_shape(prompt_embeddings, self.weight.shape)
        with torch.no_grad():
            for part, values in zip(self._parts(), prompt_embeddings.split([len(part) for part in self._parts()])):
                part.copy_(values)

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        if "prompt_embeddings" in state_dict:
            self.load_prompt_embeddings(state_dict["prompt_embeddings"])
