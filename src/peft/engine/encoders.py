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
from .sharding import several_processes, unhooked


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
    resumes: ClassVar[bool] = True
    """Whether a prompt that a file had trains on, though it was loaded for inference."""
    own_arguments: ClassVar[tuple[str, ...]] = ()
    """Names of arguments of the model's forward that are for `loss` and not for the base model."""
    loss_arguments: ClassVar[tuple[str, ...]] = ()
    """Names of arguments of the model's forward that are for `loss` and for the base model."""
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

    def cache(
        self,
        prompt: torch.Tensor,
        base_model: nn.Module,
        config: Any,
        max_cache_len: int | None = None,
        into: Any = None,
    ) -> Any:
        """The cache that a prompt of keys and values fills; for encoders that do.

        Args:
            prompt: what `prompt` gave.
            base_model: the model whose attention layers are to read it.
            config: the adapter's configuration.
            max_cache_len: how many tokens a new cache must have room for; it grows as needed if that is not given.
            into: an empty cache to fill; a new one is made otherwise.
        """
        raise NotImplementedError(f"The prompt of a {type(self).__name__} is embeddings and fills no cache.")

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, **own: Any) -> torch.Tensor:
        """The loss, for encoders that compute it themselves.

        Args:
            logits: the base model's, (batch, virtual and other tokens, vocabulary).
            labels: (batch, tokens), those of the input.
            own: the arguments in `own_arguments` and `loss_arguments` that were given.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the loss to the base model.")

    # ----------------------------------------------------------------------------------------------------------- files

    def prompt_to_save(self, indices: torch.Tensor) -> torch.Tensor:
        """The prompt as a file holds it, what the encoder computes and not how: (tokens, width).

        Args:
            indices: (tokens,), long.
        """
        return self(indices.unsqueeze(0))[0]

    def tensors_to_save(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """All that a file holds, by name on disk.

        Args:
            indices: (tokens,), long.
        """
        return {"prompt_embeddings": self.prompt_to_save(indices)}

    @classmethod
    def promised_shapes(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """Names on disk with shapes that follow from a configuration alone, for a look at a file before memory is taken.

        Args:
            config: the adapter's configuration, complete.
        """
        return {}

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
        return model.prompts.tensors_to_save(adapter_name, state_dict)

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take the tensors of a file: of the names and shapes in `saved_shapes`, perhaps not all of them."""
        if "prompt_embeddings" in state_dict:
            self.embedding.weight.copy_(state_dict["prompt_embeddings"])


class ReparameterizedEncoder(BasePromptEncoder):
    """One that may compute its prompt through a network, because that trains better than the prompt itself.

    A file holds the prompt and not the network. Loaded into an encoder with a network, that prompt takes the place of
    what the network computes at that moment, exactly; what the network learns from then on is added to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loaded", None)
        self.register_buffer("computed", None)

    @property
    def has_network(self) -> bool:
        """Whether the prompt is more than the embedding itself."""
        raise NotImplementedError

    def compute(self, indices: torch.Tensor) -> torch.Tensor:
        """What the network, or the embedding alone, makes of the indices: (batch, tokens) -> (batch, tokens, width)."""
        raise NotImplementedError

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The prompt.

        Args:
            indices: (batch, tokens), long, each row all tokens of the prompt.

        Returns:
            (batch, tokens, width).
        """
        prompt = self.compute(indices)
        return prompt if self.loaded is None else self.loaded + (prompt - self.computed)

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        if not self.has_network:
            super()._load_adapter_state_dict(state_dict)
        elif "prompt_embeddings" in state_dict:
            weight = self.embedding.weight
            training = self.training
            self.eval()  # without dropout
            twin = unhooked(self) if several_processes() else self
            computed = twin.compute(torch.arange(len(weight), device=weight.device).unsqueeze(0)).detach()
            self.train(training)
            self.computed, self.loaded = computed, state_dict["prompt_embeddings"].to(computed, copy=True)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
        if f"{prefix}embedding.weight" in state_dict:  # of a whole encoder, into which a prompt was loaded or not
            for name in ("loaded", "computed"):
                value = state_dict.get(prefix + name)
                setattr(self, name, None if value is None else value.to(self.embedding.weight, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *rest)


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
