"""The tuner that trains selected rows of embeddings."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.layer import AdapterLayer
from ...engine.lifecycle import holders_of
from ...engine.matching import TargetMatcher, is_suffix
from ...engine.tokens import TrainableTokensLayer
from ...engine.tuner import BaseTuner
from ...engine.tying import input_embedding_name, tied_module_names
from .config import TrainableTokensConfig


class TrainableTokensModel(BaseTuner):
    """Adapts a model by training selected rows of its embedding; modules that are tied to it use the same rows.

    Args:
        model: the model to adapt.
        config: a `TrainableTokensConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make the rows on the meta device.
    """

    prefix: ClassVar[str] = "trainable_tokens_"
    tuner_layer_cls = TrainableTokensLayer
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = dict.fromkeys(("any", "linear"), TrainableTokensLayer)
    keeps_ties_itself = True

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """As for any tuner; the modules tied to the embedding get their layers with it.

        Args:
            model: the model to change.
            adapter_name: a key of `peft_config`.
            autocast_adapter_dtype: of no effect here; see `cast_adapter_dtype`.
            low_cpu_mem_usage: make the rows on the meta device, to be loaded afterwards.
            kwargs: `state_dict`, to target what this adapter state has weights for.

        Raises:
            IndexError: a token index outside a table. Whatever is raised, the model is as it was.
        """
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)
        config = self.peft_config[adapter_name]
        matcher = TargetMatcher(config)
        followers = {name for name in config.target_modules_to_tie if not matcher.check(name)}
        self.targeted_module_names = [name for name in self.targeted_module_names if name not in followers]

    def _prepare_adapter_config(
        self, peft_config: TrainableTokensConfig, model_config: dict[str, Any]
    ) -> TrainableTokensConfig:
        """Fill in the embedding if nothing is targeted, and note which modules are to use its rows."""
        if peft_config.target_modules is None:
            peft_config.target_modules = self._default_target()
        # No field of the configuration: it depends on the model and is found anew each time.
        peft_config.target_modules_to_tie = self._tied_targets(peft_config)
        return peft_config

    def _default_target(self) -> str | list[str]:
        embedding = input_embedding_name(self.model)
        if embedding is not None:
            return embedding
        found = [name for name, _ in self.model.named_modules() if is_suffix(name, "embed_tokens")]
        return found if len(found) > 1 else found[0] if found else "embed_tokens"

    def _tied_targets(self, config: TrainableTokensConfig) -> list[str]:
        """The modules that share the embedding's rows, none if the embedding is no target."""
        if not getattr(getattr(self.model, "config", None), "tie_word_embeddings", False):
            return []
        tied, embedding = tied_module_names(self.model), input_embedding_name(self.model)
        if not tied or embedding is None:
            return []
        matcher = TargetMatcher(config)
        if matcher.check(embedding):
            return tied
        alone = [name for name in tied if matcher.check(name)]
        if alone:
            warnings.warn(
                f"{alone} are tied to the input embedding {embedding!r}, which is no target: only {alone} will use "
                "the trained rows, until merging writes them into the common weight. Target the embedding to train "
                "the rows of both."
            )
        return []

    def layer_options(
        self, config: TrainableTokensConfig, adapter_name: str, key: str, target: nn.Module
    ) -> dict[str, Any]:
        return {"tied_adapter": self._layer_to_share(config, key), "target_name": key}

    def _layer_to_share(self, config: TrainableTokensConfig, key: str) -> TrainableTokensLayer | None:
        return self.model.get_input_embeddings() if key in config.target_modules_to_tie else None

    def _check_target_module_compatiblity(
        self, peft_config: TrainableTokensConfig, model: nn.Module, target_name: str
    ) -> None:
        target = model.get_submodule(target_name)
        if isinstance(target, TrainableTokensLayer):
            wanted = self._layer_to_share(peft_config, target_name)
            if wanted is not target.tied_adapter:
                common, alone = "in common with the input embedding", "for it alone"
                raise ValueError(
                    f"The adapters {sorted(target.token_indices)} have rows of {target_name!r} "
                    f"{alone if wanted else common}, so another one cannot have them {common if wanted else alone}: "
                    "target the same modules with all adapters."
                )

    def _check_merge_allowed(self) -> None:
        # What is tied to the embedding has the same rows, so merging keeps the tie.
        if not any(getattr(config, "target_modules_to_tie", None) for config in self.peft_config.values()):
            super()._check_merge_allowed()

    @staticmethod
    def adapter_state_to_load(
        model: nn.Module, config: TrainableTokensConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The file's tensors, with rows that a file has once standing for every module that shares them."""
        groups: dict[int, list[str]] = {}
        for name, layer in holders_of(model):
            if isinstance(layer, TrainableTokensLayer):
                key = f"{name}.trainable_tokens_delta"
                groups.setdefault(id(layer.trainable_tokens_delta), []).append(key)
        filled = dict(state)
        for keys in groups.values():
            present = [key for key in keys if key in state]
            filled |= {key: state[present[-1]] for key in keys if present and key not in state}
        return filled


__all__ = ["TrainableTokensModel"]
