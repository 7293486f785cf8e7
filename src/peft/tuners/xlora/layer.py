"""A layer with LoRA experts, weighted token by token: y = W·x + g·Σ_i s_i·B_i·A_i·(c_i·x).

An `XLoraLayer` stands beside a LoRA layer and runs in place of its forward. The weights c come with each call of the
model; where none come, as when the base model is called directly, the LoRA layer's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import XLoraConfig

if TYPE_CHECKING:
    from .model import XLoraModel

SCALINGS = "xlora_scalings"
"""The name by which a call gives its weights to the layers."""
NO_EXPERTS = "no experts"
"""Given in place of weights that are all zero."""


class XLoraLayer:
    """The weighted sum of a LoRA layer's adapters.

    Args:
        model: the X-LoRA model.
        target: the LoRA layer.
        target_forward: its own forward.
        layer_number: its number among the layers with experts.
        config: options.
    """

    def __init__(
        self,
        model: XLoraModel,
        target: nn.Module,
        target_forward: Callable[..., torch.Tensor],
        layer_number: int,
        config: XLoraConfig,
    ) -> None:
        self.model, self.target, self.target_forward = model, target, target_forward
        self.layer_number, self.config = layer_number, config

    @property
    def adapters_disabled(self) -> bool:
        return self.model.disabled

    def get_maybe_topk_scalings(self, scalings: torch.Tensor) -> torch.Tensor:
        """This layer's weights, of the experts that each token uses.

        Args:
            scalings: (B, T, L, n).

        Returns:
            (B, T, n)
        """
        chosen = scalings[:, :, self.layer_number, :]
        k = self.config.top_k_lora
        if k is not None:
            largest = chosen.topk(min(k, chosen.shape[-1]), dim=-1).indices
            chosen = chosen * torch.zeros_like(chosen).scatter(-1, largest, 1)
        if self.config.enable_softmax_topk:
            used = chosen != 0
            chosen = torch.where(used, chosen, -torch.inf).softmax(-1).where(used, 0)
        return chosen

    @staticmethod
    def apply_scalings_to_x(x: torch.Tensor, scalings_layer: torch.Tensor, adapter: int) -> torch.Tensor:
        """x with each token multiplied by its weight of one expert.

        Where x has fewer tokens, as an output layer asked for the last logits, they are the last ones; where it has one
        row per token, or one per sample, it is multiplied row by row, per sample by the mean over the tokens.

        Args:
            x: (B, T, ...).
            scalings_layer: (B, T, n).
            adapter: number of the expert.

        Raises:
            ValueError: the rows of x are neither.
        """
        weights = scalings_layer[:, :, adapter].to(x.dtype)
        batch, tokens = weights.shape
        if x.dim() > 2 and x.shape[0] == batch and x.shape[1] <= tokens:
            weights = weights[:, tokens - x.shape[1] :]
        elif x.shape[0] == batch * tokens:
            weights = weights.flatten()
        elif x.shape[0] == batch:
            weights = weights.mean(1)
        else:
            raise ValueError(
                f"X-LoRA weights {batch} x {tokens} tokens, but a layer with experts has an input of shape "
                f"{tuple(x.shape)}, of which neither tokens nor samples can be told."
            )
        return x * weights.view(*weights.shape, *[1] * (x.dim() - weights.dim()))

    def _scalings_of(self, given: Any) -> Any:
        return self.target.call_input(SCALINGS) if given is None else given

    def _experts(self) -> Iterator[tuple[int, str]]:
        """Number and name of the experts that this layer holds and uses."""
        order = self.model.experts
        return ((order[name], name) for name, *_ in self.target.plan)

    def forward(
        self, x: torch.Tensor, *args: Any, scalings: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output plus the weighted terms.

        Args:
            x: the layer's input.
            args: the base layer's further arguments; so are `kwargs`.
            scalings: (B, T, L, n); those of the running call by default.

        Returns:
            As the base layer's, in its dtype.
        """
        scalings = self._scalings_of(scalings)
        layer = self.target
        if self.adapters_disabled or scalings is NO_EXPERTS:
            return layer.base_layer(x, *args, **kwargs)
        if scalings is None or not layer.plan:
            return self.target_forward(x, *args, **kwargs)
        result = layer.base_layer(x, *args, **kwargs)
        dtype, weights = result.dtype, self.get_maybe_topk_scalings(scalings)
        for number, name in self._experts():
            factor = layer.scaling[name] * self.config.global_scaling_weight
            result = result + self._term(x, weights, number, name) * factor
        return result.to(dtype)

    def _term(self, x: torch.Tensor, weights: torch.Tensor, number: int, name: str) -> torch.Tensor:
        """B·(c·A·x) of one expert: a token's weight passes through A, whose output is smaller."""
        raise NotImplementedError


class XLoraLinearLayer(XLoraLayer):
    """Experts of a linear layer; arguments as `XLoraLayer`."""

    def _term(self, x: torch.Tensor, weights: torch.Tensor, number: int, name: str) -> torch.Tensor:
        layer = self.target
        x = layer._cast_term_input(x, layer.factor_dtype(name))
        hidden = layer.lora_A[name](layer.lora_dropout[name](x))
        return layer.lora_B[name](self.apply_scalings_to_x(hidden, weights, number))


class XLoraEmbeddingLayer(XLoraLayer):
    """Experts of an embedding; arguments as `XLoraLayer`."""

    def _term(self, x: torch.Tensor, weights: torch.Tensor, number: int, name: str) -> torch.Tensor:
        A, B = self.target.factors(name)
        return self.apply_scalings_to_x(self.target.embed(x, A.T), weights, number) @ B.T


class XLoraConv2dLayer(XLoraLayer):
    """Experts of a convolution; arguments as `XLoraLayer`. Its input has no tokens: a sample has the mean of its weights."""

    def _term(self, x: torch.Tensor, weights: torch.Tensor, number: int, name: str) -> torch.Tensor:
        layer = self.target
        x = layer._cast_term_input(x, layer.factor_dtype(name))
        hidden = layer.lora_A[name](layer.lora_dropout[name](x))
        mean = weights[:, :, number].mean(1).to(hidden.dtype)
        return layer.lora_B[name](hidden * mean.view(-1, *[1] * (hidden.dim() - 1)))


__all__ = ["XLoraConfig", "XLoraConv2dLayer", "XLoraEmbeddingLayer", "XLoraLayer", "XLoraLinearLayer"]
