"""The queries of attention modules, computed once more for the prompts, and the rotation that they undergo."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def llama_rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (-b, a) on the halves of the last dimension.

    Args:
        x: (..., even).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def rotated(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries turned by the angles of their positions.

    Args:
        q: (batch, heads, tokens, head_dim).
        cos: of each token's angles, (batch or 1, tokens, head_dim).
        sin: the same.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + llama_rotate_half(q) * sin


def llama_apply_rotary_pos_emb(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Queries turned by angles that are looked up in a table.

    Args:
        q: (batch, heads, tokens, head_dim).
        cos: of every position's angles, (positions, head_dim), or the same behind dimensions of size one.
        sin: the same.
        position_ids: (batch, tokens).
    """
    cos, sin = (table.reshape(table.shape[-2:])[position_ids] for table in (cos, sin))
    return rotated(q, cos, sin)


def in_heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(batch, tokens, heads · head_dim) -> (batch, heads, tokens, head_dim)."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def llama_compute_query_states(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    """The queries of an attention module of Llama's kind, rotated.

    Args:
        model: the attention module; a `q_norm` that acts on heads is applied.
        kwargs: what it is called with, of which `hidden_states` (batch, tokens, width) and `position_embeddings`, cosines
            and sines (batch or 1, tokens, head_dim), are used.

    Returns:
        (batch, heads, tokens, head_dim).

    Raises:
        ValueError: no `position_embeddings`.
    """
    if kwargs.get("position_embeddings") is None:
        raise ValueError(
            f"A {type(model).__name__} with an adaption prompt needs position_embeddings, the cosines and sines of the "
            f"positions, got only {sorted(kwargs)}."
        )
    query = in_heads(model.q_proj(kwargs["hidden_states"]), model.head_dim)
    return rotated(normed(model, "q_norm", query), *kwargs["position_embeddings"])


def normed(model: nn.Module, norm: str, states: torch.Tensor) -> torch.Tensor:
    """Queries or keys (..., head_dim), normalised if the attention module does that."""
    return getattr(model, norm)(states) if hasattr(model, norm) else states


def gpt2_compute_query_states(
    model: nn.Module, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
) -> torch.Tensor:
    """The queries of an attention module of GPT-2.

    Args:
        model: the attention module.
        hidden_states: (batch, tokens, width).
        encoder_hidden_states: given for attention across two stacks.

    Returns:
        (batch, heads, tokens, head_dim).
    """
    if encoder_hidden_states is not None:
        return in_heads(model.q_attn(hidden_states), model.head_dim)
    return in_heads(model.c_attn(hidden_states).split(model.split_size, dim=-1)[0], model.head_dim)


def is_adaption_prompt_trainable(params: str) -> bool:
    """Whether a parameter of that dotted name is an adaption prompt's.

    Args:
        params: the name.
    """
    return params.rpartition(".")[2].startswith("adaption_")
