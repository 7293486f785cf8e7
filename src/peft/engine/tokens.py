"""Training selected rows of an embedding, or of an output layer tied to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.buffer_dict import BufferDict
from ..utils.error import UnsupportedTableError
from ..utils.integrations import gather_params_ctx
from .kinds import CONV1D_TRANSFORMERS, EMBEDDING, LINEAR, embed_scale
from .layer import DEFERRED, AdapterLayer, check_adapters_to_merge
from .offload import call_with, fetched
from .sharding import same_parameter


@dataclass(frozen=True)
class Selection:
    """Which rows of a table (V, D) some adapters replace, by the rows (n, D) that these have one after the other."""

    adapters: tuple[str, ...]
    tokens: torch.Tensor
    """(m,) the tokens, each once."""
    positions: torch.Tensor
    """(m,) the row of each token; the last one of a token that is listed twice."""
    slots: torch.Tensor | None
    """(V,) the row of every token of an embedding, n for a token that keeps the table's."""
    padding: int
    """The row of the padding token, which gets no gradient; n if that token is not replaced."""


class TrainableTokensLayer(AdapterLayer, nn.Module):
    """Replaces the rows `token_indices` of the base weight W (V, D) by trained ones: W'[i_k] = δ_k.

    Neither W' nor its gradient is formed where the base layer is an embedding or linear: the base layer runs as it is,
    and what concerns the tokens is put in its output.

    Args:
        base_layer: an embedding, or a linear layer whose output features are the tokens.
        adapter_name: the first adapter.
        config: a `TrainableTokensConfig`; or give its fields as keywords.
        tied_adapter: a layer whose rows this one shares instead of having its own.
        kwargs: `token_indices`, `init_weights`; `quantization_backend`.

    Raises:
        ValueError: the base layer has no table of tokens.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    shares_merged_weight = True  # a tied head has the same rows
    other_param_names = ("token_indices", "trainable_tokens_original")

    _selection: Selection | None = None
    _in_wrapper = False
    """Whether a wrapper passes calls on to this layer, which clients that walk over the model reach as well."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any = None,
        tied_adapter: TrainableTokensLayer | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self._wrap(base_layer, quantization_backend=kwargs.pop("quantization_backend", None))
        if self.kind not in (EMBEDDING, LINEAR, CONV1D_TRANSFORMERS) and not self._is_bag():
            raise UnsupportedTableError(
                f"{kwargs.get('target_name') or 'The target'}: trainable tokens need an Embedding, an EmbeddingBag or a "
                f"Linear layer, not a {type(self.get_base_layer()).__name__} (adapter {adapter_name!r})."
            )
        # In a list, so that the tied layer is no submodule of this one.
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        if tied_adapter is None:
            self.token_indices: dict[str, list[int]] = {}
            self.trainable_tokens_delta = nn.ParameterDict()
            self.trainable_tokens_original = BufferDict(persistent=False)
        else:
            self.token_indices = tied_adapter.token_indices
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
        self.update_layer(adapter_name, config=config, tied_adapter=tied_adapter, **kwargs)

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer that this one shares its rows with."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def _is_bag(self) -> bool:
        return isinstance(self.get_base_layer(), nn.EmbeddingBag)

    def _shares_weight(self) -> bool:
        """Whether the base weight is the one of the layer that this one is tied to."""
        source = self.tied_adapter
        return source is not None and same_parameter(self.weight, source.weight)

    def _as_table(self, weight: torch.Tensor) -> torch.Tensor:
        """Between the base weight's layout and (V, D), either way."""
        return weight.T if self.kind is CONV1D_TRANSFORMERS else weight

    # ------------------------------------------------------------------------------------------------------ adding

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

    def start_over(self, adapter_name: str, config: Any, **options: Any) -> None:
        if self._in_wrapper:  # the configuration is another method's, which says where the rows are in its own way
            self._add_rows(adapter_name, self.token_indices[adapter_name], from_rows=True)
        else:
            super().start_over(adapter_name, config, **options)

    def _add_rows(self, adapter_name: str, indices: Any, from_rows: bool) -> None:
        weight = self.weight
        if self.quantization_backend is None:
            entries = getattr(weight, "ds_shape", weight.shape)[1 if self.kind is CONV1D_TRANSFORMERS else 0]
        else:
            entries = self.in_features if self.kind is EMBEDDING else self.out_features
        indices = indices.tolist() if torch.is_tensor(indices) else list(indices)
        outside = [index for index in indices if not 0 <= index < entries]
        if outside:
            raise IndexError(
                f"{self._label or 'The embedding'} has {entries} rows, so its token indices are 0 to {entries - 1}; "
                f"got {outside} for the adapter {adapter_name!r}."
            )
        with gather_params_ctx([weight] if hasattr(weight, "ds_numel") else []):
            table = self._as_table(self.unmerged_weight().detach())
            original = table[torch.tensor(indices, dtype=torch.long, device=table.device)].clone()
        if DEFERRED.get():
            delta = original.to("meta")
        else:
            delta = original.clone() if from_rows else torch.randn_like(original)
        self.token_indices[adapter_name] = indices
        self.trainable_tokens_original[adapter_name] = original
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(delta)

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_indices)

    def rows_of(self, adapter_name: str) -> list[int]:
        return self.token_indices[adapter_name]

    # ---------------------------------------------------------------------------- the life cycle of what is shared

    def refresh(self, adapter_names: Iterable[str] | None = None) -> None:
        if self.tied_adapter is None:
            super().refresh(adapter_names)
        else:  # the rows are the other layer's, which says whether they train
            self.__dict__["_held"] = None
            self._plan = self._make_plan()

    def _disable(self) -> None:
        super()._disable()
        if self.tied_adapter is not None:
            self._flags_before_disabling = None

    def _make_plan(self) -> tuple:
        self._selection = None
        if self.merged_adapters and not self._disable_adapters and self._shares_weight():
            # Right whether the other layer has written these rows to the common weight already or not.
            return tuple(self.merged_adapters)
        return super()._make_plan()

    # ----------------------------------------------------------------------------------------------------- forward

    def _check_overlap(self, adapters: list[str]) -> None:
        owner: dict[int, str] = {}
        for adapter in dict.fromkeys(adapters):
            for index in self.token_indices[adapter]:
                if owner.setdefault(index, adapter) != adapter:
                    raise ValueError(
                        f"The adapters {owner[index]!r} and {adapter!r} both train the row of token {index} in "
                        f"{self._label or 'the embedding'}, so they cannot be used together."
                    )

    def _select(self, adapters: Iterable[str], device: torch.device) -> Selection:
        names = tuple(dict.fromkeys(adapters))
        known = self._selection
        if known is None or known.adapters != names or known.tokens.device != device:
            with torch.inference_mode(False):  # it is kept, and may be used for training later
                self._selection = known = self._make_selection(names, device)
        return known

    def _make_selection(self, names: tuple[str, ...], device: torch.device) -> Selection:
        self._check_overlap(list(names))
        listed = [token for name in names for token in self.token_indices[name]]
        position = {token: row for row, token in enumerate(listed)}
        tokens = torch.tensor(list(position), dtype=torch.long, device=device)
        positions = torch.tensor(list(position.values()), dtype=torch.long, device=device)
        layer, slots = self.get_base_layer(), None
        if self.kind is EMBEDDING:
            slots = torch.full((layer.num_embeddings,), len(listed), dtype=torch.long, device=device)
            slots = slots.index_copy(0, tokens, positions)
        padding = position.get(getattr(layer, "padding_idx", None), len(listed))
        return Selection(names, tokens, positions, slots, padding)

    def _rows(self, adapters: Iterable[str], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        rows = [self.trainable_tokens_delta[adapter].to(device, dtype) for adapter in adapters]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def get_merged_weights(self, active_adapters: list[str]) -> torch.Tensor:
        """The base weight with the rows of these adapters in place; differentiable in the rows.

        Args:
            active_adapters: names, no token in two of them.
        """
        return self._with_rows(self.unmerged_weight().detach(), active_adapters)

    def _with_rows(self, weight: torch.Tensor, adapters: Iterable[str]) -> torch.Tensor:
        chosen, table = self._select(adapters, weight.device), self._as_table(weight)
        if not chosen.adapters:
            return weight
        rows = self._rows(chosen.adapters, table.device, table.dtype)[chosen.positions]
        return self._as_table(table.index_copy(0, chosen.tokens, rows))

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward_adapters(x, list(plan), *args, **kwargs)

    def forward_adapters(self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the rows of these adapters in place.

        Args:
            x: token ids (...) for an embedding, hidden states (..., D) for a linear layer.
            active_adapters: names, no token in two of them.
            args: further arguments of the base layer.
            kwargs: the same.

        Raises:
            ValueError: two adapters train one row.
        """
        if not any(self.token_indices[name] for name in active_adapters):
            return self.base_layer(x, *args, **kwargs)
        layer, own_forward = self.get_base_layer(), type(self.get_base_layer()).forward
        looks_up = own_forward is nn.Embedding.forward or embed_scale(layer) is not None or self.quantization_backend
        if self.kind is EMBEDDING and looks_up:
            return self._look_up(x, self.base_layer(x, *args, **kwargs), active_adapters)
        if self.kind is CONV1D_TRANSFORMERS or self.quantization_backend or own_forward is nn.Linear.forward:
            return self._project(x, self.base_layer(x, *args, **kwargs), active_adapters)
        weights = {"weight": self.get_merged_weights(active_adapters)}
        return call_with(layer, weights, (x, *args), kwargs)

    def _look_up(self, x: torch.Tensor, result: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        layer = self.get_base_layer()
        chosen = self._select(adapters, x.device)
        rows = self._rows(chosen.adapters, x.device, layer.weight.dtype)
        slots = chosen.slots[x]
        looked_up = F.embedding(
            slots,
            F.pad(rows, (0, 0, 0, 1)),  # one more, for the tokens that are not replaced
            padding_idx=chosen.padding,
            max_norm=layer.max_norm,
            norm_type=layer.norm_type,
            scale_grad_by_freq=layer.scale_grad_by_freq,
        )
        scale = embed_scale(layer)
        if scale is not None:
            looked_up = looked_up * (scale.to(looked_up.dtype) if torch.is_tensor(scale) else scale)
        return torch.where((slots < len(rows)).unsqueeze(-1), looked_up.to(result.dtype), result)

    def _project(self, x: torch.Tensor, result: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        layer = self.get_base_layer()
        chosen = self._select(adapters, x.device)
        dtype = self.weight.dtype if self.weight.is_floating_point() and self.weight.dtype.itemsize > 1 else x.dtype
        rows = self._rows(chosen.adapters, x.device, dtype)[chosen.positions]
        bias = layer.bias
        if bias is not None:  # an empty one is none, too
            bias = fetched(layer, bias)[chosen.tokens].to(rows.dtype) if bias.numel() else None
        return result.index_copy(-1, chosen.tokens, F.linear(x, rows, bias).to(result.dtype))

    # ----------------------------------------------------------------------------------------------------- merging

    def unmerged_weight(self) -> torch.Tensor:
        return self.tied_adapter.unmerged_weight() if self._shares_weight() else super().unmerged_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        held = [name for name in names if name in self.token_indices]
        if self._in_wrapper and self.merged_adapters and set(held) <= set(self.merged_adapters):
            return
        self._check_overlap([*self.merged_adapters, *held])
        if not self._shares_weight():
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        # The common weight is written once, by the layer that this one is tied to.
        held = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.token_indices]
        self.merged_adapters = [*self.merged_adapters, *held]
        self._plan = self._make_plan()

    def unmerge(self) -> None:
        if self._in_wrapper and not self.merged_adapters:
            return
        if not (self.merged_adapters and self._shares_weight()):
            super().unmerge()
            return
        self.merged_adapters = []
        self._plan = self._make_plan()

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        return {"weight": self._with_rows(tensors["weight"], [adapter])}

    def base_tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.get_base_weight()}

    def unloaded(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """The base layer, with the rows merged into it if asked."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged_adapters:
            self.unmerge()
        return self.get_base_layer()
