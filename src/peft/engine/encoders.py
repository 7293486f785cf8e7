"""Prompt encoders: the modules that prompt learning trains instead of adapting layers.

`BasePromptEncoder` says what a family of encoders declares; nothing else tells families apart. `PromptEncoders` holds
the encoders of one model and takes part in the life cycle as any other module with adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from .lifecycle import AdapterHolder, Entry


class BasePromptEncoder(nn.Module):
    """Makes the prompt of one adapter from trained parameters.

    A subclass has an `embedding` and a `forward(indices)`, (batch, tokens) -> (batch, tokens, width), and says in the
    class attributes and methods below where it differs from one whose prompt is put before the input's embeddings.
    """

    fills_cache: ClassVar[bool] = False
    """Whether the prompt is keys and values for the attention layers instead of embeddings before the input."""
    prompts_decoder: ClassVar[bool] = False
    """Whether the second half of the tokens for a model with two stacks goes before the decoder's input."""
    takes_task_ids: ClassVar[bool] = False
    """Whether the prompt depends on the task of each row."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that never train."""
    own_arguments: ClassVar[tuple[str, ...]] = ()
    """Names of arguments of the model's forward that are for `loss` and not for the base model."""
    computes_loss: ClassVar[bool] = False
    """Whether `loss` takes the place of the base model's."""

    @classmethod
    def complete_config(cls, config: Any, model_config: dict[str, Any]) -> None:
        """Adjust what a configuration has learned from the base model's, in place.

        Args:
            config: the adapter's configuration; token_dim, num_layers and num_attention_heads are set.
            model_config: of the base model, its text part if it has several.
        """

    @classmethod
    def build(cls, config: Any, word_embeddings: nn.Module, base_model: nn.Module) -> BasePromptEncoder:
        """A new encoder.

        Args:
            config: the adapter's configuration, complete.
            word_embeddings: the base model's, for starts that use them.
            base_model: the base model.

        Raises:
            ValueError: the base model cannot be used with such an encoder.
        """
        return cls(config)

    def prompt(self, indices: torch.Tensor, batch_size: int, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The prompt for a batch: (batch, tokens, width).

        Args:
            indices: (tokens,), long.
            batch_size: number of rows.
            task_ids: (batch,), long; for encoders that take them.
        """
        return self(indices.unsqueeze(0)).expand(batch_size, -1, -1)

    def cache(self, prompt: torch.Tensor, base_model: nn.Module, config: Any, max_cache_len: int | None = None) -> Any:
        """The cache that a prompt of keys and values fills; for encoders that do.

        Args:
            prompt: what `prompt` gave.
            base_model: the model whose attention layers are to read it.
            config: the adapter's configuration.
            max_cache_len: how many tokens a cache of fixed size must hold.
        """
        raise NotImplementedError(f"The prompt of a {type(self).__name__} is embeddings and fills no cache.")

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, **own: Any) -> torch.Tensor:
        """The loss, for encoders that compute it themselves.

        Args:
            logits: the base model's, (batch, virtual and other tokens, vocabulary).
            labels: (batch, tokens), those of the input.
            own: the arguments in `own_arguments` that were given.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the loss to the base model.")

    # ----------------------------------------------------------------------------------------------------------- files

    def prompt_to_save(self, indices: torch.Tensor) -> torch.Tensor:
        """The prompt as a file holds it, what the encoder computes and not how: (tokens, width).

        Args:
            indices: (tokens,), long.
        """
        return self(indices.unsqueeze(0))[0]

    def saved_shapes(self) -> dict[str, torch.Size]:
        """Names on disk of the tensors that this encoder loads, with their shapes."""
        return {"prompt_embeddings": self.embedding.weight.shape}

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor] | None,
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their names on disk.

        Args:
            model: the `PeftModel`.
            config: the adapter's configuration.
            adapter_name: the adapter.
            state_dict: take the values from here, by their names in memory, instead of from the model.
            unwanted_adapter_names: the other adapters.
        """
        return {"prompt_embeddings": model.prompts.embedding_to_save(adapter_name, state_dict)}

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take the tensors of a file: of the names and shapes in `saved_shapes`, perhaps not all of them."""
        if "prompt_embeddings" in state_dict:
            self.embedding.weight.copy_(state_dict["prompt_embeddings"])


class PromptEncoders(AdapterHolder, nn.ModuleDict):
    """The encoders of a model by adapter name; a parameter trains exactly as a tuner layer's would."""

    def add(self, adapter_name: str, encoder: BasePromptEncoder) -> None:
        """Take in an encoder; whether it trains is up to the transition that follows.

        Args:
            adapter_name: a new name.
            encoder: its encoder.
        """
        self._modules[adapter_name] = encoder  # not through add_module: a name may be that of an attribute of ours
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: encoder.frozen}
        self.roster.join(adapter_name, self._label, self.exclusive)

    def adapter_containers(self) -> Iterator[tuple[str, Any]]:
        yield self._label, self

    def adapter_parameters(
        self, adapter_names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, str, int, nn.Parameter]]:
        """Adapter, name in its encoder, index and parameter, of all adapters or of those named."""
        for adapter in list(self.keys() if adapter_names is None else adapter_names):
            if adapter in self:
                for index, (name, parameter) in enumerate(self[adapter].named_parameters()):
                    yield adapter, name, index, parameter

    def state_entries(self, adapter: str) -> Iterator[Entry]:
        """None: a file holds what the encoder computes, see `BasePromptEncoder._get_adapter_state_dict`."""
        return iter(())

    def _drop(self, adapter_name: str) -> None:
        del self[adapter_name]
        self.frozen_peft_weight_names = {k: v for k, v in self.frozen_peft_weight_names.items() if k != adapter_name}
