"""Adapters in a model that DeepSpeed's ZeRO-3 has partitioned: a parameter is empty unless its module is at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import check_deepspeed_zero3_enabled, gather_params_ctx
from workers.recipes import (
    NETWORKS,
    RECIPES,
    adapted,
    assert_alike,
    assert_trained_alike,
    base_of,
    batches,
    is_main,
    lora,
    loss_of,
    mine,
    move,
    optimizer_of,
    read_back,
    same_logits,
    takes_in_a_prompt,
    train,
    values,
)

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1e9,  # never; it clips at 1 by itself
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
# Its own kernel for messages between processes would be compiled first; gloo does as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def everything(folder: Path) -> list[str]:
    """All that follows; returns what was trained."""
    enabled = HfDeepSpeedConfig(CONFIG)  # transformers asks whether it lives
    assert check_deepspeed_zero3_enabled()
    deepspeed.init_distributed("gloo")
    for recipe in RECIPES:
        try:
            trained_saved_and_loaded(recipe, folder / recipe.replace(" ", "_"))
        except AssertionError as error:
            raise AssertionError(f"{recipe}: {error}") from error
    for option in ("pissa", "olora"):
        started_from_the_base_weight(option)
    for recipe in ("copies", "token rows", "dora"):
        merged(recipe)
    del enabled
    return list(RECIPES)


def partitioned(model: nn.Module) -> nn.Module:
    """The base model in parts before it is adapted, as `from_pretrained` leaves it."""
    deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return model


def adapted_in_parts(recipe: str, seed: int = 1) -> nn.Module:
    """As `adapted`, on a base that is partitioned already."""
    make, configure = RECIPES[recipe]
    base = partitioned(base_of(make))
    torch.manual_seed(seed)
    model = get_peft_model(base, configure())
    assert all(parameter.numel() for name, parameter in model.named_parameters() if ".default" in name)
    move(model, "default", seed)
    return model.train()


def engine_of(model: nn.Module) -> Any:
    return deepspeed.initialize(model=model, config=CONFIG, optimizer=optimizer_of(model))[0]


def trained(model: nn.Module) -> Any:
    engine = engine_of(model)
    take_steps(engine)
    return engine


def take_steps(engine: Any) -> None:
    for ids in batches():
        engine.backward(loss_of(engine, mine(ids)))
        engine.step()


def trained_saved_and_loaded(recipe: str, folder: Path) -> None:
    reference = adapted(recipe)
    start = values(reference)
    model = adapted_in_parts(recipe)
    assert_alike(get_peft_model_state_dict(model), get_peft_model_state_dict(reference), exact=True)
    engine = trained(model)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    train(reference)
    with gather_params_ctx(list(model.parameters()), modifier_rank=None):
        assert_trained_alike(model, reference, start)

    # All processes together, or one alone with a state dict that DeepSpeed has put together.
    expected = get_peft_model_state_dict(model)
    assert_alike(expected, get_peft_model_state_dict(reference))
    state = engine._zero3_consolidated_16bit_state_dict()
    if is_main():
        model.save_pretrained(folder / "from_state", state_dict=state)
    model.save_pretrained(folder, is_main_process=is_main())
    for source in (folder, folder / "from_state"):
        loaded = read_back(source, recipe)
        assert_alike(get_peft_model_state_dict(loaded), expected, exact=True)
    same_logits(loaded, reference)
    same_logits(engine, reference)

    other = get_peft_model_state_dict(adapted(recipe, seed=7))
    result = set_peft_model_state_dict(model, other)
    assert not result.unexpected_keys
    assert_alike(get_peft_model_state_dict(model), other, exact=True)
    engine.destroy()


def networks(folder: Path) -> list[str]:
    """A live model takes in the prompt of a file, and learns on from there."""
    enabled = HfDeepSpeedConfig(CONFIG)
    deepspeed.init_distributed("gloo")
    for recipe in NETWORKS.values():
        make, configure = recipe
        model = partitioned(base_of(make))
        torch.manual_seed(1)
        model = get_peft_model(model, configure())
        move(model, "default", 1)
        reference = adapted(recipe)
        alone, engine = optimizer_of(reference), engine_of(model.train())
        take_steps(engine)
        train(reference, optimizer=alone)
        takes_in_a_prompt(model, reference, recipe)
        take_steps(engine)
        train(reference, optimizer=alone)
        assert_alike(get_peft_model_state_dict(model), get_peft_model_state_dict(reference))
        engine.destroy()
    del enabled
    return list(NETWORKS)


def started_from_the_base_weight(option: str) -> None:
    """Initialisations that decompose the base weight, and take away from it what the adapter has."""
    config = lora(init_lora_weights=option)
    reference = get_peft_model(base_of(RECIPES["lora"][0]), config)
    model = get_peft_model(partitioned(base_of(RECIPES["lora"][0])), config)
    with gather_params_ctx(list(model.parameters()), modifier_rank=None):
        torch.testing.assert_close(dict(model.named_parameters()), dict(reference.named_parameters()))


def merged(recipe: str) -> None:
    """Merging gives the whole result, in parts; unmerging the base weights bit for bit."""
    reference, model = adapted(recipe), adapted_in_parts(recipe)
    engine = engine_of(model)
    before = get_peft_model_state_dict(model)
    for each in (reference, model):
        each.merge_adapter()
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    same_logits(engine, reference)
    other = get_peft_model_state_dict(adapted(recipe, seed=7))
    for state in (other, before):  # what is merged already
        for each in (reference, model):
            set_peft_model_state_dict(each, state)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        same_logits(engine, reference)
    for each in (reference, model):
        each.unmerge_adapter()
    same_logits(engine, reference)
    assert_alike(get_peft_model_state_dict(model), before, exact=True)
    engine.destroy()
