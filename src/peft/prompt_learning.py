"""The prompts of a `PeftModel`: their life cycle, what they give, and what a file holds of them.

The state is the model's own, under the names that users and clients know: `prompt_encoder`, `prompt_tokens`,
`word_embeddings`, `transformer_backbone_name`. What differs between families of encoders, each encoder class declares
(`BasePromptEncoder`).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .engine.additional import set_additional_trainable_modules
from .engine.backends import make_trainable
from .engine.encoders import BasePromptEncoder, PromptEncoders
from .engine.injection import Injection, adopt
from .engine.lifecycle import AdapterHolder, holders_of, set_trains
from .engine.offload import execution_device
from .engine.sharding import (
    below,
    gathered,
    is_flattened,
    reshard,
    several_processes,
    unhooked,
    unwrapped,
    with_values,
    without_wrappers,
)
from .engine.state import AdapterState, LoadResult, check_dtype, check_finite
from .engine.undo import Undo
from .engine.unloading import places_of
from .utils.error import SizeError
from .utils.field_types import check_numbers
from .utils.prompts import _prepare_prompt_learning_config
from .utils.registry import method
from .utils.tensors import whole

if TYPE_CHECKING:
    from .config import PromptLearningConfig
    from .peft_model import PeftModel

ENCODERS = "prompt_encoder"
SIZES = ("num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers", "num_attention_heads")
SIZES += ("encoder_hidden_size", "encoder_num_layers")
"""Fields that say how large tensors are, where a method has them."""
MOST_NUMBERS = 2**36
"""A prompt of more numbers, 256 GB of them, is a mistake in its configuration."""


@dataclass(frozen=True)
class PromptLearning:
    """A view of the prompts of a model.

    Args:
        model: a `PeftModel` of a prompt learning method.
    """

    model: PeftModel

    # --------------------------------------------------------------------------------------------------- what there is

    @property
    def encoders(self) -> PromptEncoders:
        """The encoders by adapter name."""
        encoders = getattr(self.model, ENCODERS)
        return encoders._modules.get("_orig_mod", encoders)  # accelerate's regional compilation wraps them

    @property
    def in_use(self) -> bool:
        """Whether there is an active prompt and it is not disabled."""
        return bool(self.encoders.plan)

    @property
    def config(self) -> PromptLearningConfig:
        """The active adapter's configuration."""
        return self.model.active_peft_config

    @property
    def encoder(self) -> BasePromptEncoder:
        """The active adapter's encoder."""
        return self.encoders[self.model.active_adapter]

    def holders(self) -> list[AdapterHolder]:
        """All that holds adapters: the encoders, and the wrappers around modules of the base model that are copied."""
        return [holder for _, holder in holders_of(self.model)]

    # ------------------------------------------------------------------------------------------------------ life cycle

    def add(self, adapter_name: str, config: PromptLearningConfig, undo: Undo) -> None:
        """Give the model a prompt; the first one becomes active, a later one waits frozen until it is.

        Args:
            adapter_name: a new name.
            config: its configuration; it is completed in place from the base model's.
            undo: where to leave word how to take changes back.

        Raises:
            ValueError: the base model does not have what the method needs.
        """
        model, base = self.model, self.model.base_model
        model_config = Injection.model_config(base)
        _complete(config, base)
        first = ENCODERS not in model._modules
        if first:
            self._set_up(undo)
        encoder_cls = method(config.peft_type).model_cls
        with gathered(model.word_embeddings):
            encoder = encoder_cls.build(config, model.word_embeddings, base).to(self._device())
        undo.push(self._forget, adapter_name)
        self.encoders.add(adapter_name, encoder)
        model.special_peft_forward_args |= set(encoder.own_arguments)  # the base model does not know them
        tokens = config.num_virtual_tokens * config.num_transformer_submodules
        model.prompt_tokens[adapter_name] = torch.arange(tokens)
        wrappers = set_additional_trainable_modules(
            base, config, model_config, adapter_name, first, roster=self.encoders.roster, undo=undo
        )
        self._follow_embeddings(undo)
        if first:
            self.activate(adapter_name, config.inference_mode)
        else:
            self._wait(adapter_name, config.inference_mode, wrappers)

    def _device(self) -> torch.device:
        embeddings = self.model.word_embeddings
        if isinstance(embeddings, AdapterHolder):
            embeddings = embeddings.get_base_layer()
        return execution_device(embeddings) or next(embeddings.parameters()).device

    def _set_up(self, undo: Undo) -> None:
        """What the first prompt needs: a frozen base model, and to know its embeddings."""
        model, base = self.model, self.model.base_model
        trainable = [parameter for parameter in base.parameters() if parameter.requires_grad]
        undo.push(_set_all, trainable, True)
        _set_all(trainable, False)
        name, backbone = _backbone(base)
        if name is not None:
            model.transformer_backbone_name = name
        model.prompt_encoder = PromptEncoders()
        model.prompt_encoder.join_roster(model.prompt_encoder.roster, ENCODERS)
        model.prompt_tokens = {}
        model.word_embeddings = find_word_embeddings(backbone)

    def _follow_embeddings(self, undo: Undo) -> None:
        """If an adapter copies the embeddings, look tokens up in what the active adapter uses."""
        model = self.model
        for _, holder in holders_of(model.base_model):
            if holder.get_base_layer() is model.word_embeddings:
                undo.push(setattr, model, "word_embeddings", model.word_embeddings)
                model.word_embeddings = holder

    def _wait(self, adapter_name: str, inference_mode: bool, wrappers: list[AdapterHolder]) -> None:
        """Leave the active prompt active; new wrappers take over its state."""
        for wrapper in wrappers:
            adopt(wrapper, self.encoders, adapter_name)
        for holder in self.holders():
            if inference_mode:
                holder._inference |= {adapter_name}
            holder.refresh([adapter_name])

    def activate(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make a prompt, and the copies that belong to it, the ones in use, and exactly their weights trainable.

        Args:
            adapter_name: a known name.
            inference_mode: use it, but train nothing.
        """
        for holder in self.holders():
            holder.activate([adapter_name], inference_mode)
        if not inference_mode:
            make_trainable(self.model.base_model)

    def resume(self, adapter_name: str) -> None:
        """Let a prompt that a file had go on training whenever it is active, though it was loaded for inference.

        There is no other way to load one, since the file has the prompt without what it was computed by. The copies of
        modules beside it are as the configuration says.

        Args:
            adapter_name: a known name.
        """
        if self.encoders[adapter_name].resumes:
            self.encoders._inference -= {adapter_name}
            self.encoders.refresh([adapter_name])

    def delete(self, adapter_name: str) -> None:
        """Remove a prompt with all its weights; if it was active, the one that was added first takes its place.

        Args:
            adapter_name: a known name.
        """
        model = self.model
        if adapter_name == model.active_adapter:
            others = [name for name in model.peft_config if name != adapter_name]
            for holder in self.holders():
                holder.activate(others[:1], inference_mode=bool(others) and others[0] in holder._inference)
            if others:
                warnings.warn(
                    f"The active adapter {adapter_name!r} was deleted; {others[0]!r} becomes the active one."
                )
            model.active_adapter = others[0] if others else []
        for holder in self.holders():
            holder.delete_adapter(adapter_name)
        del model.prompt_tokens[adapter_name], model.peft_config[adapter_name]

    def _forget(self, adapter_name: str) -> None:
        if adapter_name in self.encoders:
            self.encoders._drop(adapter_name)
            self.encoders.roster.leave(adapter_name, ENCODERS)
        self.model.prompt_tokens.pop(adapter_name, None)

    def unload(self) -> None:
        """Take the wrappers out of the base model, which is then as it was."""
        places = places_of(self.model.base_model)
        for _, holder in list(holders_of(self.model.base_model)):
            for owner, name in places[id(holder)]:
                owner._modules[name] = holder.get_base_layer()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which the base model is used alone; the state before is restored, also after an exception."""
        model = self.model
        was_disabled, model._adapters_disabled = model._adapters_disabled, True
        enabled = [holder for holder in self.holders() if not holder.disable_adapters]
        for holder in enabled:
            holder.enable_adapters(False)
        try:
            yield
        finally:
            model._adapters_disabled = was_disabled
            reshard(model)
            for holder in enabled:
                holder.enable_adapters(True)

    # --------------------------------------------------------------------------------------------------- what it gives

    def tokens(self, adapter_name: str) -> torch.Tensor:
        """The indices of a prompt's tokens, where its encoder is; a cache has one set for both stacks of a model."""
        encoder, config = self.encoders[adapter_name], self.model.peft_config[adapter_name]
        indices = self.model.prompt_tokens[adapter_name]
        if encoder.fills_cache:
            indices = indices[: config.num_virtual_tokens]
        return indices.to(next(encoder.parameters()).device)

    def embeddings(self, batch_size: int, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """What the active encoder makes for a batch: (batch, tokens, width)."""
        return self.encoder.prompt(self.tokens(self.model.active_adapter), batch_size, task_ids)

    def prompt(
        self,
        batch_size: int,
        task_ids: torch.Tensor | None = None,
        max_cache_len: int | None = None,
        into: Any = None,
    ) -> torch.Tensor | Any:
        """The active prompt as the base model takes it: embeddings (batch, tokens, width), or a cache.

        Args:
            batch_size: number of rows.
            task_ids: (batch,), for methods that take them.
            max_cache_len: how many tokens a new cache must have room for; it grows as needed if that is not given.
            into: an empty cache to fill instead of a new one.
        """
        prompt, encoder = self.embeddings(batch_size, task_ids), self.encoder
        if not encoder.fills_cache:
            return prompt
        return encoder.cache(prompt, self.model.base_model, self.config, max_cache_len=max_cache_len, into=into)

    # ----------------------------------------------------------------------------------------------------------- files

    def embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt as a file holds it: (tokens, width), on the CPU.

        Args:
            adapter_name: a known name.
        """
        return self.tensors_to_save(adapter_name)["prompt_embeddings"]

    def tensors_to_save(
        self, adapter_name: str, state_dict: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """What a file holds of a prompt by the names on disk, on the CPU.

        Args:
            adapter_name: a known name.
            state_dict: take the encoder's parameters from here, by their names in memory, instead of from the model.
        """
        encoder, tokens = self.encoders[adapter_name], self.tokens(adapter_name)
        reshard(self.model)
        if state_dict is None:
            with gathered(encoder):
                return _tensors_to_save(unhooked(encoder) if several_processes() else encoder, tokens)
        prefix = f"{ENCODERS}.{adapter_name}."
        given = below({without_wrappers(key): value for key, value in state_dict.items()}, prefix)
        if not given:  # not the process that has them
            return {}
        # What does not train may be left out. Nothing is asked of the other processes: perhaps only one of them saves.
        own = {} if is_flattened(encoder) else dict(encoder.named_parameters())
        values = {**own, **{name: whole(value) for name, value in given.items()}}
        return _tensors_to_save(with_values(encoder, values), tokens.to(next(iter(values.values())).device))

    def state(self, adapter_name: str, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """A prompt's tensors by their names on disk; the copies beside it not included."""
        configs = self.model.peft_config
        others = [name for name in configs if name != adapter_name]
        encoder_cls = type(unwrapped(self.encoders[adapter_name]))
        return encoder_cls._get_adapter_state_dict(self.model, configs[adapter_name], adapter_name, state_dict, others)

    def load_state(
        self, adapter_name: str, state: dict[str, torch.Tensor], ignore_mismatched_sizes: bool = False
    ) -> LoadResult:
        """Load a prompt's tensors and its copies; everything is checked before a value is written.

        Args:
            adapter_name: a known name.
            state: tensors by their names on disk.
            ignore_mismatched_sizes: leave tensors of another shape out, with a warning, instead of raising.

        Raises:
            RuntimeError: a tensor has another shape than its place.
            ValueError: a tensor has NaN or infinite values.
        """
        encoder = self.encoders[adapter_name]
        with gathered(encoder):
            shapes = encoder.saved_shapes()
        own = {name: state[name] for name in shapes if name in state}
        wrong = _of_other_shapes(own, shapes)
        if wrong and not ignore_mismatched_sizes:
            _refuse_shapes(wrong, adapter_name)
        if wrong:
            warnings.warn(f"Weights of another shape are left out for the adapter {adapter_name!r}: {_listed(wrong)}.")
        fitting = {name: value for name, value in own.items() if name not in wrong}
        for name, value in fitting.items():
            check_dtype(name, value, torch.float32)
        check_finite(fitting)
        beside = {name: value for name, value in state.items() if name not in shapes}
        result = AdapterState(self.model, adapter_name).write(beside, ignore_mismatched_sizes=ignore_mismatched_sizes)
        with torch.no_grad(), gathered(encoder, store=True):
            encoder._load_adapter_state_dict(fitting)
        self.encoders.refresh([adapter_name])
        return LoadResult([name for name in shapes if name not in own] + result.missing, result.unexpected)


def check_prompt_file(
    config: PromptLearningConfig, base: nn.Module, state: dict[str, torch.Tensor], adapter_name: str
) -> None:
    """Raise if a file's tensors are not of the shapes that its configuration makes, before any is made.

    Args:
        config: the configuration in the file; it is left as it is.
        base: the base model, which completes it.
        state: tensors by their names on disk.
        adapter_name: the name that the adapter is to have.

    Raises:
        RuntimeError: a tensor has another shape.
        ValueError: the configuration cannot be used.
    """
    config = copy.copy(config)
    _complete(config, base)
    wrong = _of_other_shapes(state, method(config.peft_type).model_cls.promised_shapes(config))
    if wrong:
        _refuse_shapes(wrong, adapter_name)


_Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def _of_other_shapes(state: dict[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> _Shapes:
    """Name -> the shape that was expected and the one that was found, where they differ."""
    pairs = {name: (tuple(shape), tuple(state[name].shape)) for name, shape in shapes.items() if name in state}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _listed(wrong: _Shapes) -> str:
    return "; ".join(f"{name}: expected {expected}, found {found}" for name, (expected, found) in wrong.items())


def _refuse_shapes(wrong: _Shapes, adapter_name: str) -> None:
    raise RuntimeError(
        f"The weights do not fit the adapter {adapter_name!r} (size mismatch): {_listed(wrong)}. Nothing was loaded. Use "
        "the configuration they were trained with, or pass ignore_mismatched_sizes=True."
    )


def _complete(config: PromptLearningConfig, base: nn.Module) -> None:
    """Set, in place, what a configuration leaves to the base model, and raise unless the sizes in it can be had."""
    check_numbers(config)
    given = {name: getattr(config, name, None) for name in SIZES}
    _check_sizes(config, {name: size for name, size in given.items() if size is not None})
    _prepare_prompt_learning_config(config, getattr(base, "config", Injection.model_config(base)))
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    _check_sizes(config, {name: getattr(config, name, 1) for name in SIZES})
    shapes = method(config.peft_type).model_cls.promised_shapes(config)
    tokens = config.num_virtual_tokens * config.num_transformer_submodules
    for shape in (*shapes.values(), (tokens,)):
        if math.prod(shape) > MOST_NUMBERS:
            raise SizeError(
                f"{type(config).__name__} asks for a tensor of the shape {shape}, for which there is no room. Choose "
                f"smaller numbers for {', '.join(name for name in SIZES if getattr(config, name, None))}."
            )


def _check_sizes(config: PromptLearningConfig, sizes: dict[str, int | None]) -> None:
    for name, size in sizes.items():
        if not size or size < 0:
            raise ValueError(f"{name} of {type(config).__name__} must be a positive number, got {size!r}.")
        if name == "num_transformer_submodules" and size > 2:
            raise ValueError(
                f"{name} of {type(config).__name__} must be 1, or 2 for a model of an encoder and a decoder, got {size}."
            )


def _set_all(parameters: list[nn.Parameter], flag: bool) -> None:
    for parameter in parameters:
        set_trains(parameter, flag)


def _backbone(base: nn.Module) -> tuple[str | None, nn.Module]:
    """Name and module of a model's transformer without its head; no name and the model where nothing sets it apart."""
    from transformers import PreTrainedModel  # when it is needed: transformers is slow to import

    for name, child in base.named_children():
        if isinstance(child, PreTrainedModel):
            return name, child
    return None, base


def find_word_embeddings(backbone: nn.Module) -> nn.Module:
    """The module that a transformer looks its tokens up in.

    Args:
        backbone: the transformer.

    Raises:
        ValueError: there is none.
    """
    named = dict(backbone.named_modules())
    if "embeddings.word_embeddings" in named:
        return named["embeddings.word_embeddings"]
    config = getattr(backbone, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    for name, parameter in backbone.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # a partitioned parameter is empty itself
        if len(shape) and shape[0] == size:
            return named[name.rpartition(".")[0]]
    try:
        embeddings = backbone.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if embeddings is None:
        raise ValueError(
            f"A {type(backbone).__name__} has no word embeddings to put a prompt before: none of its parameters has "
            f"vocab_size={size} rows. Prompt learning needs a model of texts."
        )
    return embeddings


@torch.no_grad()
def _tensors_to_save(encoder: BasePromptEncoder, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    training = encoder.training
    encoder.eval()  # dropout has no place in a file
    try:
        return {name: value.cpu() for name, value in encoder.tensors_to_save(tokens).items()}
    finally:
        encoder.train(training)
