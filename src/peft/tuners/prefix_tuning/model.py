"""The encoder of prefix tuning, and what all prompts of keys and values have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.encoders import BasePromptEncoder, ReparameterizedEncoder
from ...utils.caches import decoder_layers, fill_cache, is_encoder_decoder, key_value_sizes, layer_shapes, new_cache
from ...utils.integrations import get_layer_device_map

if TYPE_CHECKING:
    from ...config import PromptLearningConfig
    from .config import PrefixTuningConfig


class KeyValueEncoder(BasePromptEncoder):
    """A prompt of keys and values for every layer.

    Of the row of a virtual token, layer l's keys are part 2l, its values part 2l + 1, of 2 * num_layers equal parts.
    """

    fills_cache = True
    layer_shapes: dict[int, tuple[int, int]] | None = None
    """Heads and width of each layer's keys in the base model, where they may differ."""

    @classmethod
    def promised_shapes(cls, config: PromptLearningConfig) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeddings": (config.num_virtual_tokens, 2 * config.num_layers * config.token_dim)}

    @classmethod
    def complete_config(cls, config: PromptLearningConfig, model_config: dict[str, Any]) -> None:
        in_decoder = config.task_type == "SEQ_2_SEQ_LM"
        heads, width = key_value_sizes(model_config, config.num_attention_heads, config.token_dim, in_decoder)
        config.num_attention_heads, config.token_dim = heads, heads * width

    @classmethod
    def build(cls, config: PromptLearningConfig, word_embeddings: nn.Module, base_model: nn.Module) -> KeyValueEncoder:
        if checkpoints(base_model):
            raise ValueError(_no_checkpointing(config))
        encoder = cls(config)
        if not is_encoder_decoder(base_model):
            encoder.layer_shapes = layer_shapes(base_model)
        return encoder

    def cache(
        self,
        prompt: torch.Tensor,
        base_model: nn.Module,
        config: PromptLearningConfig,
        max_cache_len: int | None = None,
        into: Any = None,
    ) -> Any:
        if base_model.training and checkpoints(base_model):  # it would leave the cache out without a word
            raise ValueError(_no_checkpointing(config))
        layers = decoder_layers(base_model) if is_encoder_decoder(base_model) else config.num_layers
        pairs = key_value_pairs(prompt.to(base_model.dtype), config, layers)
        cache = new_cache(base_model, max_cache_len) if into is None else into
        spread = len(set((getattr(base_model, "hf_device_map", None) or {}).values())) > 1
        return fill_cache(cache, pairs, self.layer_shapes, get_layer_device_map(base_model) if spread else None)


def key_value_pairs(
    prompt: torch.Tensor, config: PromptLearningConfig, layers: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A prompt as the keys and values of layers, each (batch, heads, tokens, width).

    With two stacks, the decoder's layer i gets the parts 4i and 4i + 1 modulo their number. So half of the parts of an
    even number of layers go unused; files were trained that way, and go on meaning what they meant.

    Args:
        prompt: (batch, tokens, 2 * num_layers * token_dim).
        config: the adapter's configuration.
        layers: how many layers there are.
    """
    parts = prompt.unflatten(-1, (2 * config.num_layers, config.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
    step = 4 if config.num_transformer_submodules == 2 else 2
    places = [step * layer % len(parts) for layer in range(layers)]
    return [(parts[place], parts[place + 1]) for place in places]


def checkpoints(model: nn.Module) -> bool:
    """Whether any module of a model is set to recompute its activations.

    Args:
        model: the model.
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _no_checkpointing(config: PromptLearningConfig) -> str:
    return (
        f"{config.peft_type.value} does not work with gradient checkpointing: its prompt is a cache, and checkpointed "
        "layers take none. Call gradient_checkpointing_disable() on the base model."
    )


def check_shape(prompt_embeddings: torch.Tensor, expected: torch.Size) -> None:
    """Refuse a prompt of another shape.

    Args:
        prompt_embeddings: the prompt.
        expected: (tokens, 2 * num_layers * token_dim).

    Raises:
        ValueError: it has another one.
    """
    if prompt_embeddings.shape != expected:
        raise ValueError(
            f"prompt_embeddings must have the shape {tuple(expected)} (tokens, keys and values of all layers), got "
            f"{tuple(prompt_embeddings.shape)}."
        )


class PrefixEncoder(KeyValueEncoder, ReparameterizedEncoder):
    """Keys and values of virtual tokens, learned themselves or through a network (arXiv 2101.00190).

    Args:
        config: the completed configuration. With `inference_mode` there is never a network.
    """

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        width = 2 * config.num_layers * config.token_dim
        self.prefix_projection = config.prefix_projection
        if self.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, width),
            )
            last = self.transform[-1]
        else:
            self.embedding = last = nn.Embedding(config.num_virtual_tokens, width)
        if config.init_weights == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @property
    def has_network(self) -> bool:
        return hasattr(self, "transform")

    def compute(self, indices: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(indices)
        return self.transform(embedded) if self.has_network else embedded

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        """Keys and values of virtual tokens.

        Args:
            prefix: (batch, tokens), long, the tokens' indices.

        Returns:
            (batch, tokens, 2 * num_layers * token_dim).
        """
        return super().forward(prefix)

    def saved_shapes(self) -> dict[str, torch.Size]:
        width = self.transform[-1].out_features if self.has_network else self.embedding.embedding_dim
        return {"prompt_embeddings": torch.Size((self.embedding.num_embeddings, width))}

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Take keys and values as the prefix.

        Args:
            prompt_embeddings: (tokens, 2 * num_layers * token_dim).

        Raises:
            ValueError: a network makes the prefix, or the shape is another.
        """
        if self.has_network:
            raise ValueError(
                "With prefix_projection=True a network makes the prefix, and it cannot start at given keys and values. "
                "Use prefix_projection=False."
            )
        check_shape(prompt_embeddings, self.embedding.weight.shape)
        with torch.no_grad():
            self.embedding.weight.copy_(prompt_embeddings)
