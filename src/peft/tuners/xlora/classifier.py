"""The classifier of X-LoRA: from the hidden state of a token to the weights of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import XLoraConfig


class TemperatureScaledSoftmax(nn.Module):
    """softmax(x / temperature) over the last dimension.

    Args:
        temperature: positive; the lower, the closer to choosing one.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Weights of the logits' shape."""
        return self.softmax(logits / self.temperature)


class XLoraClassifier(nn.Module):
    """Weights every expert for every token, and for every layer if the configuration says so.

    Args:
        model: the base model, whose dtype the classifier has.
        config: sizes and options.
        n_classes: number n of experts.
        n_layers: number L of layers with experts.
        device: where to put the parameters.

    Raises:
        ValueError: `xlora_depth` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        config: XLoraConfig,
        n_classes: int,
        n_layers: int,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        if config.xlora_depth < 1:
            raise ValueError(
                f"xlora_depth counts the classifier's layers and is at least 1, got {config.xlora_depth}."
            )
        self.n_classes, self.n_layers, self.config = n_classes, n_layers, config
        self.log_scalings: list[torch.Tensor] = []
        self.scalings_logging = False
        self.softmax = TemperatureScaledSoftmax(config.softmax_temperature)
        layers: list[nn.Module] = []
        width = config.hidden_size
        for _ in range(config.xlora_depth - 1):
            layers += [nn.Linear(width, config.xlora_size), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                layers.append(nn.Dropout(config.xlora_dropout_p))
            width = config.xlora_size
        layers.append(nn.Linear(width, n_classes * n_layers if config.layerwise_scalings else n_classes))
        first = next(model.parameters())
        dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
        self.layers = nn.Sequential(*layers).to(device=device, dtype=dtype)

    def forward(
        self,
        result: Any,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The weights of the experts.

        Args:
            result: the base model's output, with its hidden states; the last ones (B, T, hidden) are read.
            input_ids, inputs_embeds: of no effect; so are the other arguments.

        Returns:
            (B, T, L, n)

        Raises:
            ValueError: there are no hidden states of this size.
        """
        states = getattr(result, "hidden_states", None)
        expected = self.config.hidden_size
        found = None if not states else tuple(states[-1].shape)
        if found is None or len(found) != 3 or found[-1] != expected:
            raise ValueError(
                f"X-LoRA reads the last hidden states of the base model, of shape (batch, tokens, {expected}) by its "
                f"hidden_size; this one gives {'none' if found is None else found}."
            )
        logits = self.layers(states[-1].to(self.layers[0].weight.dtype))
        if self.config.layerwise_scalings:
            logits = logits.unflatten(-1, (self.n_layers, self.n_classes))
        else:
            logits = logits.unsqueeze(2).expand(-1, -1, self.n_layers, -1)
        scalings = self.softmax(logits) if self.config.enable_softmax else logits
        if self.scalings_logging:
            self.log_scalings.append(scalings.detach())
        return scalings

    def make_dummy_scalings(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The constant weights of the pass whose hidden states are read.

        Args:
            input_ids: (B, T).
            inputs_embeds: (B, T, hidden), if there are no ids.

        Returns:
            (B, T, L, n), every entry the configuration's `scaling_pass_value`.

        Raises:
            ValueError: neither is given.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError(
                "X-LoRA needs input_ids or inputs_embeds, to know for how many tokens it weights experts."
            )
        shape = (*inputs.shape[:2], self.n_layers, self.n_classes)
        weight = self.layers[0].weight
        return torch.full(shape, self.scaling_pass_value, dtype=weight.dtype, device=weight.device)

    @property
    def scaling_pass_value(self) -> float:
        """The weight of every expert in that pass; 1/n where the configuration has None."""
        value = self.config.scaling_pass_value
        return 1 / self.n_classes if value is None else value

    def bucketed_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """The logged weights by number of tokens T: their positions in the log, and the weights."""
        buckets: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        for position, scalings in enumerate(self.log_scalings):
            positions, found = buckets.setdefault(scalings.shape[1], ([], []))
            positions.append(position)
            found.append(scalings)
        return buckets
