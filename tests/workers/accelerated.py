"""Adapters in models that accelerate has prepared: DDP, FSDP2 and FSDP1, with its own checkpoints.

Its FSDP is for accelerators; told that it has one, it does its work on CPUs too.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from workers.recipes import (
    NETWORKS,
    RECIPES,
    adapted,
    assert_alike,
    assert_trained_alike,
    batches,
    is_main,
    loss_of,
    mine,
    optimizer_of,
    read_back,
    same_logits,
    takes_in_a_prompt,
    train,
    values,
)

BLOCK = "LlamaDecoderLayer"


def accelerator(**fsdp: Any) -> Accelerator:
    AcceleratorState._reset_state(True)
    made = Accelerator(cpu=True)
    if fsdp:
        PartialState._shared_state["device"] = torch.device("cpu")  # without a number, as FSDP1 wants it
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[BLOCK],
            **{"cpu_ram_efficient_loading": False, **fsdp},
        )
        vars(made.state).update(device=torch.device("cpu"), distributed_type=DistributedType.FSDP)
    return made


def prepared(made: Accelerator, model: nn.Module) -> tuple[nn.Module, Any]:
    plugin = getattr(made.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:  # as transformers' Trainer does
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        model = made.prepare(model)
        return model, made.prepare(optimizer_of(model))
    return made.prepare(model, optimizer_of(model))


def trained(made: Accelerator, model: nn.Module) -> nn.Module:
    model, optimizer = prepared(made, model)
    take_steps(made, model, optimizer)
    return model


def take_steps(made: Accelerator, model: nn.Module, optimizer: Any) -> None:
    for ids in batches():
        made.backward(loss_of(model, mine(ids)))
        optimizer.step()
        optimizer.zero_grad()


def data_parallel_and_fsdp2(folder: Path) -> list[str]:
    for recipe in RECIPES:
        place = folder / recipe.replace(" ", "_")
        trained_saved_and_loaded(recipe, place / "ddp")
        trained_saved_and_loaded(recipe, place / "fsdp2", fsdp_version=2)
    for recipe in ("copies", "dora"):
        trained_saved_and_loaded(recipe, folder / "ram" / recipe, fsdp_version=2, cpu_ram_efficient_loading=True)
        trained_saved_and_loaded(recipe, folder / "again" / recipe, fsdp_version=2, activation_checkpointing=True)
    return list(RECIPES)


def trained_saved_and_loaded(recipe: str, folder: Path, **fsdp: Any) -> None:
    reference = adapted(recipe)
    start = values(reference)
    train(reference)
    made = accelerator(**fsdp)
    model = trained(made, adapted(recipe))
    if fsdp.get("fsdp_version") != 1:
        assert_trained_alike(model, reference, start)

    state = made.get_state_dict(model)
    inner = made.unwrap_model(model)
    inner.save_pretrained(folder, state_dict=state, is_main_process=made.is_main_process)
    loaded = read_back(folder, recipe)
    assert_alike(get_peft_model_state_dict(loaded), get_peft_model_state_dict(reference))
    same_logits(loaded, reference)
    if fsdp:
        checkpoints(recipe, reference, made, model, folder)


# torch does not load a whole state dict into a spread model in which a module has two names.
TWO_NAMES = {
    "tied token rows": "lm_head.token_adapter.trainable_tokens_delta.default",
    "prompt": "word_embeddings.weight",
}
TWO_NAMES["prefix"] = TWO_NAMES["prompt"]


def checkpoints(recipe: str, reference: nn.Module, made: Accelerator, model: nn.Module, folder: Path) -> None:
    """What accelerate's own checkpoints bring back, of the adapter alone and of everything."""
    plugin = made.state.fsdp_plugin
    for kind in (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT):
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type(kind)
        for adapter_only in (True, False):
            place = folder / f"{kind.name}_{adapter_only}"
            save_fsdp_model(plugin, made, model, place, adapter_only=adapter_only)
            target, _ = prepared(made, adapted(recipe, seed=9))
            made.backward(loss_of(target, mine(batches()[0])))  # in the middle of training
            if plugin.fsdp_version == 2 and kind is StateDictType.FULL_STATE_DICT and recipe in TWO_NAMES:
                with pytest.raises(KeyError, match=TWO_NAMES[recipe]):
                    load_fsdp_model(plugin, made, target, place, adapter_only=adapter_only)
                continue
            load_fsdp_model(plugin, made, target, place, adapter_only=adapter_only)
            same_logits(target, reference)


# ------------------------------------------------------------------------------------------------------------------ FSDP1


def fsdp1(folder: Path) -> list[str]:
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = BLOCK
    # With flat parameters only what is a module by itself can train beside what does not.
    for recipe in ("lora", "copies", "dora", "prompt"):
        flat(recipe, folder / f"{recipe}_flat", use_orig_params=False)
    for recipe in ("lora", "copies", "token rows", "dora", "own biases", "embedding", "prompt"):
        flat(recipe, folder / f"{recipe.replace(' ', '_')}", use_orig_params=True)
    inner_part()
    return ["lora", "copies", "dora", "prompt"]


def flat(recipe: str, folder: Path, use_orig_params: bool) -> None:
    reference = train(adapted(recipe))
    made = accelerator(fsdp_version=1, use_orig_params=use_orig_params)
    model = trained(made, adapted(recipe))
    expected = get_peft_model_state_dict(reference)
    # As Accelerator.get_state_dict, but without bringing tensors to the CPU, where they are: torch does not expect that.
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        state = model.state_dict()
    if is_main():  # alone
        made.unwrap_model(model).save_pretrained(folder, state_dict=state)
    loaded = read_back(folder, recipe)
    assert_alike(get_peft_model_state_dict(loaded), expected)

    assert_alike(get_peft_model_state_dict(model), expected)  # all processes together
    other = get_peft_model_state_dict(adapted(recipe, seed=7))
    result = set_peft_model_state_dict(model, other)
    assert not result.unexpected_keys
    assert_alike(get_peft_model_state_dict(model), other, exact=True)


def fsdp1_networks(folder: Path) -> list[str]:
    """A live model takes in the prompt of a file exactly, whatever its network makes, and learns on from there."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = BLOCK
    names = ("p-tuning", "prefix")  # torch's FSDP1 has no forward for an LSTM
    for recipe in map(NETWORKS.get, names):
        for use_orig_params in (False, True):
            made = accelerator(fsdp_version=1, use_orig_params=use_orig_params)
            model, optimizer = prepared(made, adapted(recipe))
            reference = adapted(recipe)
            alone = optimizer_of(reference)
            take_steps(made, model, optimizer)
            train(reference, optimizer=alone)
            takes_in_a_prompt(model, reference, recipe)
            take_steps(made, model, optimizer)
            train(reference, optimizer=alone)
            assert_alike(get_peft_model_state_dict(model), get_peft_model_state_dict(reference))
    return list(names)


def inner_part() -> None:
    """The module in FSDP1's own has no parameters to load into."""
    made = accelerator(fsdp_version=1, use_orig_params=True)
    model, _ = prepared(made, adapted("embedding"))
    state = get_peft_model_state_dict(model)
    with pytest.raises(RuntimeError, match="lora_embedding_A.* belong to an FSDP unit around this PeftModel"):
        set_peft_model_state_dict(model.module, state)
    assert isinstance(model, FullyShardedDataParallel)
    assert_alike(get_peft_model_state_dict(model), state, exact=True)
    dist.barrier()
