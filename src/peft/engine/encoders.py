"""The base of prompt encoders: the modules that prompt learning trains instead of adapting layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class BasePromptEncoder(nn.Module):
    """Makes the prompt of one adapter from trained parameters.

    A subclass has `embedding`, and a `forward(indices)` that gives the prompt.
    """

    fills_cache: ClassVar[bool] = False
    """Whether the prompt is keys and values for the attention layers instead of embeddings before the input."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their names on disk: what the encoder computes, not how it does."""
        return {"prompt_embeddings": model.get_prompt_embedding_to_save(adapter_name)}

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take the prompt of a file.

        Raises:
            RuntimeError: another shape.
        """
        self.embedding.load_state_dict({"weight": state_dict["prompt_embeddings"]}, strict=True)
