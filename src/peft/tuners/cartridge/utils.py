"""Cartridges and prefixes that start from a text, and cartridges put one behind the other."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...config import PeftConfig
from ...engine.checkpoint import load_peft_weights
from ...engine.state import check_finite
from ...utils.caches import cache_argument
from ...utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from ...utils.error import UnknownAdapterError
from ...utils.naming import did_you_mean
from ...utils.peft_types import PeftType
from ...utils.tensor_files import write_weights
from .config import CartridgeConfig

if TYPE_CHECKING:
    from ...peft_model import PeftModel

KEYS_AND_VALUES = (PeftType.CARTRIDGE, PeftType.PREFIX_TUNING)


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """Lay the first tokens of a cache out as a cartridge's or prefix's embeddings.

    Args:
        past_key_values: the cache of one text: a cache object, one with `to_legacy_cache`, or per layer a tuple that
            starts with keys and values, each (1, heads, tokens, width).
        num_virtual_tokens: how many tokens to take.

    Returns:
        (num_virtual_tokens, 2 * layers * heads * width), detached.

    Raises:
        TypeError: no kind of cache.
        ValueError: no layer, more than one text, too few tokens, or layers of different shapes.
    """
    parts = [part for pair in _pairs(past_key_values) for part in pair]
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens must be a positive number, got {num_virtual_tokens!r}.")
    if not parts:
        raise ValueError("past_key_values has no layer.")
    for index, part in enumerate(parts):
        place = f"the {'values' if index % 2 else 'keys'} of layer {index // 2} in past_key_values"
        if not torch.is_tensor(part) or part.dim() != 4:
            found = f"shape {tuple(part.shape)}" if torch.is_tensor(part) else type(part).__name__
            raise ValueError(f"{place}: expected a tensor (1, heads, tokens, width), found {found}.")
        batch, heads, tokens, width = part.shape
        if batch != 1:
            raise ValueError(f"{place}: expected one text (batch 1), found {batch}.")
        if tokens < num_virtual_tokens:
            raise ValueError(f"{place}: expected at least {num_virtual_tokens} tokens, found {tokens}.")
        if (heads, width) != (parts[0].shape[1], parts[0].shape[3]):
            expected = (parts[0].shape[1], parts[0].shape[3])
            raise ValueError(f"{place}: expected (heads, width) {expected} as in layer 0, found {(heads, width)}.")
    rows = [part.detach()[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for part in parts]
    return torch.cat([row.to(rows[0].device) for row in rows], dim=1)


def _pairs(cache: Any) -> list[tuple[Any, Any]]:
    if hasattr(cache, "to_legacy_cache"):
        cache = cache.to_legacy_cache()
    if not isinstance(cache, Iterable) or isinstance(cache, str | bytes | dict | torch.Tensor):
        raise TypeError(
            "past_key_values must be a cache, or for each layer a tuple of keys and values, got "
            f"{type(cache).__name__}."
        )
    pairs = []
    for index, layer in enumerate(cache):
        if not isinstance(layer, Sequence) or isinstance(layer, str) or len(layer) < 2:
            raise ValueError(f"Layer {index} of past_key_values: expected a tuple (keys, values), found {layer!r}.")
        pairs.append(tuple(layer[:2]))
    return pairs


def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> torch.Tensor:
    """Let a cartridge or prefix start at the first tokens of a cache.

    Args:
        model: a model with such an adapter.
        adapter_name: its name; the active one by default.
        past_key_values: the cache of one text, see `prompt_embeddings_from_past_key_values`.
        num_virtual_tokens: how many tokens to take; as many as the adapter has, which is all that fits.

    Returns:
        What was loaded: (tokens, 2 * num_layers * token_dim).

    Raises:
        ValueError: an unknown adapter (a `KeyError` too), one of another method, a prefix that a network makes, a model
            with two stacks, or a cache that does not fit.
    """
    adapter_name, tokens = _adapter_to_fill(model, adapter_name, num_virtual_tokens)
    embeddings = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=tokens)
    model.prompt_encoder[adapter_name].load_prompt_embeddings(embeddings)
    return embeddings


def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Let a cartridge or prefix start at the keys and values that the base model computes for a text.

    Args:
        model: a model with such an adapter.
        tokenizer: the base model's.
        text: the text; its first tokens are used.
        adapter_name: the adapter; the active one by default.
        num_virtual_tokens: how many tokens to take; as many as the adapter has, which is all that fits.
        use_chat_template: make the text a system message, if the tokenizer can; otherwise it is taken as it is.
        max_length: read no more than that many tokens of the text.

    Returns:
        What was loaded: (tokens, 2 * num_layers * token_dim).

    Raises:
        ValueError: an unknown adapter (a `KeyError` too), one of another method, a prefix that a network makes, a model
            that is not for CAUSAL_LM, or a text of too few tokens.
    """
    from transformers import DynamicCache  # when it is needed: transformers is slow to import

    adapter_name, tokens = _adapter_to_fill(model, adapter_name, num_virtual_tokens)
    if model.peft_config[adapter_name].task_type != "CAUSAL_LM":
        raise ValueError(
            f"Only a model that continues texts computes keys and values of one: expected task_type CAUSAL_LM, the "
            f"adapter {adapter_name!r} has {model.peft_config[adapter_name].task_type!r}."
        )
    ids = _token_ids(tokenizer, text, use_chat_template)[:, :max_length].to(model.device)
    if ids.shape[1] < tokens:
        raise ValueError(
            f"The text has {ids.shape[1]} tokens, and the adapter {adapter_name!r} needs {tokens} to start at. Pass a "
            "longer text, or make the adapter with fewer num_virtual_tokens."
        )
    cache = DynamicCache()  # without windows: it keeps the first tokens of a long text
    name = cache_argument(model.base_model.forward)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{name: cache})
    finally:
        model.train(training)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=tokens
    )


def _adapter_to_fill(model: PeftModel, adapter_name: str | None, tokens: int | None) -> tuple[str, int]:
    """Name and number of tokens of an adapter that is keys and values."""
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        known = sorted(model.peft_config)
        raise UnknownAdapterError(f"There is no adapter {name!r}; known are {known}.{did_you_mean(name, known)}")
    config = model.peft_config[name]
    if config.peft_type not in KEYS_AND_VALUES:
        raise ValueError(
            f"Only {' and '.join(kind.value for kind in KEYS_AND_VALUES)} can start at keys and values; the adapter "
            f"{name!r} is of {getattr(config.peft_type, 'value', config.peft_type)}."
        )
    if getattr(config, "prefix_projection", False):
        raise ValueError(
            f"The prefix of the adapter {name!r} is made by a network (prefix_projection=True), which cannot start at "
            "given keys and values. Use prefix_projection=False."
        )
    if config.num_transformer_submodules == 2:
        raise ValueError(
            f"The adapter {name!r} is of a model with two stacks, whose layers share keys and values: it cannot start "
            "at those of a text."
        )
    return name, config.num_virtual_tokens if tokens is None else tokens


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool) -> torch.Tensor:
    """(1, tokens), as a system message if that is wanted and possible."""
    ids = None
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        message = [{"role": "system", "content": text}]
        options = {"tokenize": True, "add_generation_prompt": False, "return_dict": False, "return_tensors": "pt"}
        try:
            ids = tokenizer.apply_chat_template(message, **options)
        except _template_errors():  # no template, or one that knows no system message
            ids = None
    if ids is None:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return torch.as_tensor(ids).reshape(1, -1)


def _template_errors() -> tuple[type[Exception], ...]:
    try:
        from jinja2 import TemplateError
    except ImportError:  # then no template can be used either
        return ValueError, ImportError
    return ValueError, TemplateError


_EQUAL = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike],
    *,
    output_path: str | os.PathLike,
    safe_serialization: bool = True,
) -> None:
    """Save the cartridges of several texts as one, their tokens one behind the other.

    The first one's tokens stay frozen that were frozen in it; of the others, all train.

    Args:
        adapter_paths: two or more folders (or repositories) of cartridges for one base model.
        output_path: the folder to write; it is made if there is none. It is written whole or not at all.
        safe_serialization: write safetensors; torch's format otherwise.

    Raises:
        ValueError: fewer than two, one that is no cartridge or does not fit the first.
        FileExistsError: `output_path` is a file.
    """
    if isinstance(adapter_paths, str | os.PathLike) or len(adapter_paths) < 2:
        raise ValueError(f"adapter_paths must name at least 2 cartridges to compose, got {adapter_paths!r}.")
    paths = [os.fspath(path) for path in adapter_paths]
    output = Path(output_path)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output_path={os.fspath(output)!r} is a file; a cartridge is saved to a folder.")
    configs = [_cartridge_config(path) for path in paths]
    for path, config in zip(paths[1:], configs[1:]):
        for name in _EQUAL:
            first, other = getattr(configs[0], name), getattr(config, name)
            if first != other:
                raise ValueError(
                    f"Cartridges must be equal in {name} to be composed: {paths[0]!r} has {first!r}, {path!r} has "
                    f"{other!r}."
                )
    rows = torch.cat([_rows(path, config) for path, config in zip(paths, configs)])
    composed = dataclasses.replace(configs[0], num_virtual_tokens=len(rows), inference_mode=True)
    _write(output, {"prompt_embeddings": rows}, composed, safe_serialization)


def _cartridge_config(path: str) -> CartridgeConfig:
    config = PeftConfig.from_pretrained(path)
    if not isinstance(config, CartridgeConfig):
        raise ValueError(f"The adapter at {path!r} is no cartridge but {config.peft_type.value}.")
    return config


def _rows(path: str, config: CartridgeConfig) -> torch.Tensor:
    state = load_peft_weights(path, device="cpu")
    rows = state.pop("prompt_embeddings", None)
    if rows is None or state:
        found = sorted(state if rows is None else {*state, "prompt_embeddings"})
        raise ValueError(f"A cartridge to compose has the tensor 'prompt_embeddings' alone; {path!r} has {found}.")
    expected = (config.num_virtual_tokens, 2 * config.num_layers * config.token_dim)
    if rows.shape != expected:
        raise ValueError(
            f"prompt_embeddings at {path!r}: its configuration asks for the shape {expected}, found "
            f"{tuple(rows.shape)}."
        )
    check_finite({f"prompt_embeddings at {path}": rows})
    return rows


def _write(output: Path, state: dict[str, torch.Tensor], config: CartridgeConfig, safe_serialization: bool) -> None:
    """Write both files of an adapter beside the folder, then move them in."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary)
        write_weights(folder, state, safe_serialization)
        config.save_pretrained(folder)
        output.mkdir(exist_ok=True)
        for file in folder.iterdir():
            os.replace(file, output / file.name)
    other = WEIGHTS_NAME if safe_serialization else SAFETENSORS_WEIGHTS_NAME
    (output / other).unlink(missing_ok=True)  # of an earlier adapter; loading would not know which one counts
