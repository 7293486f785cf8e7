"""Adapters in a model that `fully_shard` has spread: every process has a part of each parameter."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from workers.recipes import (
    BIASED,
    NETWORKS,
    PROMPTS,
    QUICK,
    RECIPES,
    adapted,
    all_values,
    assert_alike,
    assert_trained_alike,
    base_of,
    batches,
    is_main,
    logits_of,
    lora,
    loss_of,
    mine,
    optimizer_of,
    read_back,
    same_logits,
    takes_in_a_prompt,
    tied_llama,
    train,
    values,
    with_second,
)


def spread(model: nn.Module, **options: object) -> nn.Module:
    """The model itself, its blocks and what is left of it each a unit of FSDP2."""
    for block in model.get_base_model().model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def used(model: nn.Module) -> nn.Module:
    """The model itself, with its root left whole by a forward."""
    logits_of(model)
    return model


def quick(folder: Path) -> list[str]:
    """The plainest of it; returns what was trained."""
    for recipe in QUICK:
        trained_saved_and_loaded(recipe, folder / recipe.replace(" ", "_"))
    switched("copies")
    merged("copies")
    return list(QUICK)


def everything(folder: Path) -> list[str]:
    """What has to hold for all sorts of adapters; returns which."""
    for recipe in RECIPES:
        trained_saved_and_loaded(recipe, folder / recipe.replace(" ", "_"))
    for recipe in ("copies", "token rows", "prompt"):
        switched(recipe)
    for recipe in ("copies", "dora"):
        merged(recipe)
    return list(RECIPES)


def trained_saved_and_loaded(recipe: str, folder: Path) -> None:
    reference, model = adapted(recipe), spread(adapted(recipe))
    start, resting = values(model), values(model, trained=False)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert_alike(get_peft_model_state_dict(model), get_peft_model_state_dict(reference), exact=True)
    train(model, mine)
    assert_trained_alike(model, train(reference), start)
    assert_alike(values(model, trained=False), resting, exact=True)

    # Whole tensors, whether FSDP2 has the parameters in parts or not, and also from a state dict.
    expected = get_peft_model_state_dict(model)
    assert_alike(expected, get_peft_model_state_dict(reference))
    assert_alike(get_peft_model_state_dict(used(model)), expected, exact=True)
    for full in (True, False):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=full))
        assert_alike(get_peft_model_state_dict(model, state_dict=state), expected, exact=True)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(state) is is_main()
    if is_main():  # alone
        model.save_pretrained(folder / "from_state", state_dict=state)
    model.save_pretrained(folder, is_main_process=is_main())
    for source in (folder, folder / "from_state"):
        loaded = read_back(source, recipe)
        assert_alike(get_peft_model_state_dict(loaded), expected, exact=True)
    same_logits(loaded, reference)

    # Into a spread model: whether its parameters are parts or, after a forward, whole.
    other = get_peft_model_state_dict(adapted(recipe, seed=7))
    for target in (spread(adapted(recipe)), used(spread(adapted(recipe)))):
        result = set_peft_model_state_dict(target, other)
        assert not result.unexpected_keys
        assert_alike(get_peft_model_state_dict(target), other, exact=True)
    if recipe not in PROMPTS:
        target.load_adapter(folder, "default", is_trainable=True)
        same_logits(target, reference)
        second = train(target, mine)
        assert_trained_alike(second, train(reference), start)


def networks(folder: Path) -> list[str]:
    """A live model takes in the prompt of a file, whether its parameters are parts or whole, and learns on from there."""
    for recipe in NETWORKS.values():
        for prepare in (spread, lambda model: used(spread(model))):
            reference, model = adapted(recipe), prepare(adapted(recipe))
            takes_in_a_prompt(model, reference, recipe)
            assert_alike(values(train(model, mine)), values(train(reference)))
    return list(NETWORKS)


def switched(recipe: str) -> None:
    """Which adapter is active, and whether, may change between steps, also right after a forward."""
    reference, model = with_second(recipe), used(spread(with_second(recipe)))
    for name in ("other", "default"):
        reference.set_adapter(name)
        model.set_adapter(name)
        same_logits(model, reference)
        start, resting = values(model), values(model, trained=False)
        assert_trained_alike(train(model, mine), train(reference), start)
        assert_alike(values(model, trained=False), resting, exact=True)
    used(model)
    with model.disable_adapter(), reference.disable_adapter():
        same_logits(model, reference)
        assert values(model) == {}
        used(model)
    start = values(model)
    assert_trained_alike(train(model, mine), train(reference), start)

    # A second forward without the adapter between a forward and its backward, as preference losses have it.
    ours, theirs = optimizer_of(model), optimizer_of(reference)
    start = values(model)
    for each, share, optimizer in ((model, mine, ours), (reference, lambda ids: ids, theirs)):
        loss = loss_of(each, share(batches()[0]))
        with torch.no_grad(), each.disable_adapter():
            loss_of(each, share(batches()[1]))
        loss.backward()
        optimizer.step()
    assert_trained_alike(model, reference, start)


def merged(recipe: str) -> None:
    """Merging gives the whole result, in parts; unmerging the base weights bit for bit."""
    reference, model = adapted(recipe), used(spread(adapted(recipe)))
    before = all_values(model)
    reference.merge_adapter()
    model.merge_adapter()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    same_logits(model, reference)
    assert_alike(all_values(model), all_values(reference))
    with model.disable_adapter():  # takes what is merged out and puts it back
        assert_alike(all_values(model) | before, before, exact=True)
        with reference.disable_adapter():
            same_logits(model, reference)
    same_logits(model, reference)
    own = get_peft_model_state_dict(model)
    for state in (get_peft_model_state_dict(adapted(recipe, seed=7)), own):  # into what is merged already
        for each in (model, reference):
            set_peft_model_state_dict(each, state)
        same_logits(model, reference)
    used(model).unmerge_adapter()
    reference.unmerge_adapter()
    assert_alike(all_values(model), before, exact=True)
    start = values(model)
    assert_trained_alike(train(model, mine), train(reference), start)
    assert_alike(all_values(used(model).merge_and_unload()), all_values(reference.merge_and_unload()))


# ---------------------------------------------------------------------------------------------------------- what is more


def more(folder: Path) -> list[str]:
    """The rest; returns the methods that were trained."""
    for recipe in RECIPES:
        if recipe not in BIASED:
            switched(recipe)
            deleted(recipe)
        if recipe not in (*PROMPTS, "copies", "dora"):
            merged(recipe)
        recomputed(recipe, use_reentrant=False)
        recomputed(recipe, use_reentrant=True)
        generated(recipe)
    gradients_can_wait()
    in_half_precision()
    added_too_late(folder)
    shared_weights_are_not_merged()
    return methods()


def deleted(recipe: str) -> None:
    reference, model = with_second(recipe), used(spread(with_second(recipe)))
    if recipe in ("token rows", "tied token rows", "embedding"):
        before = all_values(model)
        with pytest.raises(
            RuntimeError, match="'default' cannot be deleted while fully_shard.* of model.embed_tokens"
        ):
            model.delete_adapter("default")
        assert set(model.peft_config) == {"default", "other"}
        assert_alike(all_values(model), before, exact=True)
        same_logits(model, reference)
        return
    for each in (reference, model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another one becomes active
            each.delete_adapter("default")
        each.set_adapter("other")
    same_logits(model, reference)
    start = values(model)
    assert_trained_alike(train(model, mine), train(reference), start)
    assert_alike(all_values(model), all_values(reference))


def recomputed(recipe: str, use_reentrant: bool) -> None:
    if recipe == "prefix":  # which fills a cache, and a cache and recomputation do not go together
        return
    reference, model = adapted(recipe), adapted(recipe)
    start = values(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_trained_alike(train(spread(model), mine), train(reference), start)


def generated(recipe: str) -> None:
    reference, model = adapted(recipe).eval(), spread(adapted(recipe)).eval()
    register_fsdp_forward_method(model, "generate")
    options = {"input_ids": batches()[0], "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**options), reference.generate(**options))


def gradients_can_wait() -> None:
    reference, model = adapted("copies"), spread(adapted("copies"))
    start = values(model)
    ours, theirs = optimizer_of(model), optimizer_of(reference)
    for ids in batches():
        model.set_requires_gradient_sync(ids is batches()[-1] or torch.equal(ids, batches()[-1]))
        loss_of(model, mine(ids)).backward()
        loss_of(reference, ids).backward()
    ours.step()
    theirs.step()
    assert_trained_alike(model, reference, start)


def in_half_precision() -> None:
    """A bfloat16 base with its adapter in float32, computing in bfloat16."""
    config = lora(modules_to_save=["lm_head"])
    model = peft.get_peft_model(base_of(RECIPES["lora"][0]).bfloat16(), config)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {torch.float32}
    model.get_submodule("base_model.model.lm_head").modules_to_save.float()
    spread(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    before, first = values(model), loss_of(model, batches()[0]).item()
    train(model, mine)
    after = values(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert all((after[name] - before[name]).abs().max() > 0 for name in before)
    assert loss_of(model, batches()[0]).item() < first
    assert {value.dtype for value in get_peft_model_state_dict(model).values()} == {torch.float32}


def added_too_late(folder: Path) -> None:
    """An adapter that comes after `fully_shard` is whole in every process: right for inference, not for training."""
    for recipe in ("copies", "token rows", "dora", "embedding", "prompt"):
        trained = train(adapted(recipe))
        place = folder / f"late_{recipe.replace(' ', '_')}"
        trained.save_pretrained(place, is_main_process=is_main())
        read_back(place, recipe)
        model = used(spread(adapted(recipe)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.load_adapter(place, "late")
        model.set_adapter("late")
        same_logits(model, trained)
        if recipe == "copies":
            with pytest.warns(
                UserWarning, match="'later' was added to a model that fully_shard.* for inference, or add"
            ):
                model.add_adapter("later", lora())
            used(model).delete_adapter("late")
    for option in ("pissa", "olora"):
        reference = base_of(RECIPES["lora"][0])
        model = spread(adapted("lora"))
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="fully_shard"):
            model.add_adapter("late", lora(init_lora_weights=option))
        model.set_adapter("late")
        torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=1e-4, atol=1e-4)
        assert all(
            isinstance(parameter, DTensor) for name, parameter in model.named_parameters() if "base_layer" in name
        )


def shared_weights_are_not_merged() -> None:
    model = peft.get_peft_model(base_of(tied_llama), lora(target_modules=["embed_tokens", "q_proj"]))
    spread(model)
    before = all_values(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            RuntimeError,
            match="model.embed_tokens cannot be merged .* and base_model.*lm_head.weight|"
            "model.embed_tokens cannot be merged .*lm_head.weight",
        ):
            merge()
    assert_alike(all_values(model), before, exact=True)
    assert isinstance(model, FSDPModule)


# ------------------------------------------------------------------------------------------------------- every method

TARGETS = ["q_proj", "v_proj"]
METHODS = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=100, init_r=4),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=20),
    "hra": lambda: peft.HRAConfig(target_modules=TARGETS, r=4),
    "ia3": lambda: peft.IA3Config(target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=2),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=4),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 5, 8]),
    "vera": lambda: peft.VeraConfig(target_modules=TARGETS[:1], r=4),
}


def methods() -> list[str]:
    for name, configure in METHODS.items():
        recipe = (RECIPES["lora"][0], configure)
        reference, model = adapted(recipe), spread(adapted(recipe))
        start = values(model)
        train(model, mine)
        try:
            assert_trained_alike(model, train(reference), start)
            assert_alike(get_peft_model_state_dict(model), get_peft_model_state_dict(reference))
            set_peft_model_state_dict(model, get_peft_model_state_dict(reference))
            model.merge_adapter()
            reference.merge_adapter()
            same_logits(model, reference)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return list(METHODS)
