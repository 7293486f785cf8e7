"""Attention modules that also look at a learned prompt (LLaMA-Adapter, arXiv 2303.16199)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.calls import RowGroups
from ...engine.layer import AdapterLayer
from ...engine.lifecycle import Entry
from .config import TRANSFORMERS_MODEL_CONFIG
from .utils import in_heads, normed


class Adaption(nn.Module):
    """What one adapter has in one attention module.

    Args:
        prompt: (1, tokens, width).
        gate: (1,).
    """

    def __init__(self, prompt: torch.Tensor, gate: torch.Tensor) -> None:
        super().__init__()
        self.adaption_prompt = nn.Parameter(prompt)
        self.adaption_gate = nn.Parameter(gate)


class _BaseAdaptedAttention(AdapterLayer, nn.Module):
    """O + gate · softmax(Q Kᵀ / √d) V, through the output projection; O is the attention's output, Q are its queries.

    K and V are the attention's own projections of a prompt, without positions, which every token sees in full. The
    softmax is over the prompt alone, in float32. The gate starts at zero.

    The parameters `adaption_prompt` and `adaption_gate` are those of the active adapter. Those of the others are not
    registered with the model: its parameters, names and counts are as if there was one adapter only.

    Where the output projection has a bias, it is added to the term too, as in the files that there are: a fresh adapter on
    such a model does not start as the identity.

    Args:
        model_type: of `TRANSFORMERS_MODEL_CONFIG`.
        adapter_len: tokens of the first adapter's prompt.
        model: the attention module.
        adapter_name: the first adapter.
        inference_mode: whether the first adapter is used without training it.
    """

    adapter_layer_names = ("adaptions",)
    inner_modules = ("model",)
    keeps_dtype = True
    """A prompt has the dtype of the projections that it goes through."""
    exclusive = True
    """Two prompts would go by one name."""
    dtype_of: ClassVar[str]
    """The projection whose dtype prompts have."""

    def __init__(
        self,
        model_type: str,
        adapter_len: int,
        model: nn.Module,
        adapter_name: str = "default",
        inference_mode: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.model_type = model_type
        self.model = model
        self.adaptions: dict[str, Adaption] = {}
        self.kind = None
        self.merged_adapters = []
        self.update_layer(adapter_name, adapter_len, inference_mode=inference_mode)

    @property
    def base_layer(self) -> nn.Module:
        return self._modules["model"]

    @property
    def compute_query_states(self) -> Callable[..., torch.Tensor]:
        return TRANSFORMERS_MODEL_CONFIG[self.model_type].compute_query_states

    # ---------------------------------------------------------------------------------------------------- its adapters

    def update_layer(self, adapter_name: str, adapter_len: int, inference_mode: bool = False) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            adapter_len: tokens of its prompt.
            inference_mode: use it without training it.
        """
        dtype = getattr(self.model, self.dtype_of).weight.dtype
        if not dtype.is_floating_point:  # quantised
            dtype = torch.float32
        prompt = nn.init.normal_(self.empty(1, adapter_len, self.model.config.hidden_size, dtype=dtype))
        gate = nn.init.zeros_(self.empty(1, dtype=dtype))
        device, _ = self._adapter_device_and_dtype()
        if device is not None and device.type != "meta" and not prompt.is_meta:
            prompt, gate = prompt.to(device), gate.to(device)
        self.adaptions[adapter_name] = Adaption(prompt, gate)
        self._settle(adapter_name, inference_mode=inference_mode)
        self._register_active()

    def refresh(self, adapter_names: Any = None) -> None:
        super().refresh(adapter_names)
        self._register_active()

    def _register_active(self) -> None:
        """Make the parameters of the active adapter this module's; the two share one table of them."""
        active = (self.adaptions[name] for name in self.active_adapters if name in self.adaptions)
        shown = next(active, None)
        self.__dict__["_parameters"] = {} if shown is None else shown._parameters

    def _is_registered(self, adapter: str) -> bool:
        return self.adaptions[adapter]._parameters is self._parameters

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # A model that is moved or cast takes along what it does not list.
        for name, adaption in self.adaptions.items():
            if not self._is_registered(name):
                adaption._apply(fn)
        return super()._apply(fn, recurse)

    def state_entries(self, adapter: str) -> Iterator[Entry]:
        if adapter in self.adaptions:
            adaption, outside = self.adaptions[adapter], not self._is_registered(adapter)
            for name in adaption._parameters:
                live = f"adaptions.{adapter}.{name}" if outside else name
                yield Entry(live, name, adaption, name, outside)

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """None: no weight of the attention module can take a prompt in."""
        return {}

    # ---------------------------------------------------------------------------------------------------------- forward

    def keys_and_values(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention module's keys and values of a prompt (1, tokens, width): (1, key heads, tokens, head_dim)."""
        raise NotImplementedError

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads · head_dim) through the attention module's output projection, if it takes part."""
        output = TRANSFORMERS_MODEL_CONFIG[self.model_type].o_proj_layer
        return states if output is None else getattr(self.model, output)(states)

    def queries(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The attention module's queries of its input x (batch, tokens, width): (batch, heads, tokens, head_dim)."""
        raise NotImplementedError

    def term(self, x: torch.Tensor, adaption: nn.Module, **kwargs: Any) -> torch.Tensor:
        """What an adapter adds to the output.

        Args:
            x: the attention module's input, (batch, tokens, width).
            adaption: what has its parameters: this module for the active adapter, since a replica or a compiled model
                knows a module's own, and its entry of `adaptions` for another.
            kwargs: what else the attention module is called with.
        """
        query = self.queries(x, **kwargs)
        key, value = self.keys_and_values(adaption.adaption_prompt.to(x.dtype))
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1).to(query.dtype) for states in (key, value))
        scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
        seen = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
        gated = adaption.adaption_gate.to(query.dtype) * seen
        return self.project(gated.transpose(1, 2).flatten(2))

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> tuple:
        output, *rest = self.model(x, *args, **kwargs)
        return (output + self.term(x, self, **kwargs).to(output.dtype), *rest)

    def mixed_forward(self, x: torch.Tensor, rows: RowGroups, *args: Any, **kwargs: Any) -> tuple:
        output, *rest = self.model(x, *args, **kwargs)
        for name, index in rows.items():
            term = self.term(x[index], self.adaptions[name], **_rows_of(kwargs, index, len(x)))
            output = output.index_add(0, index, term.to(output.dtype))
        return (output, *rest)


def _rows_of(arguments: dict[str, Any], index: torch.Tensor, batch_size: int) -> dict[str, Any]:
    """The arguments of an attention module for some rows of a batch, of those that its queries depend on."""
    positions = arguments.get("position_embeddings")
    if positions is None:
        return arguments
    angles = tuple(angle[index] if len(angle) == batch_size else angle for angle in positions)
    return {**arguments, "position_embeddings": angles}


class AdaptedAttention(_BaseAdaptedAttention):
    """An attention module of Llama's kind, with projections of its own for queries, keys and values, that sees a prompt.

    Keys and values are repeated where several query heads share one, and keys normalised if the module does that.

    See `_BaseAdaptedAttention` for the formula and the arguments.
    """

    dtype_of = "q_proj"

    def keys_and_values(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        names = TRANSFORMERS_MODEL_CONFIG[self.model_type]
        projections = (getattr(self.model, name) for name in (names.k_proj_layer, names.v_proj_layer))
        key, value = (in_heads(projection(prompt), self.model.head_dim) for projection in projections)
        return normed(self.model, "k_norm", key), value

    def queries(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.compute_query_states(model=self.model, hidden_states=x, **kwargs)

    def forward(self, **kwargs: Any) -> tuple:
        """The attention's output with the active adapter's term, and what else the attention gives.

        Args:
            kwargs: the attention module's arguments, `hidden_states` (batch, tokens, width) among them.
        """
        return super().forward(kwargs.pop("hidden_states"), **kwargs)


class AdaptedAttentionGPT(_BaseAdaptedAttention):
    """An attention module of GPT-2, with one projection for queries, keys and values, that sees a prompt.

    The term is not projected. See `_BaseAdaptedAttention` for the formula and the arguments.
    """

    dtype_of = "c_proj"

    def keys_and_values(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fused = getattr(self.model, TRANSFORMERS_MODEL_CONFIG[self.model_type].k_proj_layer)(prompt)
        _, key, value = (in_heads(part, self.model.head_dim) for part in fused.split(self.model.split_size, dim=-1))
        return key, value

    def queries(
        self, x: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        return self.compute_query_states(
            model=self.model, hidden_states=x, encoder_hidden_states=encoder_hidden_states
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_past: Any = None,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple:
        """The attention's output with the active adapter's term, and what else the attention gives.

        Args:
            hidden_states: (batch, tokens, width).
            layer_past: what the attention module takes under this name, as are all that follow; passed on if given.
            attention_mask: the same.
            head_mask: the same.
            encoder_hidden_states: the same.
            encoder_attention_mask: the same.
            use_cache: the same.
            output_attentions: the same.
            kwargs: further arguments of the attention module, the cache among them.
        """
        given = {
            "layer_past": layer_past,
            "attention_mask": attention_mask,
            "head_mask": head_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return super().forward(hidden_states, use_cache=use_cache, output_attentions=output_attentions, **kwargs)


__all__ = ["TRANSFORMERS_MODEL_CONFIG", "AdaptedAttention", "AdaptedAttentionGPT", "Adaption"]
