"""LoRA+ (arXiv 2402.12354): the factor B learns faster than A."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from ..peft_model import PeftModel
from ..tuners.lora.layer import Embedding

EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
"""Optimisers of bitsandbytes with a state in 8 bits, which embeddings do not train well with."""


def create_loraplus_optimizer(
    model: PeftModel, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> torch.optim.Optimizer:
    """An optimiser in which B, biases and norms learn `loraplus_lr_ratio` times as fast as A (arXiv 2402.12354).

    The paper's advice is a ratio above 1, of about 16 where the task is hard, with `lr` below that of plain LoRA.

    Args:
        model: a model with a LoRA adapter.
        optimizer_cls: the optimiser to make.
        lr: learning rate of A, and of everything else that is neither B nor one-dimensional.
        loraplus_lr_ratio: learning rate of B over that of A.
        kwargs: further arguments of the optimiser, and `loraplus_weight_decay` (0.0), which biases and norms are free
            from, and `loraplus_lr_embedding` (1e-6), the learning rate of both factors of an embedding.

    Returns:
        An `optimizer_cls` with four groups: A, embeddings, B, and what is not decayed. A group may be empty.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    kwargs["lr"] = lr
    a, embedding, b, b_without_decay = _by_role(model)
    groups = [
        {"params": a, "weight_decay": decay, "lr": lr},
        {"params": embedding, "weight_decay": decay, "lr": embedding_lr},
        {"params": b, "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        {"params": b_without_decay, "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    optimizer = optimizer_cls(groups, **kwargs)
    if optimizer_cls.__name__ in EIGHT_BIT:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _by_role(model: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """The trainable parameters: A and others, embeddings', B, and B or one-dimensional ones that are not decayed."""
    decayed = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    a: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    b_without_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(_owner(model, name), Embedding):
            embedding.append(parameter)
        elif "lora_B" in name or parameter.dim() == 1:
            (b if name in decayed else b_without_decay).append(parameter)
        else:
            a.append(parameter)
    return a, embedding, b, b_without_decay


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    """The layer that has `name` in one of its containers; None at the top of the model."""
    path = name.rsplit(".", 2)[0] if name.count(".") > 1 else ""
    return model.get_submodule(path) if path else None


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
