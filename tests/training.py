"""Small models, texts and tokenizers for the tests that train with client libraries."""

from __future__ import annotations

import re

import torch
from prompts import VOCAB
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from versions import is_at_least

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IN_CHECKPOINT = {WEIGHTS, CONFIG, "README.md"}
"""What an adapter's checkpoint holds of the model."""

OF_THE_RUN = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
"""What a Trainer adds to a checkpoint."""


def rows(number=16, tokens=8, labels=True):
    """Rows of token ids, each its own label, as a Trainer takes them."""
    ids = torch.randint(3, VOCAB, (number, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, **({"labels": row} if labels else {})} for row in ids]


def counted(labels: torch.Tensor) -> torch.Tensor:
    """By how many labels a Trainer divides a language model's loss.

    Each row's first is not predicted from any token; the Trainer counted it all the same until transformers 5.10.
    """
    return ((labels[..., 1:] if is_at_least("transformers", "5.10") else labels) != -100).sum()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def kinds(names) -> set[str]:
    """Names without what says where in the model they are."""
    return {re.sub(r"^(.*layers\.\d+\.|(base_model\.|model\.)*)", "", name) for name in names}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_file(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different


class Gradients(TrainerCallback):
    """Keeps the gradients of a step."""

    def __init__(self):
        self.values = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.values = {name: p.grad.clone() for name, p in trained}
