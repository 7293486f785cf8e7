"""What prompt learning needs to know about a base model and its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .registry import method

if TYPE_CHECKING:
    from torch import nn

    from ..config import PromptLearningConfig

IGNORED = -100
"""The label of tokens that do not count in a loss."""

_SOURCES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}
"""Field -> names that models' configurations have for it, the first that is there counts."""


def _prepare_prompt_learning_config(peft_config: PromptLearningConfig, model_config: Any) -> PromptLearningConfig:
    """Complete a configuration, in place, by what it leaves to the base model's.

    Args:
        peft_config: the adapter's configuration; what it says itself stays.
        model_config: the base model's configuration or the dictionary of it; its text part counts if it has several.

    Returns:
        The same configuration.

    Raises:
        ValueError: a field that neither of them gives.
    """
    found = _as_dict(model_config)
    for field, names in _SOURCES.items():
        if getattr(peft_config, field) is None:
            value = next((found[name] for name in names if found.get(name) is not None), None)
            if value is None:
                raise ValueError(
                    f"{field} of {type(peft_config).__name__} is not set, and the base model's configuration has none "
                    f"of {', '.join(names)} to take it from. Set {field}."
                )
            setattr(peft_config, field, value)
    method(peft_config.peft_type).model_cls.complete_config(peft_config, found)
    if getattr(peft_config, "encoder_hidden_size", None) is None:
        peft_config.encoder_hidden_size = peft_config.token_dim
    return peft_config


def _as_dict(model_config: Any) -> dict[str, Any]:
    """The text part of a model's configuration as a dictionary, with what it answers to `num_hidden_layers`."""
    if isinstance(model_config, dict):
        return model_config.get("text_config") or model_config
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    aliases = getattr(model_config, "attribute_map", {})  # a DistilBert says dim and answers to hidden_size
    found = {name: getattr(model_config, name) for name in aliases if hasattr(model_config, name)}
    found |= model_config.to_dict()
    layers = getattr(model_config, "num_hidden_layers", None)
    return found if layers is None else {**found, "num_hidden_layers": layers}


def shift_tokens_right(
    input_ids: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int | None
) -> torch.Tensor:
    """A decoder's input for labels: each token one place later, after the start token.

    Args:
        input_ids: (batch, tokens), long; ignored ones (-100) become padding.
        pad_token_id: the padding.
        decoder_start_token_id: the first token.

    Raises:
        ValueError: one of the two is not known.
    """
    for name, value in (("pad_token_id", pad_token_id), ("decoder_start_token_id", decoder_start_token_id)):
        if value is None:
            raise ValueError(
                f"Labels become a decoder's input only with a {name}; the model's configuration has none."
            )
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, pad_token_id)


def create_attention_mask(
    model: nn.Module,
    *,
    model_input: dict[str, Any],
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    cache_position: torch.Tensor | None,
    batch_size: int,
    sequence_length: int,
    position_ids: torch.Tensor | None,
) -> Any:
    """The mask of a step of generation in the shape that a model with this cache wants, by the model's own rule.

    Args:
        model: the model that generates.
        model_input: its inputs of this step; `token_type_ids` count.
        attention_mask: (batch, tokens), 1 for what is there; tokens in the cache included. None for all.
        past_key_values: the cache.
        cache_position: (tokens,), places of the new tokens.
        batch_size: number of rows.
        sequence_length: number of new tokens.
        position_ids: (batch, tokens), positions of the new tokens.

    Returns:
        (batch, 1, new tokens, all tokens), bool or float; a dictionary of such by kind of layer for a model with
        several kinds; None where the model needs no mask.
    """
    from transformers.masking_utils import (
        create_masks_for_generate,
    )  # when it is needed: transformers is slow to import

    create: Callable[..., Any] = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    nothing = torch.empty((batch_size, sequence_length, 0), dtype=model.dtype, device=model.device)
    given = {
        "config": model.config,
        "inputs_embeds": nothing,  # only its sizes and sort count
        "input_embeds": nothing,
        "attention_mask": attention_mask,
        "cache_position": cache_position,
        "cache": past_key_values,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "token_type_ids": model_input.get("token_type_ids"),
    }
    known = inspect.signature(create).parameters
    return create(**{name: value for name, value in given.items() if name in known})
