"""`PeftModel` by task: the forward signatures that trainers look at, and the heads that are trained in full.

With a tuner, every class hands its arguments to the base model; with prompt learning, `PromptInputs` puts the prompt
into them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from .config import PeftConfig
from .peft_model import PeftModel
from .prompt_inputs import PromptInputs
from .utils.modules import replaced
from .utils.peft_types import TaskType


class _TaskModel(PeftModel):
    """What the classes for tasks share.

    Args:
        model: the base model.
        peft_config: the first adapter's configuration.
        adapter_name: the first adapter's name.
        kwargs: further arguments of `PeftModel`.
    """

    task: ClassVar[TaskType]
    """The `task_type` that asks for this class."""
    heads: ClassVar[tuple[str, ...]] = ()
    """Names that the output layer of such a model goes by; it is trained in full and saved with the adapter."""
    has_two_stacks: ClassVar[bool] = False
    """Whether the model has an encoder and a decoder with inputs of their own."""
    labels_are_per_token: ClassVar[bool] = False
    """Whether each token of the input has a label."""
    has_token_types: ClassVar[bool] = False
    """Whether tokens of the input may be of several types, as of two texts that are compared."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        add_heads(peft_config, self.heads)
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._note_head()

    def _note_head(self) -> None:
        for name, _ in self.base_model.named_children():
            if any(head in name for head in self.heads):
                self.cls_layer_name = name
                break

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        add_heads(peft_config, self.heads)
        super().add_adapter(
            adapter_name,
            peft_config,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @property
    def _uses_prompt(self) -> bool:
        return self._is_prompt_learning and self.prompts.in_use

    def _run(self, inputs: dict[str, Any], task_ids: torch.Tensor | None, extra: dict[str, Any]) -> Any:
        """The base model's output for these arguments, with the adapter or the prompt applied."""
        if self._uses_prompt:
            return PromptInputs(self).forward(inputs, task_ids, extra)
        if "task_ids" in self.special_peft_forward_args:  # the method routes by task
            extra["task_ids"] = task_ids
        with self._enable_peft_forward_hooks(**inputs, **extra):
            return self.base_model(**inputs, **self._without_special(extra))


def add_heads(config: PeftConfig, heads: tuple[str, ...]) -> None:
    """Add the names of heads to `modules_to_save` of a configuration that has the option (in place), each once."""
    if not heads or not hasattr(config, "modules_to_save"):
        return
    names = list(config.modules_to_save or ())
    config.modules_to_save = names + [head for head in heads if head not in names]


class PeftModelForSequenceClassification(_TaskModel):
    """A `PeftModel` that classifies sequences; the classifier is trained in full."""

    task = TaskType.SEQ_CLS
    heads = ("classifier", "score")
    has_token_types = True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; `input_ids` (batch, tokens), `labels` (batch,)."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": _resolved(self, return_dict),
        }
        return self._run(inputs, task_ids, kwargs)


class PeftModelForTokenClassification(_TaskModel):
    """A `PeftModel` that classifies tokens; the classifier is trained in full."""

    task = TaskType.TOKEN_CLS
    heads = ("classifier", "score")
    has_token_types = True
    labels_are_per_token = True

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)

    forward = PeftModelForSequenceClassification.forward


class PeftModelForFeatureExtraction(_TaskModel):
    """A `PeftModel` that gives hidden states."""

    task = TaskType.FEATURE_EXTRACTION

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; `input_ids` (batch, tokens)."""
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        shown = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        inputs = texts | shown | {"return_dict": return_dict}
        return self._run(inputs, task_ids, kwargs)


class PeftModelForQuestionAnswering(_TaskModel):
    """A `PeftModel` that marks answers in a text; the output layer is trained in full."""

    task = TaskType.QUESTION_ANS
    heads = ("qa_outputs",)
    has_token_types = True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; `input_ids` (batch, tokens), positions (batch,)."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": _resolved(self, return_dict),
        }
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        inputs.update({name: value for name, value in optional.items() if value is not None})
        return self._run(inputs, task_ids, kwargs)


def _resolved(model: PeftModel, return_dict: bool | None) -> bool | None:
    if return_dict is not None:
        return return_dict
    config = model.config
    return config.get("return_dict") if isinstance(config, dict) else getattr(config, "return_dict", None)


class _GeneratingModel(_TaskModel):
    """What the classes that generate share."""

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        if not hasattr(model, "prepare_inputs_for_generation"):
            raise AttributeError(
                f"A {type(model).__name__} cannot generate (it has no prepare_inputs_for_generation); leave task_type "
                "unset for a model that is not to."
            )
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self.base_model_prepare_inputs_for_generation = self.get_base_model().prepare_inputs_for_generation

    def _generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        task_ids = None
        if self._uses_prompt:
            kwargs = PromptInputs(self).generation_arguments(kwargs)
            if kwargs.get("assistant_model") is not None:  # which is given all arguments, and does not know this one
                task_ids = kwargs.pop("task_ids", None)
        with self._generation(task_ids), self._enable_peft_forward_hooks(*args, **kwargs):
            return self.base_model.generate(*args, **self._without_special(kwargs))

    @contextmanager
    def _generation(self, task_ids: torch.Tensor | None = None) -> Iterator[None]:
        """Context in which the base model prepares its inputs through this class, prompt included.

        Args:
            task_ids: (batch,), of steps that are not given any.
        """
        base = self.get_base_model()
        if hasattr(self, "generation_config"):
            base.generation_config = self.generation_config
        prepare = functools.partial(self.prepare_inputs_for_generation, task_ids=task_ids)
        prepare = _announced_as(prepare, base.prepare_inputs_for_generation)
        with replaced(base, "prepare_inputs_for_generation", prepare):
            if not self._uses_prompt:
                yield
                return
            room = _with_room(base._prepare_cache_for_generation, PromptInputs(self).cached_tokens)
            with replaced(base, "_prepare_cache_for_generation", room):
                yield

    def prepare_inputs_for_generation(
        self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The base model's inputs of the next step, with the prompt in them where there is one."""
        prepare = self.base_model_prepare_inputs_for_generation
        if self._uses_prompt:
            input_ids = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
            return PromptInputs(self).step(prepare, input_ids, kwargs, task_ids)
        return prepare(*args, **kwargs)


def _announced_as(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ours with the signature of what it replaces: `generate` asks it which arguments it may pass on."""

    @functools.wraps(ours)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    signature = inspect.signature(theirs)
    own = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [p for p in signature.parameters.values() if p.name != own.name]
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    prepare.__signature__ = signature.replace(parameters=[*parameters[:at], own, *parameters[at:]])
    return prepare


def _with_room(prepare_cache: Callable[..., Any], tokens: int) -> Callable[..., Any]:
    """The making of a generation's cache, with room for that many tokens more in one of fixed size."""

    @functools.wraps(prepare_cache)
    def prepare(config: Any, kwargs: Any, mode: Any, batch_size: int, max_cache_length: int) -> Any:
        return prepare_cache(config, kwargs, mode, batch_size, max_cache_length + tokens)

    return prepare


class PeftModelForCausalLM(_GeneratingModel):
    """A `PeftModel` that continues texts."""

    task = TaskType.CAUSAL_LM
    labels_are_per_token = True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; `input_ids` and `labels` (batch, tokens)."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        if not self._is_prompt_learning and getattr(self.base_model.config, "model_type", None) == "mpt":
            if inputs.pop("inputs_embeds") is not None:
                raise AssertionError("An mpt model takes input_ids, not inputs_embeds.")
        return self._run(inputs, task_ids, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate with the active adapters; arguments of the base model's generate, and `adapter_names`."""
        return self._generate(*args, **kwargs)


class PeftModelForSeq2SeqLM(_GeneratingModel):
    """A `PeftModel` with an encoder and a decoder."""

    task = TaskType.SEQ_2_SEQ_LM
    has_two_stacks = True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; `input_ids` (batch, tokens), decoder ids and `labels` (batch, decoder tokens)."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self._run(inputs, task_ids, kwargs)

    def generate(self, **kwargs: Any) -> torch.Tensor:
        """Generate with the active adapters; arguments of the base model's generate, and `adapter_names`."""
        return self._generate(**kwargs)
