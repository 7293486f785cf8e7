"""Training selected rows of an embedding, or of an output layer tied to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.buffer_dict import BufferDict
from ..utils.integrations import gather_params_ctx
from .kinds import EMBEDDING, LINEAR
from .layer import DEFERRED, AdapterLayer


class TrainableTokensLayer(AdapterLayer, nn.Module):
    """Replaces the rows `token_indices` of the base weight W (V, D) by trained ones: W'[i_k] = δ_k.

    Args:
        base_layer: an embedding, or a linear layer whose output features are the tokens.
        adapter_name: the first adapter.
        config: a `TrainableTokensConfig`; or give its fields as keywords.
        tied_adapter: a layer whose rows this one shares instead of having its own.
        kwargs: `token_indices`, `init_weights`.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any = None,
        tied_adapter: TrainableTokensLayer | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._wrap(base_layer)
        # In a list, so that the tied layer is no submodule of this one.
        self._tied_adapter = [tied_adapter] if tied_adapter is not None else []
        self.token_indices: dict[str, list[int]] = {}
        self.trainable_tokens_original = BufferDict(persistent=False)
        if tied_adapter is not None:
            self.token_indices = tied_adapter.token_indices
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
        self.update_layer(adapter_name, config=config, tied_adapter=tied_adapter, **kwargs)

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer that this one shares its rows with."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def update_layer(
        self,
        adapter_name: str,
        config: Any = None,
        tied_adapter: TrainableTokensLayer | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            config: a `TrainableTokensConfig`; or give its fields as keywords.
            tied_adapter: given for a tied layer, which has nothing of its own to add.
            kwargs: `token_indices`, `init_weights`.

        Raises:
            IndexError: a token index outside the table.
        """
        if tied_adapter is None and self.tied_adapter is None:
            indices = kwargs["token_indices"] if config is None else config.token_indices
            from_rows = kwargs.get("init_weights", True) if config is None else config.init_weights
            self._add_rows(adapter_name, indices, from_rows)
        self._settle(adapter_name, inference_mode=getattr(config, "inference_mode", False))

    def _add_rows(self, adapter_name: str, indices: Any, from_rows: bool) -> None:
        weight = self.get_base_layer().weight
        entries = getattr(weight, "ds_shape", weight.shape)[0]
        indices = indices.tolist() if torch.is_tensor(indices) else list(indices)
        outside = [index for index in indices if not 0 <= index < entries]
        if outside:
            raise IndexError(
                f"{self._label or 'The embedding'} has {entries} rows, so its token indices are 0 to {entries - 1}; "
                f"got {outside} for the adapter {adapter_name!r}."
            )
        with gather_params_ctx([weight] if hasattr(weight, "ds_numel") else []):
            original = self._base_rows(weight, torch.tensor(indices, dtype=torch.long, device=weight.device))
        delta = original.clone() if from_rows else torch.randn_like(original)
        self.token_indices[adapter_name] = indices
        self.trainable_tokens_original[adapter_name] = original
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(delta.to("meta") if DEFERRED.get() else delta)

    def _base_rows(self, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.unmerged_weight().detach()[index].clone()

    def _check_overlap(self, adapters: list[str]) -> None:
        owner: dict[int, str] = {}
        for adapter in dict.fromkeys(adapters):
            for index in self.token_indices[adapter]:
                if owner.setdefault(index, adapter) != adapter:
                    raise ValueError(
                        f"The adapters {owner[index]!r} and {adapter!r} both train the row of token {index} in "
                        f"{self._label or 'the embedding'}, so they cannot be used together."
                    )

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_indices)

    def get_merged_weights(self, active_adapters: list[str]) -> torch.Tensor:
        """The base weight (V, D) with the rows of these adapters in place; differentiable in the rows."""
        weight = self.unmerged_weight().detach()
        for adapter in active_adapters:
            delta = self.trainable_tokens_delta[adapter].to(weight)
            index = torch.tensor(self.token_indices[adapter], dtype=torch.long, device=weight.device)
            weight = weight.index_copy(0, index, delta)
        return weight

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward_adapters(x, list(plan), *args, **kwargs)

    def forward_adapters(self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the rows of these adapters in place.

        Args:
            x: token ids (...) for an embedding, hidden states (..., D) for a linear layer.
            active_adapters: names, no token in two of them.

        Raises:
            ValueError: two adapters train one row, or the base layer is neither kind.
        """
        if not active_adapters:
            return self.base_layer(x, *args, **kwargs)
        self._check_overlap(active_adapters)
        layer, weight = self.get_base_layer(), self.get_merged_weights(active_adapters)
        if EMBEDDING.matches(layer):
            return EMBEDDING.apply(layer, x, weight)
        if LINEAR.matches(layer):
            return F.linear(x, weight, layer.bias)
        raise ValueError(
            f"{self._label}: trainable tokens need an Embedding or a Linear layer, not a {type(layer).__name__}."
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        held = [name for name in names if name in self.token_indices]
        self._check_overlap([*self.merged_adapters, *held])
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        weight = tensors["weight"]
        index = torch.tensor(self.token_indices[adapter], dtype=torch.long, device=weight.device)
        return {"weight": weight.index_copy(0, index, self.trainable_tokens_delta[adapter].detach().to(weight))}

    def base_tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.get_base_weight()}

    def unloaded(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The base layer, with the rows merged into it if asked."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()
