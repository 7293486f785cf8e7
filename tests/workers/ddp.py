"""Adapters in `DistributedDataParallel`: every process has the whole model, and gradients are averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.nn.parallel import DistributedDataParallel

import peft
from workers.recipes import (
    QUICK,
    RECIPES,
    adapted,
    all_values,
    assert_alike,
    assert_trained_alike,
    batches,
    is_main,
    loss_of,
    mine,
    move,
    optimizer_of,
    read_back,
    same_everywhere,
    same_logits,
    train,
    values,
    with_second,
)


def quick(folder: Path) -> list[str]:
    """The plainest of it; returns what was trained."""
    for recipe in QUICK:
        trained_saved_and_loaded(recipe, folder / recipe.replace(" ", "_"))
    others_rest()
    return list(QUICK)


def everything(folder: Path) -> list[str]:
    """All that follows; returns what was trained."""
    for recipe in RECIPES:
        trained_saved_and_loaded(recipe, folder / recipe.replace(" ", "_"))
    the_first_process_says_how_it_starts()
    gradients_can_wait()
    recomputed(use_reentrant=False)
    recomputed(use_reentrant=True)
    others_rest()
    whoever_is_activated_later_needs_a_new_wrapper()
    return list(RECIPES)


def trained_saved_and_loaded(recipe: str, folder: Path) -> None:
    reference, model = adapted(recipe), adapted(recipe)
    start, resting = values(model), values(model, trained=False)
    train(reference)
    parallel = DistributedDataParallel(model)  # find_unused_parameters is False
    train(parallel, mine)
    assert_trained_alike(parallel, reference, start)
    assert_alike(values(model, trained=False), resting, exact=True)
    assert same_everywhere(values(model))

    parallel.module.save_pretrained(folder, is_main_process=is_main())
    loaded = read_back(folder, recipe)
    same_logits(loaded, reference)
    assert_alike(peft.get_peft_model_state_dict(loaded), peft.get_peft_model_state_dict(model), exact=True)


def the_first_process_says_how_it_starts() -> None:
    first, model = adapted("copies", seed=1), adapted("copies", seed=1 if is_main() else 2)
    start = values(first)
    assert same_everywhere(values(model)) is False
    parallel = DistributedDataParallel(model)
    assert_alike(values(model), start, exact=True)
    assert_trained_alike(train(parallel, mine), train(first), start)


def gradients_can_wait() -> None:
    """`no_sync`: gradients of several batches add up before they are averaged."""
    reference, model = adapted("copies"), adapted("copies")
    start = values(model)
    parallel = DistributedDataParallel(model)
    ours, theirs = optimizer_of(parallel), optimizer_of(reference)
    *early, last = batches()
    with parallel.no_sync():
        for ids in early:
            loss_of(parallel, mine(ids)).backward()
    loss_of(parallel, mine(last)).backward()
    for ids in batches():
        loss_of(reference, ids).backward()
    ours.step()
    theirs.step()
    assert_trained_alike(parallel, reference, start)


def recomputed(use_reentrant: bool) -> None:
    reference, model = adapted("copies"), adapted("copies")
    start = values(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_trained_alike(train(DistributedDataParallel(model), mine), train(reference), start)


def others_rest() -> None:
    """An inactive adapter, and one that is loaded for inference, cost DDP nothing and stay as they are."""
    reference, model = with_second("copies"), with_second("copies")
    for each in (reference, model):
        each.add_adapter("third", peft.LoraConfig(target_modules=["q_proj", "up_proj"], inference_mode=True))
        move(each, "third", 6)
        each.base_model.set_adapter("third", inference_mode=True)
        each.set_adapter("default")
    start, resting = values(model), values(model, trained=False)
    assert {name for name in start if "other" in name or "third" in name} == set()
    assert_trained_alike(train(DistributedDataParallel(model), mine), train(reference), start)
    assert_alike(values(model, trained=False), resting, exact=True)


def whoever_is_activated_later_needs_a_new_wrapper() -> None:
    """DDP averages the gradients of what trained when it was made; it says nothing about others."""
    reference, model = with_second("copies"), with_second("copies")
    before = all_values(model)
    for each in (reference, model):
        each.set_adapter("other")
    train(DistributedDataParallel(model), mine)
    assert_trained_alike(model, train(reference), before)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="DistributedDataParallel is not needed when"):
        DistributedDataParallel(model)
    assert same_everywhere(values(model))
