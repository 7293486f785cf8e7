"""A model's cache of keys and values: what a call names it, how much is in it, how it is made and filled."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What versions of transformers call the argument, the newest first."""


def cache_argument(function: Callable[..., Any]) -> str | None:
    """The name that a forward (or the like) has for the cache among its parameters, None if it takes none.

    Args:
        function: for example `model.forward`.
    """
    parameters = inspect.signature(function).parameters
    return cache_name_in(parameters)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes a keyword argument of that name, for itself or among any.

    Args:
        function: for example `model.forward`.
        name: the argument.
    """
    parameters = inspect.signature(function).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def cache_name_in(arguments: Container[str]) -> str | None:
    """What the cache is called among the arguments of a call, None if it is not there.

    Args:
        arguments: their names.
    """
    for name in CACHE_NAMES:  # in full, since torch 2.6 cannot compile `next` with a default
        if name in arguments:
            return name
    return None


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, None if there is none.

    Args:
        arguments: by name.
    """
    for name in CACHE_NAMES:  # in full, as above
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def cached_length(cache: Any) -> int | None:
    """How many tokens a cache holds; None if it holds some and does not tell how many.

    Args:
        cache: a cache object, a tuple of (keys, values) per layer, or None.
    """
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return cache[0][0].shape[-2] if cache else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # only recurrent states, which have no length
        seen = getattr(cache, "has_previous_state", False)
        return None if (seen() if callable(seen) else seen) else 0


def key_value_sizes(found: dict[str, Any], heads: int, width: int, in_decoder: bool = False) -> tuple[int, int]:
    """Heads of keys and values, and width of each, of a model's attention; the largest where layers differ.

    Args:
        found: the model's configuration.
        heads: of queries.
        width: of the model.
        in_decoder: whether the layers in question are the decoder's of a model with two stacks.
    """
    if in_decoder:
        heads = found.get("decoder_attention_heads") or heads
        return heads, found.get("d_kv") or width // heads
    layers = [found, *(found.get("per_layer_config") or {}).values()]
    grouped = found.get("num_key_value_heads")
    if grouped is None:  # Falcon says it in a way of its own
        shared = found.get("multi_query") and not found.get("new_decoder_architecture")
        return (1 if shared else heads), width // heads
    if found.get("num_global_key_value_heads"):
        layers.append({"num_key_value_heads": found["num_global_key_value_heads"]})
        layers.append({"head_dim": found.get("global_head_dim")})
    head_dims = [layer["head_dim"] for layer in layers if layer.get("head_dim")]
    return max(layer.get("num_key_value_heads") or 0 for layer in layers), max(head_dims, default=width // heads)


def layer_shapes(model: nn.Module) -> dict[int, tuple[int, int]] | None:
    """Heads and width of the keys that each layer of a decoder puts into a cache; layers that put in none are left out.

    Args:
        model: the model.

    Returns:
        Layer index -> (heads, width); None where the model's modules do not say.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    shapes: dict[int, tuple[int, int]] = {}
    for module in (decoder or model).modules():
        index, head_dim, keys = (getattr(module, name, None) for name in ("layer_idx", "head_dim", "k_proj"))
        if isinstance(index, int) and isinstance(head_dim, int) and hasattr(keys, "out_features"):
            shapes[index] = (keys.out_features // head_dim, head_dim)
    return shapes or None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder.

    Args:
        model: the model.
    """
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoder_layers(model: nn.Module) -> int:
    """How many layers the decoder of a model with an encoder has.

    Args:
        model: the model.
    """
    config = getattr(model.config, "decoder", None) or model.config
    names = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def new_cache(model: nn.Module, max_length: int | None = None) -> Any:
    """An empty cache of the kind that a model makes for itself.

    Args:
        model: a transformers model.
        max_length: how many tokens it is to have room for, for one of fixed size.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache  # slow to import

    def one() -> Any:
        if max_length is not None:
            return StaticCache(config=model.config, max_cache_len=max_length)
        return DynamicCache() if is_encoder_decoder(model) else DynamicCache(config=model.config)

    if not is_encoder_decoder(model):
        return one()
    cache = EncoderDecoderCache(one(), DynamicCache())
    cache.is_updated = dict.fromkeys(range(decoder_layers(model)), False)
    return cache


def _keeps_keys(cache: Any, index: int) -> bool:
    """Whether a layer's part of a cache can hold keys; layers that carry a state of their own have another kind of part."""
    layers = getattr(cache, "layers", ())
    return index >= len(layers) or hasattr(layers[index], "update")


def fill_cache(
    cache: Any,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    shapes: dict[int, tuple[int, int]] | None = None,
    devices: dict[int, Any] | None = None,
) -> Any:
    """Put keys and values into an empty cache, layer by layer.

    Args:
        cache: of any kind; of an encoder-decoder cache, the decoder's own attention gets them.
        pairs: per layer, keys and values (batch, heads, tokens, width).
        shapes: heads and width that each layer has. One that has less gets the first ones; one that has more, or that
            keeps no keys of its own, is left out.
        devices: where each layer is, if they are not all in one place.

    Returns:
        The cache.

    Raises:
        ValueError: no layer is left.
    """
    target = getattr(cache, "self_attention_cache", cache)
    skipped = []
    for index, pair in enumerate(pairs):
        heads, width = pair[0].shape[1], pair[0].shape[-1]
        own = (heads, width) if shapes is None else shapes.get(index, (0, 0))
        if not 0 < own[0] <= heads or not 0 < own[1] <= width or not _keeps_keys(target, index):
            skipped.append(index)
            continue
        keys, values = (tensor[:, : own[0], :, : own[1]] for tensor in pair)
        if devices is not None:
            keys, values = keys.to(devices[index]), values.to(devices[index])
        target.update(keys, values, index)
    if skipped:
        found = (
            f"expected keys of at most {heads} heads of the width {width}, the model's layers have {shapes or 'none'}"
        )
        if len(skipped) == len(pairs):
            raise ValueError(f"No layer can take the prompt: {found}. Set token_dim and num_attention_heads to fit.")
        warnings.warn(f"The layers {skipped} get no prompt: they keep no keys of their own, or larger ones ({found}).")
    return cache
