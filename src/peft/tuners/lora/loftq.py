"""LoftQ (arXiv 2310.08659): the base weight becomes a quantised one, and A and B what that rounds away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...utils.loftq_utils import ROUNDING, loftq_turns, quantised_part
from .base_weight import base_weight_at_hand, change_when_done, checked_matrices, place_factors
from .initialisers import initialiser

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


@initialiser("loftq", changes_base=True, embeddings=True)
def loftq(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """Start from the rounding that a quantisation of the base weight is going to do.

    The scaling is not divided out of the factors, so that Q + s·B·A approximates W only where alpha is r.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        value: "loftq".
        config: with `loftq_config`.

    Raises:
        TypeError: the layer is not a linear one, or its weight has a dtype that cannot be decomposed.
        ValueError: there are no settings, or wrong ones, or bitsandbytes is not installed.
    """
    if layer.kind is None or layer.kind.name not in ("linear", "conv1d_transformers"):
        raise TypeError(
            f"{layer.called}: init_lora_weights='loftq' of the adapter {adapter!r} is for linear layers, which bitsandbytes "
            f"quantises, not for a {type(layer.get_base_layer()).__name__}."
        )
    settings = config.loftq_config if config is not None else None
    if not settings:
        raise ValueError(
            f"{layer.called}: init_lora_weights='loftq' of the adapter {adapter!r} needs loftq_config=LoftQConfig(...)."
        )
    bits, iterations = settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)
    with base_weight_at_hand(layer):
        turns = loftq_turns(checked_matrices(layer, adapter, value), bits, layer.r[adapter], iterations)
        place_factors(layer, adapter, *turns[-1])
    before = turns[-2:-1]
    change_when_done(layer, lambda W: quantised_part(W, ROUNDING[bits], before))
