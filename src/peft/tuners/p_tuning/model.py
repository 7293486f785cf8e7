"""The encoder of P-tuning: an embedding, and the network that makes the prompt of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...engine.encoders import ReparameterizedEncoder
from ...utils.naming import did_you_mean
from .config import PromptEncoderReparameterizationType

if TYPE_CHECKING:
    from .config import PromptEncoderConfig


class PromptEncoder(ReparameterizedEncoder):
    """Virtual tokens whose embeddings a network makes: MLP(E), or MLP(LSTM(E)) (arXiv 2103.10385).

    Args:
        config: the completed configuration. With `inference_mode` there is no network, and E is the prompt.

    Raises:
        ValueError: an unknown network.
    """

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = config.encoder_hidden_size
        self.total_virtual_tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        if not config.inference_mode:
            self._make_network(config)

    @classmethod
    def promised_shapes(cls, config: PromptEncoderConfig) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeddings": (config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim)}

    @property
    def has_network(self) -> bool:
        return hasattr(self, "mlp_head")

    def _make_network(self, config: PromptEncoderConfig) -> None:
        if self.encoder_type == PromptEncoderReparameterizationType.MLP:
            self._make_mlp(config)
        elif self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            self._make_lstm(config)
        else:
            known = [network.value for network in PromptEncoderReparameterizationType]
            hint = did_you_mean(str(self.encoder_type), known)
            raise ValueError(
                f"encoder_reparameterization_type={self.encoder_type!r} is none of {', '.join(known)}.{hint}"
            )

    def _make_mlp(self, config: PromptEncoderConfig) -> None:
        for name, used in (("encoder_num_layers", 2), ("encoder_dropout", 0.0)):
            if getattr(config, name) != used:
                warnings.warn(
                    f"{name}={getattr(config, name)} has no effect with encoder_reparameterization_type='MLP', which "
                    "has three linear layers and no dropout. Use 'LSTM', or leave it out."
                )
        self.mlp_head = nn.Sequential(
            nn.Linear(self.input_size, self.hidden_size),
            nn.ReLU(),
            nn.Linear(self.hidden_size, self.hidden_size),
            nn.ReLU(),
            nn.Linear(self.hidden_size, self.output_size),
        )

    def _make_lstm(self, config: PromptEncoderConfig) -> None:
        self.lstm_head = nn.LSTM(
            self.input_size,
            self.hidden_size,
            num_layers=config.encoder_num_layers,
            dropout=config.encoder_dropout,
            bidirectional=True,
            batch_first=True,
        )
        both = 2 * self.hidden_size  # directions
        self.mlp_head = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, self.output_size))

    def compute(self, indices: torch.Tensor) -> torch.Tensor:
        prompt = self.embedding(indices)
        if hasattr(self, "lstm_head"):
            prompt, _ = self.lstm_head(prompt)
        return self.mlp_head(prompt) if self.has_network else prompt
