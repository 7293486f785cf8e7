"""A prompt put into the inputs of a base model: of one forward, and of the steps of a generation.

A prompt of embeddings goes before the embeddings of the tokens; a prompt of keys and values goes in as the cache. What
a cache holds includes the prompt, so a prompt is put in exactly when the cache is empty or missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .utils.caches import (
    CACHE_NAMES,
    cache_argument,
    cache_in,
    cache_name_in,
    cached_length,
    is_encoder_decoder,
    takes,
)
from .utils.modules import _get_batch_size
from .utils.prompts import IGNORED, shift_tokens_right

if TYPE_CHECKING:
    from torch import nn

    from .peft_tasks import _TaskModel

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """What the arguments of one stack of layers are called."""

    ids: str
    embeds: str
    mask: str
    positions: str


INPUT = Stack("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""The only stack of most models, the encoder of those with two."""
DECODER = Stack("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "decoder_position_ids")


COUNTED_BY_MASK = ("opt",)
"""Types of model whose forward gives padding no positions, by a mask of two dimensions."""


class PromptInputs:
    """The inputs of a model with its active prompt in them.

    Args:
        model: a `PeftModel` for a task; its class says what the task's inputs are like.
    """

    def __init__(self, model: _TaskModel) -> None:
        self.model, self.prompts = model, model.prompts
        self.encoder, self.config = self.prompts.encoder, self.prompts.config
        self.num_tokens = self.config.num_virtual_tokens

    @property
    def cached_tokens(self) -> int:
        """How many virtual tokens the cache has before those of the text."""
        if self.encoder.fills_cache:
            return self.num_tokens
        every = self.num_tokens * self.config.num_transformer_submodules
        if not self.model.has_two_stacks:
            return every
        return every - self.num_tokens if self.encoder.prompts_decoder else 0

    # ----------------------------------------------------------------------------------------------------- one forward

    def forward(self, inputs: Arguments, task_ids: torch.Tensor | None, extra: Arguments) -> Any:
        """The base model's output.

        Args:
            inputs: arguments of the forward that the task knows; None where not given.
            task_ids: (batch,), for methods that take them.
            extra: further arguments.

        Raises:
            ValueError: neither input_ids nor inputs_embeds; an attention mask that is not (batch, tokens); or no logits for
                an encoder that computes the loss from them.
        """
        own = {name: extra[name] for name in self._for_loss() if name in extra}
        arguments = {**inputs, **self.model._without_special(extra)}
        labels = arguments["labels"] if self.encoder.computes_loss and "labels" in arguments else None
        if labels is not None:
            self._check_for_logits(arguments)
            arguments["labels"] = None
        self._put_in(arguments, task_ids)
        output = self._call(arguments)
        return output if labels is None else _with_loss(output, self.encoder.loss(_logits(output), labels, **own))

    def _check_for_logits(self, arguments: Arguments) -> None:
        if arguments.get("fused_lm_head"):  # trl's, which leads to a loss and log-probabilities alone
            raise ValueError(
                f"{self.config.peft_type.value} computes its own loss, from logits, and with fused_lm_head=True the base "
                "model gives none. trl's trainers pass that; train with transformers' Trainer instead."
            )

    def _for_loss(self) -> tuple[str, ...]:
        return self.encoder.own_arguments + self.encoder.loss_arguments

    def _put_in(self, arguments: Arguments, task_ids: torch.Tensor | None) -> None:
        batch_size = _get_batch_size(arguments.get("input_ids"), arguments.get("inputs_embeds"))
        arguments.pop("cache_position", None)  # the model counts its tokens itself, and virtual ones too
        starts = cached_length(cache_in(arguments)) == 0
        if self.encoder.fills_cache:
            self._put_into_cache(arguments, batch_size, task_ids, starts)
            return
        self._drop_positions(arguments)
        if not self.model.has_two_stacks and not starts:
            _widen(arguments, INPUT.mask, self.cached_tokens)
            return
        prompt = self.prompts.embeddings(batch_size, task_ids)
        if not self.model.has_two_stacks:
            length = self._put_before(arguments, INPUT, prompt)
            if self.model.labels_are_per_token:
                _ignore(arguments, length, prompt.shape[1])
            return
        self._put_before(arguments, INPUT, prompt[:, : self.num_tokens])
        if self.cached_tokens and starts:
            self._put_before_decoder(arguments, prompt[:, self.num_tokens :])
        elif self.cached_tokens:
            _widen(arguments, DECODER.mask, self.cached_tokens)

    def _put_into_cache(
        self, arguments: Arguments, batch_size: int, task_ids: torch.Tensor | None, starts: bool
    ) -> None:
        stack = DECODER if is_encoder_decoder(self.model.base_model) else INPUT
        if starts:
            empty = cache_in(arguments)
            for name in CACHE_NAMES:  # perhaps under its older name
                arguments.pop(name, None)
            # A decoder's cache has a place for the encoder's keys and values too.
            fits = "self_attention_cache" if stack is DECODER else "update"
            empty = empty if hasattr(empty, fits) else None
            arguments[self._cache_argument()] = self.prompts.prompt(batch_size, task_ids, into=empty)
        _widen(arguments, stack.mask, self.num_tokens)
        _shift(arguments, stack.positions, self.num_tokens)
        if not self.model.has_token_types:  # adapters for these tasks were trained without
            self._drop(arguments, "token_type_ids")

    def _put_before_decoder(self, arguments: Arguments, prompt: torch.Tensor) -> None:
        if arguments.get(DECODER.ids) is None and arguments.get(DECODER.embeds) is None:
            if arguments.get("labels") is None:
                raise ValueError("Pass decoder_input_ids, decoder_inputs_embeds, or labels to make the first of.")
            config = self.model.base_model.config
            arguments[DECODER.ids] = shift_tokens_right(
                arguments["labels"], config.pad_token_id, config.decoder_start_token_id
            )
        length = self._put_before(arguments, DECODER, prompt)
        _ignore(arguments, length, prompt.shape[1])

    def _put_before(self, arguments: Arguments, stack: Stack, prompt: torch.Tensor) -> int:
        """Put a prompt before a stack's input; gives the number of tokens that it had."""
        ids, embeds = arguments.pop(stack.ids, None), arguments.get(stack.embeds)
        if embeds is None:
            embeds = self.model.word_embeddings(ids)
        arguments[stack.embeds] = torch.cat([prompt.to(embeds), embeds], dim=1)
        _widen(arguments, stack.mask, prompt.shape[1])
        return embeds.shape[1]

    def _cache_argument(self) -> str:
        """What to call the cache; a head that does not know it hands it on to the transformer below."""
        base = self.model.base_model
        name = cache_argument(base.forward)
        if name is None and self._backbone is not None and not self._is_encoder(self._backbone):
            name = cache_argument(self._backbone.forward)
        if name is None:
            raise ValueError(
                f"The prompt of {self.config.peft_type.value} is a cache, and the forward of {type(base).__name__} "
                "takes none. Use a method whose prompt is embeddings, for example prompt tuning."
            )
        return name

    @property
    def _backbone(self) -> nn.Module | None:
        """The transformer below the base model's head, if there is one."""
        return getattr(self.model.base_model, getattr(self.model, "transformer_backbone_name", ""), None)

    def _is_encoder(self, backbone: nn.Module) -> bool:
        """Whether a transformer is the first of two stacks, whose forward has the argument of a decoder it shares code with."""
        base = self.model.base_model
        return is_encoder_decoder(base) and getattr(base, "encoder", None) is backbone

    def _call(self, arguments: Arguments) -> Any:
        """The base model's output. What a head does not let through reaches the transformer below all the same."""
        base = self.model.base_model
        name = cache_name_in(arguments)
        if name is None or self._backbone is None or takes(base.forward, name):
            return base(**arguments)
        cache = {name: arguments.pop(name)}
        hook = self._backbone.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, **cache}), with_kwargs=True
        )
        try:
            return base(**arguments)
        finally:
            hook.remove()

    def _drop_positions(self, arguments: Arguments) -> None:
        """Leave positions to the model; virtual tokens get the type 0 where the task has types."""
        self._drop(arguments, INPUT.positions)
        types = arguments.get("token_type_ids")
        if types is not None and self.model.has_token_types:
            zeros = types.new_zeros((len(types), self.cached_tokens))
            arguments["token_type_ids"] = torch.cat([zeros, types], dim=1)
        else:
            self._drop(arguments, "token_type_ids")

    def _drop(self, arguments: Arguments, name: str) -> None:
        if arguments.pop(name, None) is not None:
            warnings.warn(
                f"{name} are left out: they do not cover the virtual tokens that {self.config.peft_type.value} puts "
                "before the input. The model uses its own."
            )

    # ------------------------------------------------------------------------------------------------------ generation

    def generation_arguments(self, arguments: Arguments) -> Arguments:
        """The arguments of the base model's generate; what is put in once for all steps is put in.

        Args:
            arguments: those of the wrapper's generate.

        Raises:
            ValueError: a model with two stacks, and neither input_ids nor inputs_embeds, or an assistant whose encoder
                cannot see the prompt.
        """
        arguments = dict(arguments)
        if not self.encoder.takes_task_ids:
            arguments.pop("task_ids", None)
        self._drop(arguments, "token_type_ids")
        if not self.encoder.fills_cache:
            self._drop(arguments, INPUT.positions)
        if not self.model.has_two_stacks:
            return arguments
        if arguments.get("inputs") is not None:  # the name that generate has for the main input of any model
            arguments[INPUT.ids] = arguments.pop("inputs")
        batch_size = _get_batch_size(arguments.get("input_ids"), arguments.get("inputs_embeds"))
        if not self.encoder.fills_cache:
            if arguments.get("assistant_model") is not None:
                raise ValueError(
                    f"The embeddings of a {self.config.peft_type.value} prompt cannot be handed to an assistant_model "
                    "with an encoder of its own. Let prompt_lookup_num_tokens draft tokens, or generate without drafts."
                )
            if arguments.pop("encoder_outputs", None) is not None:
                warnings.warn("encoder_outputs are left out and computed again: the prompt has to be in them.")
            prompt = self.prompts.embeddings(batch_size, arguments.get("task_ids"))
            self._put_before(arguments, INPUT, prompt[:, : self.num_tokens])
        return arguments

    def step(
        self,
        prepare: Callable[..., Arguments],
        input_ids: torch.Tensor,
        arguments: Arguments,
        task_ids: torch.Tensor | None,
    ) -> Arguments:
        """The base model's inputs of the next step of a generation.

        The prompt goes into what the base model prepares its inputs from, so that its masks and slices come out right.

        Args:
            prepare: the base model's `prepare_inputs_for_generation`.
            input_ids: the tokens so far, (batch, tokens); the decoder's in a model with two stacks.
            arguments: its other arguments.
            task_ids: (batch,), for methods that take them.
        """
        extra = self.cached_tokens
        if not extra:
            return prepare(input_ids, **arguments)
        arguments = dict(arguments)
        if arguments.get("use_cache") is False:  # then each step has the whole text, and starts at the prompt again
            for name in CACHE_NAMES:
                arguments.pop(name, None)
        stack = DECODER if self.model.has_two_stacks else INPUT
        length = cached_length(cache_in(arguments))
        new = _new_tokens(arguments, stack, input_ids, None if length is None else max(length - extra, 0))
        if self.encoder.fills_cache:
            self._put_into_cache(arguments, len(input_ids), task_ids, starts=length == 0)
            _number(arguments, before=length or extra, new=new)
            return prepare(input_ids, **arguments)
        arguments.pop(stack.positions, None)
        if length != 0:
            _widen(arguments, stack.mask, extra)
            _number(arguments, before=length, new=new)
            return self._renumbered(prepare(input_ids, **arguments), arguments, stack, length or 0)
        prompt = self.prompts.embeddings(len(input_ids), task_ids)[:, -extra:]
        arguments[stack.ids] = input_ids
        self._put_before(arguments, stack, prompt)
        embeds = arguments[stack.embeds]
        _number(arguments, before=0, new=embeds.shape[1])
        if stack is DECODER:  # whose embeddings the base model's preparation does not look at, only at how many ids
            input_ids = input_ids.new_zeros(embeds.shape[:2])
        inputs = self._renumbered(prepare(input_ids, **arguments), arguments, stack, 0)
        return {**inputs, stack.ids: None, stack.embeds: embeds}

    def _renumbered(self, inputs: Arguments, arguments: Arguments, stack: Stack, before: int) -> Arguments:
        """A step's inputs without positions, which did not count virtual tokens: the model counts by itself.

        Args:
            inputs: what the base model prepared.
            arguments: what from. For a cache of fixed size, the mask in `inputs` is one that cannot be counted by.
            stack: which inputs.
            before: how many tokens come before them, virtual ones included.
        """
        inputs = {name: value for name, value in inputs.items() if name not in (stack.positions, "cache_position")}
        mask = arguments.get(stack.mask)
        if mask is not None and getattr(self.model.base_model.config, "model_type", None) in COUNTED_BY_MASK:
            inputs[stack.positions] = (mask.cumsum(-1) * mask - 1)[:, before:]
        return inputs


def _widen(arguments: Arguments, name: str, tokens: int) -> None:
    """Let a mask, if there is one, cover that many virtual tokens in front."""
    mask = arguments.get(name)
    if mask is None:
        return
    if not torch.is_tensor(mask) or mask.dim() != 2:
        found = f"shape {tuple(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(f"With a prompt, {name} must be a tensor (batch, tokens), got {found}.")
    arguments[name] = torch.cat([mask.new_ones((mask.shape[0], tokens)), mask], dim=1)


def _shift(arguments: Arguments, name: str, tokens: int) -> None:
    if arguments.get(name) is not None:
        arguments[name] = arguments[name] + tokens


def _ignore(arguments: Arguments, length: int, tokens: int) -> None:
    """Give virtual tokens labels that do not count, unless the labels cover them already."""
    labels = arguments.get("labels")
    if labels is not None and labels.dim() > 1 and labels.shape[1] == length:
        ignored = labels.new_full((labels.shape[0], tokens), IGNORED)
        arguments["labels"] = torch.cat([ignored, labels], dim=1)


def _logits(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.logits


def _with_loss(output: Any, loss: torch.Tensor) -> Any:
    return (loss, *output) if isinstance(output, tuple) else type(output)(**{**output, "loss": loss})


def _new_tokens(arguments: Arguments, stack: Stack, input_ids: torch.Tensor, cached: int | None) -> int | None:
    """How many tokens of the text a step of generation is about; None if that cannot be told.

    Embeddings that a generation started from are taken out of the arguments after the first step, when they are over.
    """
    embeds = arguments.get(stack.embeds)
    if embeds is not None and not arguments.get("is_first_iteration", cached == 0):
        del arguments[stack.embeds]
        return None
    text = input_ids if embeds is None else embeds
    return None if cached is None else text.shape[1] - cached


def _number(arguments: Arguments, before: int | None, new: int | None) -> None:
    """Say which tokens a step is about, in the ways in which versions of transformers want to know.

    Args:
        arguments: of `prepare_inputs_for_generation`, changed in place.
        before: how many tokens come before them, virtual ones included.
        new: how many they are.
    """
    known = new is not None and new > 0
    if known and arguments.get("next_sequence_length") is not None:
        arguments["next_sequence_length"] = new
    places = arguments.get("cache_position")
    if places is not None and before is not None:
        arguments["cache_position"] = torch.arange(
            before, before + (new if known else len(places)), device=places.device
        )
