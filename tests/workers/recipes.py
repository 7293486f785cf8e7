"""Small models, the adapters to train on them, and training by one process: what several are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from prompts import VOCAB, WIDTH, llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft
from peft.engine.sharding import without_wrappers

ROWS, TOKENS, STEPS = 4, 7, 3
# Products of matrices of other heights are summed up in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
TRAINED = 100 * CLOSE["atol"]
"""By how much at least each tensor has to change for its training to count."""


def variant_of_llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=2, **options))


def tied_llama() -> LlamaForCausalLM:
    return variant_of_llama(tie_word_embeddings=True)


def biased_llama() -> LlamaForCausalLM:
    return variant_of_llama(attention_bias=True)


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})


def prompt(cls: type[peft.PeftConfig] = peft.PromptTuningConfig, **options: Any) -> peft.PeftConfig:
    return cls(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, **options})


Recipe = tuple[Callable[[], nn.Module], Callable[[], peft.PeftConfig]]
RECIPES: dict[str, Recipe] = {
    "lora": (llama, lora),
    "copies": (llama, lambda: lora(modules_to_save=["lm_head", "norm"])),
    "token rows": (llama, lambda: lora(trainable_token_indices={"embed_tokens": [3, 5, 8]})),
    "tied token rows": (tied_llama, lambda: lora(trainable_token_indices=[3, 5, 8])),
    "own biases": (biased_llama, lambda: lora(bias="lora_only")),
    "all biases": (biased_llama, lambda: lora(bias="all")),
    "dora": (llama, lambda: lora(use_dora=True)),
    "embedding": (llama, lambda: lora(target_modules=["embed_tokens", "q_proj"])),
    "prompt": (llama, prompt),
    "prefix": (llama, lambda: prompt(peft.PrefixTuningConfig)),
}


def network(cls: type[peft.PeftConfig], **options: Any) -> Recipe:
    return llama, lambda: prompt(cls, encoder_hidden_size=6, **options)


NETWORKS: dict[str, Recipe] = {
    "p-tuning": network(peft.PromptEncoderConfig),
    "p-tuning by an LSTM": network(
        peft.PromptEncoderConfig, encoder_reparameterization_type="LSTM", encoder_dropout=0.0
    ),
    "prefix": network(peft.PrefixTuningConfig, prefix_projection=True),
}
"""Prompts that a network makes, while a file holds what it has made."""

QUICK = ("copies", "token rows", "prompt")
"""What the short tests train: factors, copies, rows of a table, and a prompt."""
BIASED = ("own biases", "all biases")
PROMPTS = ("prompt", "prefix")


def base_of(make: Callable[[], nn.Module]) -> nn.Module:
    """The same base model in every process."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # far enough from zero for gradients to matter
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.05 * torch.randn_like(parameter))
    return model


def adapted(recipe: str | Recipe, seed: int = 1) -> nn.Module:
    """A model whose adapter has values of its own."""
    make, configure = RECIPES[recipe] if isinstance(recipe, str) else recipe
    base = base_of(make)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, configure())
    move(model, "default", seed)
    return model.train()


def with_second(recipe: str) -> nn.Module:
    """The same with a second adapter, `other`, which is not active."""
    model = adapted(recipe)
    model.add_adapter("other", RECIPES[recipe][1]())
    move(model, "other", 5)
    return model.train()


def move(model: nn.Module, adapter: str, seed: int) -> None:
    """Away from where the adapter starts, where half of the gradients are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name or name.endswith(f".{adapter}"):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def batches(seed: int = 2) -> list[torch.Tensor]:
    """Token ids (rows, tokens) of every step, for all processes together."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (ROWS, TOKENS), generator=generator) for _ in range(STEPS)]


def mine(ids: torch.Tensor) -> torch.Tensor:
    """This process's rows of a batch."""
    return ids.chunk(dist.get_world_size())[dist.get_rank()]


def all_of_it(ids: torch.Tensor) -> torch.Tensor:
    return ids


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def train(
    model: nn.Module,
    share: Callable[[torch.Tensor], torch.Tensor] = all_of_it,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Take all steps, each on a share of its batch; the model itself comes back."""
    parts_again(model)
    optimizer = optimizer or optimizer_of(model)
    for ids in batches():
        optimizer.zero_grad()
        loss_of(model, share(ids)).backward()
        optimizer.step()
    return model


def parts_again(model: nn.Module) -> None:
    """What a forward without a backward leaves whole, FSDP2 has no gradients for, and no optimizer should get."""
    if hasattr(model, "reshard"):
        model.reshard()


def values(model: nn.Module, trained: bool = True) -> dict[str, torch.Tensor]:
    """The whole values of the parameters that train (or of those that do not) by their names."""
    parts_again(model)
    return {
        without_wrappers(name).removeprefix("module."): whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad is trained
    }


def all_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return values(model) | values(model, trained=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    training = model.training
    model.eval()
    result = model(input_ids=batches()[0]).logits
    model.train(training)
    return result


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], exact: bool = False) -> None:
    """The same names with the same whole tensors."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert found
    for name, value in expected.items():
        assert type(found[name]) in (torch.Tensor, nn.Parameter), f"{name} is a {type(found[name]).__name__}"
        if exact:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def assert_trained_alike(
    model: nn.Module, reference: nn.Module, start: dict[str, torch.Tensor], still: Iterable[str] = ()
) -> None:
    """The same parameters train, they are as after training by one process, and each has changed since the start."""
    expected = values(reference)
    assert_alike(values(model), expected)
    unmoved = {name for name in expected if (expected[name] - start[name]).abs().max() < TRAINED}
    assert unmoved == set(still), sorted(unmoved)


def same_logits(model: nn.Module, reference: nn.Module) -> None:
    torch.testing.assert_close(whole(logits_of(model)), logits_of(reference), **CLOSE)


def same_everywhere(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether all processes have the same values, bit for bit."""
    for name in sorted(tensors):
        here = tensors[name].detach().contiguous()
        others = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(others, here)
        if not all(torch.equal(here, other) for other in others):
            return False
    return True


def takes_in_a_prompt(model: nn.Module, reference: nn.Module, recipe: Recipe) -> None:
    """A live model, and one of a single process, take in the prompt of a file exactly, whatever their networks make."""
    other = peft.get_peft_model_state_dict(adapted(recipe, seed=7))
    here = peft.get_peft_model_state_dict(model)
    assert all((here[name] - value).abs().max() > TRAINED for name, value in other.items())
    for each in (model, reference):
        assert not peft.set_peft_model_state_dict(each, other).unexpected_keys
        assert each.training
    assert_alike(peft.get_peft_model_state_dict(model), other, exact=True)
    same_logits(model, reference)


def is_main() -> bool:
    return dist.get_rank() == 0


def read_back(folder: Path, recipe: str) -> nn.Module:
    """What one process makes of a folder that the processes have written together."""
    dist.barrier()
    return peft.PeftModel.from_pretrained(base_of(RECIPES[recipe][0]), folder)
