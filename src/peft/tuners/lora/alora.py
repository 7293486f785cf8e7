"""aLoRA, activated LoRA (arXiv 2504.12397): the adapter acts from the tokens on that invoke it.

Tokens before the invocation go through the base model alone, so that their keys and values can be shared with it. How
far back from the end of a text its last invocation starts is the text's offset. Offsets are found once per call of the
model and reach the layers as `alora_offsets` (see `BaseTuner.call_inputs`); they hold for whatever part of a text a
layer sees, as long as that part ends where the text does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from ...engine.layer import BASE_ROW
from ...utils.modules import replaced
from .variant import LoraVariant, register_variant

if TYPE_CHECKING:
    from ...config import PeftConfig
    from ...engine.tuner import BaseTuner
    from ...peft_model import PeftModel
    from .config import LoraConfig
    from .layer import LoraLayer

OLDEST_TRANSFORMERS = "4.52.1"

# ------------------------------------------------------------------------------------------------------- finding offsets


def calculate_alora_offsets(
    peft_config: Mapping[str, PeftConfig],
    active_adapter: str,
    input_ids: torch.Tensor,
    adapter_names: list[str] | None = None,
) -> list[int | None]:
    """Where each text's last invocation of its adapter starts.

    Args:
        peft_config: configurations by adapter name.
        active_adapter: the adapter of every text.
        input_ids: (texts, tokens).
        adapter_names: the adapter of each text instead.

    Returns:
        For each text the number of tokens from the start of the last complete invocation to the end; None if there is no
        invocation, or no adapter that needs one.
    """
    names = [active_adapter] * len(input_ids) if adapter_names is None else adapter_names
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    offsets: list[int | None] = [None] * len(names)
    for name, own in rows.items():
        if name != BASE_ROW and name not in peft_config:
            warnings.warn(
                f"There is no adapter {name!r}; known are {sorted(peft_config)}. The base model is used for the rows {own}."
            )
        tokens = _invocation(peft_config.get(name))
        if tokens:
            for row, offset in zip(own, offsets_from_end(input_ids[own], tokens)):
                offsets[row] = offset
    return offsets


def offsets_from_end(input_ids: torch.Tensor, invocation: list[int]) -> list[int | None]:
    """For each text how many tokens from the end the last complete occurrence of a sequence starts; None for none.

    Args:
        input_ids: (texts, tokens).
        invocation: the sequence.
    """
    length, width = input_ids.shape[1], len(invocation)
    if width > length:
        return [None] * len(input_ids)
    found = (input_ids.unfold(1, width, 1) == input_ids.new_tensor(invocation)).all(-1)
    # The distance to the end grows with each position, so the first of the flipped ones is the last occurrence.
    last = found.flip(1).int().argmax(1) + width
    return [offset if any_found else None for offset, any_found in zip(last.tolist(), found.any(1).tolist())]


def _invocation(config: PeftConfig | None) -> list[int] | None:
    return getattr(config, "alora_invocation_tokens", None)


def is_alora_relevant_in_batch(model: PeftModel | BaseTuner, adapter_names: list[str] | None = None) -> bool:
    """Whether an active adapter, or one that a row asks for, is an aLoRA.

    Args:
        model: a model with adapters, or its tuner.
        adapter_names: the adapter of each row of a mixed batch.
    """
    # In full, and with a copy of the name: torch 2.6 compiles no `any` here, and a check of the attribute that the name
    # comes from in place of the name, which fails at once.
    for name in [*model.active_adapters, *(adapter_names or ())]:
        if _invocation(model.peft_config.get(str(name))):
            return True
    return False


def get_alora_offsets_for_forward(
    model: PeftModel | BaseTuner,
    input_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The keyword arguments of a forward, with `alora_offsets` among them where an aLoRA takes part.

    Args:
        model: a model with adapters, or its tuner.
        input_ids: (texts, tokens).
        inputs_embeds: the same as embeddings, in which invocations cannot be found.
        kwargs: further arguments; `alora_offsets` among them is left as it is.
    """
    if is_alora_relevant_in_batch(model, kwargs.get("adapter_names")) and kwargs.get("alora_offsets") is None:
        if input_ids is None and inputs_embeds is not None:
            _warn_without_tokens()
        kwargs["alora_offsets"] = _offsets(model, input_ids, kwargs.get("adapter_names"))
    return kwargs


def get_alora_offsets_for_generate(model: PeftModel | BaseTuner, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The keyword arguments of `generate`, with `alora_offsets` among them where an aLoRA takes part.

    Args:
        model: a model with adapters, or its tuner.
        args: positional arguments of `generate`; the first may be the tokens, of one text or several.
        kwargs: keyword arguments; `alora_offsets` among them is left as it is.
    """
    if is_alora_relevant_in_batch(model, kwargs.get("adapter_names")) and kwargs.get("alora_offsets") is None:
        input_ids = _token_ids(args, kwargs)
        if input_ids is None:
            _warn_without_tokens()
        kwargs["alora_offsets"] = _offsets(model, input_ids, kwargs.get("adapter_names"))
    return kwargs


def _token_ids(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tokens that a call of a model is given, (texts, tokens)."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]):
        if torch.is_tensor(value) and not value.is_floating_point():
            return value.unsqueeze(0) if value.dim() == 1 else value
    return None


def _warn_without_tokens() -> None:
    warnings.warn(
        "The active adapter is an aLoRA and acts from its invocation tokens on, but no input_ids are given to find them "
        "in: the base model is used. Pass input_ids, or alora_offsets with an entry per text."
    )


def _offsets(
    model: PeftModel | BaseTuner, input_ids: torch.Tensor | None, adapter_names: list[str] | None
) -> list[int | None] | None:
    if input_ids is None:
        return None
    active = next((n for n in model.active_adapters if _invocation(model.peft_config.get(n))), BASE_ROW)
    return calculate_alora_offsets(model.peft_config, active, input_ids, adapter_names)


# --------------------------------------------------------------------------------------------- how they reach the layers


class Offsets(tuple):
    """The offset of each text (None for one without invocation), as layers are given them during one call."""

    tokens: int | None = None
    """Tokens of each text in the running step, where that is known."""

    def after(self, tokens: int, rows: int) -> Offsets:
        """The offsets once each text has become longer.

        Args:
            tokens: by how many tokens; less than none for a text that is worked through in parts.
            rows: rows per text that follow each other, as of beams.
        """
        return Offsets(None if offset is None else offset + tokens for offset in self for _ in range(rows))

    def acts(self, length: int, device: torch.device) -> torch.Tensor:
        """Which of the last tokens of each text the adapter acts on, (texts, length); made once per call."""
        known = self.__dict__.setdefault("_acts", {})
        if (length, device) not in known:
            starts = torch.tensor([length - max(offset or 0, 0) for offset in self], device=device)
            known[length, device] = torch.arange(length, device=device) >= starts.unsqueeze(1)
        return known[length, device]


@contextmanager
def knowing_offsets(tuner: BaseTuner, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Context of a call of a model's forward or generate in which layers know where texts invoke their adapters.

    Args:
        tuner: the model's tuner, with an aLoRA taking part.
        args: positional arguments of the call.
        kwargs: its keyword arguments; `alora_offsets` among them, one entry per text, is used as it is.
    """
    names, given = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
    input_ids = _token_ids(args, kwargs)
    if given is not None:
        offsets: Any = Offsets(given)
    elif input_ids is None:
        _warn_without_tokens()
        offsets = None
    elif names is not None:
        offsets = Offsets(_offsets(tuner, input_ids, names))
    else:
        invoked = [name for name in tuner.active_adapters if _invocation(tuner.peft_config.get(name))]
        offsets = {name: Offsets(calculate_alora_offsets(tuner.peft_config, name, input_ids)) for name in invoked}
    inputs = {"alora_offsets": offsets}
    _note_tokens(inputs, input_ids)
    with tuner.call_inputs(names, **inputs):
        current = tuner.roster.inputs.current
        with _moved_on(tuner.model, current, None if offsets is None else input_ids):
            yield


@contextmanager
def _moved_on(model: torch.nn.Module, inputs: dict[str, Any], prompt: torch.Tensor | None) -> Iterator[None]:
    """Context in which each step of a generation tells the layers of the tokens and rows that it has more than the prompt.

    Offsets grow by every token that is added, whether or not the step goes through the earlier ones again (no cache), goes
    through several at once (assisted generation), or through a part of the prompt only.
    """
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None or prompt is None:
        yield
        return
    start = inputs["alora_offsets"]

    @functools.wraps(prepare)
    def step(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        more, rows = input_ids.shape[1] - prompt.shape[1], len(input_ids) // max(len(prompt), 1)
        if isinstance(start, dict):
            inputs["alora_offsets"] = {name: offsets.after(more, rows) for name, offsets in start.items()}
        else:
            inputs["alora_offsets"] = start.after(more, rows)
        prepared = prepare(input_ids, *args, **kwargs)
        _note_tokens(inputs, prepared.get("input_ids"))
        return prepared

    with replaced(model, "prepare_inputs_for_generation", step):
        yield


def _note_tokens(inputs: dict[str, Any], input_ids: torch.Tensor | None) -> None:
    value = inputs["alora_offsets"]
    every: Iterable[Any] = value.values() if isinstance(value, dict) else [value]
    for offsets in every:
        if offsets is not None:
            offsets.tokens = None if input_ids is None else input_ids.shape[1]


# ------------------------------------------------------------------------------------------------------------ the variant


@functools.lru_cache
def _check_transformers() -> None:
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return
    if Version(found) < Version(OLDEST_TRANSFORMERS):
        raise ValueError(f"aLoRA needs transformers {OLDEST_TRANSFORMERS} or newer, found {found}; upgrade it.")


@register_variant("alora_invocation_tokens", kinds=("linear", "conv1d_transformers", "embedding"))
class ALoraLinearVariant(LoraVariant):
    """LoRA on the tokens from each text's last invocation on; the others get the base layer's output, bit for bit.

    Without offsets (texts given as embeddings, a base model that is called past its `PeftModel`) the adapter does not act.
    Beams, returned sequences and mixed batches give each row the offset of its text. It has no merged weight.
    """

    inputs = ("alora_offsets",)

    @staticmethod
    def check(module: LoraLayer, adapter_name: str, r: int, config: LoraConfig, **kwargs: Any) -> None:
        _check_transformers()

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        pass

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        offsets = kwargs.get("alora_offsets")
        if isinstance(offsets, dict):
            offsets = offsets.get(active_adapter)
        if offsets is None:
            offsets = [None] * len(x)
        offsets = offsets if isinstance(offsets, Offsets) else Offsets(offsets)
        if result.dim() > 2:
            return _acting(module, active_adapter, x, result, _for_rows(module, active_adapter, len(result), offsets))
        texts = len(offsets), _tokens_per_text(module, active_adapter, len(result), offsets)
        if 0 in texts:
            return result
        return _acting(module, active_adapter, x.unflatten(0, texts), result.unflatten(0, texts), offsets).flatten(
            0, 1
        )

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(
            f"{module.called}: the adapter {active_adapter!r} is an aLoRA, which acts on some tokens only and has no merged "
            "weight. Keep the adapter, or unload() it."
        )

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        ALoraLinearVariant.merge_safe(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return ALoraLinearVariant.merge_safe(module, active_adapter, orig_weight)

    def supports_lora_conversion(self) -> bool:
        """No: a plain adapter acts on every token."""
        return False


def _acting(module: LoraLayer, adapter: str, x: torch.Tensor, result: torch.Tensor, offsets: Offsets) -> torch.Tensor:
    """The output with the adapter's term on the tokens that it acts on.

    Args:
        x: (texts, tokens, ...).
        result: (texts, tokens, ..., out).
    """
    length = result.shape[1]
    # At least one token, so that the output is attached to the adapter even where it does not act.
    width = min(length, max(1, *(offset or 0 for offset in offsets), 0))
    before, tail = result[:, : length - width], result[:, length - width :]
    acts = offsets.acts(width, result.device).view(len(result), width, *[1] * (result.dim() - 2))
    tail = torch.where(acts, tail + module.term(x[:, length - width :], adapter), tail)
    return torch.cat((before.to(tail.dtype), tail), 1) if width < length else tail


def _for_rows(module: LoraLayer, adapter: str, rows: int, offsets: Offsets) -> Offsets:
    """The offset of each row of a batch, in which a text may have several rows that follow each other.

    Raises:
        ValueError: there are other numbers of offsets.
    """
    each, rest = divmod(rows, max(len(offsets), 1))
    if rest:
        raise ValueError(
            f"{module.called} sees {rows} rows, but alora_offsets of the adapter {adapter!r} has {len(offsets)} entries. "
            "Pass one entry per text."
        )
    return offsets if each == 1 else offsets.after(0, each)


def _tokens_per_text(module: LoraLayer, adapter: str, rows: int, offsets: Offsets) -> int:
    """How many rows each text has in a layer that sees the tokens of all texts as one list, or one row per text.

    Raises:
        ValueError: the rows are not all tokens of the texts, as where tokens are routed to experts.
    """
    each, rest = divmod(rows, max(len(offsets), 1))
    if rest or (each > 1 and offsets.tokens not in (None, each)):
        known = "" if offsets.tokens is None else f" of {offsets.tokens} tokens each"
        raise ValueError(
            f"{module.called} sees {rows} rows for {len(offsets)} texts{known}, so that the aLoRA adapter {adapter!r} "
            "cannot tell which tokens to act on. Leave the layer out of target_modules."
        )
    return each
