"""The layer of trainable tokens; it lives in the engine, since LoRA's `trainable_token_indices` uses it too."""

from ...engine.tokens import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]
