"""The encoder of context-aware prompt tuning, how far its tokens may move, and its loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.encoders import BasePromptEncoder
from ...utils.prompts import IGNORED
from ..prompt_tuning.model import embedded

if TYPE_CHECKING:
    from .config import CPTConfig

KINDS = 4
"""Types of tokens are codes modulo this."""
LABEL, INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE = range(KINDS)

ALMOST_NOTHING = 1e-10
ROUNDING = 1e-5
"""By how much, relatively, a norm may be over its limit without a row being moved again."""


class CPTEmbedding(BasePromptEncoder):
    """The embeddings E of a context's tokens, plus deltas Δ that are learned and kept small (arXiv 2410.17222).

    Before each use, Δ's rows are projected onto their balls, in place: |Δᵢ| ≤ εᵢ √(width / 2048), with ε by the type
    of the token. Labels' rows get no gradient.

    Args:
        config: the completed configuration.
        word_embeddings: the base model's, where E is from.

    Raises:
        ValueError: a token is none of the vocabulary's.
    """

    frozen = ("embedding.weight",)
    own_arguments = ("input_type_mask",)
    loss_arguments = ("num_items_in_batch",)
    computes_loss = True

    def __init__(self, config: CPTConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        self.config = config
        shape = config.num_virtual_tokens, config.token_dim
        self.embedding, self.delta_embedding = nn.Embedding(*shape), nn.Embedding(*shape)
        for name in ("token_ids", "types", "limits"):
            self.register_buffer(name, None, persistent=False)
        self.set_updated_tokens()
        check_tokens(config.cpt_token_ids, word_embeddings)
        start = embedded(self.token_ids, word_embeddings)
        with torch.no_grad():
            self.embedding.weight.copy_(start)
            self.delta_embedding.weight.zero_()

    @classmethod
    def build(cls, config: CPTConfig, word_embeddings: nn.Module, base_model: nn.Module) -> CPTEmbedding:
        return cls(config, word_embeddings)

    def set_updated_tokens(self) -> None:
        """Read from the configuration which tokens move, and how far; again after it was changed."""
        device = self.delta_embedding.weight.device
        self.token_ids = torch.tensor(self.config.cpt_token_ids, device=device)
        self.types = torch.tensor(self.config.cpt_tokens_type_mask, device=device)
        self.limits = self.get_epsilon()

    def get_epsilon(self) -> torch.Tensor:
        """How long each delta may be: (tokens,), float32."""
        format_epsilon, input_epsilon = self.config.opt_projection_format_epsilon, self.config.opt_projection_epsilon
        epsilon = torch.full_like(self.types, ALMOST_NOTHING, dtype=torch.float32)
        epsilon[is_kind(self.types, INPUT_TEMPLATE) | is_kind(self.types, OUTPUT_TEMPLATE)] = format_epsilon
        epsilon[is_kind(self.types, INPUT)] = input_epsilon
        moves = self.types % KINDS != LABEL
        return torch.where(moves, epsilon * math.sqrt(self.config.token_dim / 2048), epsilon)

    @torch.no_grad()
    def get_projection(self) -> None:
        """Project the deltas, in place."""
        delta = self.delta_embedding.weight
        delta.copy_(projected(delta, self.limits))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Embeddings of the context.

        Args:
            indices: (batch, tokens), long.

        Returns:
            (batch, tokens, width).
        """
        self.get_projection()
        delta = self.delta_embedding(indices)
        moves = (self.types % KINDS != LABEL)[indices].unsqueeze(-1)
        return self.embedding(indices) + torch.where(moves, delta, delta.detach())

    # ------------------------------------------------------------------------------------------------------------ loss

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        input_type_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The loss of the labels in the context and in the input.

        Args:
            logits: (batch, virtual and other tokens, vocabulary).
            labels: (batch, tokens), those of the input.
            input_type_mask: (batch, tokens), types of the input's tokens, counted as if there were no context; all
                labels by default.
            num_items_in_batch: how many of the input's tokens count in all the batches whose gradients are added up;
                the loss is this batch's share of their mean.

        Raises:
            ValueError: labels or types of another shape than the input.
        """
        loss = context_loss(logits, *self._with_context(logits, labels, input_type_mask), _decay(self.config))
        if num_items_in_batch is None:
            return loss
        return loss * (labels[:, 1:] != IGNORED).sum() / num_items_in_batch

    def _with_context(
        self, logits: torch.Tensor, labels: torch.Tensor, types: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and types of the whole text; what is no label by its type does not count."""
        expected = (logits.shape[0], logits.shape[1] - len(self.types))
        for name, value in (("labels", labels), ("input_type_mask", types)):
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"{name} must be one for each token of the input, {expected}, got {tuple(value.shape)}."
                )
        labels = labels.to(logits.device)
        types = torch.full_like(labels, KINDS) if types is None else types.to(labels)
        last_example = -(-self.types.max() // KINDS) * KINDS
        types = torch.where(types > 0, types + last_example, types)
        labels = torch.cat([self.token_ids.to(labels).expand(len(labels), -1), labels], dim=1)
        types = torch.cat([self.types.to(labels).expand(len(labels), -1), types], dim=1)
        return labels.masked_fill(~is_label(types), IGNORED), types

    @staticmethod
    def calculate_loss(
        base_model_output: Any, labels: torch.Tensor, cpt_type_mask: torch.Tensor, config: CPTConfig
    ) -> Any:
        """Give an output of the base model its loss.

        Args:
            base_model_output: what has `logits`, (batch, tokens, vocabulary).
            labels: (batch, tokens), those of the context included; -100 for what does not count.
            cpt_type_mask: (batch, tokens), types, those of the context included.
            config: how earlier examples count.

        Returns:
            The same output with its `loss` set.
        """
        base_model_output.loss = context_loss(base_model_output.logits, labels, cpt_type_mask, _decay(config))
        return base_model_output

    # ----------------------------------------------------------------------------------------------------------- files

    @classmethod
    def promised_shapes(cls, config: CPTConfig) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeddings": (config.num_virtual_tokens, config.token_dim)}

    def prompt_to_save(self, indices: torch.Tensor) -> torch.Tensor:
        return self.embedding(indices) + projected(self.delta_embedding(indices), self.limits[indices])

    def _load_adapter_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take a prompt as E + Δ, exactly: with a Δ that may be learned from E, or else as the E of a fresh start."""
        if "prompt_embeddings" not in state_dict:
            return
        prompt = state_dict["prompt_embeddings"].to(self.embedding.weight)
        delta = prompt - self.embedding.weight
        start = prompt - delta  # E but for rounding
        fits = (start + delta == prompt) & (projected(delta, self.limits) == delta)
        delta = torch.where(fits.all(dim=-1, keepdim=True), delta, 0)
        self.embedding.weight.copy_(prompt - delta)
        self.delta_embedding.weight.copy_(delta)


def check_tokens(ids: list[int], word_embeddings: nn.Module) -> None:
    """Refuse ids that a vocabulary does not have.

    Args:
        ids: of tokens.
        word_embeddings: the base model's.

    Raises:
        ValueError: a token is none of the vocabulary's.
    """
    size = getattr(word_embeddings, "num_embeddings", None)
    outside = [] if size is None else [token for token in ids if not 0 <= token < size]
    if outside:
        raise ValueError(f"cpt_token_ids has {outside}, and the base model's vocabulary has 0 to {size - 1}.")


def projected(delta: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Rows that are too long, shortened to their limits.

    Args:
        delta: (..., width).
        limits: (...), the longest that each row may be.
    """
    norms, limits = delta.norm(dim=-1, keepdim=True), limits.unsqueeze(-1)
    return torch.where(norms > limits * (1 + ROUNDING), delta * (limits / norms), delta)


def is_kind(types: torch.Tensor, kind: int) -> torch.Tensor:
    """Which tokens are of a kind.

    Args:
        types: codes, any shape.
        kind: LABEL, INPUT_TEMPLATE, INPUT or OUTPUT_TEMPLATE.
    """
    return (types % KINDS == kind) & (types > 0)


def is_label(types: torch.Tensor) -> torch.Tensor:
    """Which tokens are labels by their types, any shape."""
    return is_kind(types, LABEL)


def context_loss(logits: torch.Tensor, labels: torch.Tensor, types: torch.Tensor, decay: float = 1.0) -> torch.Tensor:
    """The mean of w · cross entropy over the tokens that count; 0 where none does.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), -100 for what does not count.
        types: (batch, tokens), codes.
        decay: by what the labels of an example are weighted as a multiple of those of the next.
    """
    logits, labels, types = logits[:, :-1].float(), labels[:, 1:].to(logits.device), types[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    if decay != 1:
        losses = losses * example_weights(types, decay)
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


def example_weights(types: torch.Tensor, decay: float) -> torch.Tensor:
    """For each label, decay to the power of the number of later examples with labels in its row; 1 for other tokens.

    Args:
        types: (batch, tokens), codes.
        decay: from an example to the one before.

    Returns:
        (batch, tokens), float32.
    """
    codes = types.where(is_label(types), 0).unique()  # ascending, so examples come in their order
    of_code = types.unsqueeze(-1) == codes  # (batch, tokens, codes)
    exists = (of_code.any(dim=1) & is_label(codes)).long()  # (batch, codes)
    later = exists.flip(-1).cumsum(-1).flip(-1) - exists
    weights = decay ** later.float()
    labels = is_label(types)
    return torch.where(labels, (of_code * weights.unsqueeze(1)).sum(-1), 1.0)


def _decay(config: CPTConfig) -> float:
    return config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
