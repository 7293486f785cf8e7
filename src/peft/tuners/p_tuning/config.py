"""Configuration of P-tuning."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ...config import PromptLearningConfig
from ...utils.peft_types import PeftType


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network that makes the prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (arXiv 2103.10385): embeddings before the input, which a small network makes of learned ones.

    The network is there for training. A file holds what it makes, so an adapter that is loaded for inference has none.

    Args:
        encoder_reparameterization_type: "MLP", three linear layers with ReLU, or "LSTM", a bidirectional LSTM with two
            linear layers after it.
        encoder_hidden_size: width inside the network; `token_dim` by default.
        encoder_num_layers: layers of the LSTM. An MLP has no such choice and warns about any but 2.
        encoder_dropout: dropout between the layers of the LSTM, from 0 to 1. An MLP has none and warns.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = field(
        default=PromptEncoderReparameterizationType.MLP, metadata={"help": "The network: 'MLP' or 'LSTM'"}
    )
    encoder_hidden_size: int = field(default=None, metadata={"help": "Width inside the network"})
    encoder_num_layers: int = field(default=2, metadata={"help": "Layers of the LSTM"})
    encoder_dropout: float = field(default=0.0, metadata={"help": "Dropout between layers of the LSTM"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.P_TUNING
