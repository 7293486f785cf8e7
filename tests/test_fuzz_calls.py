"""Calls in any order, against a plain model of what must hold after each; see `calls` and `oracle`."""

import pytest
import torch
from calls import InjectCalls, MixedCalls, PeftCalls, PromptCalls
from fuzzing import run_machine, whole_or_not_at_all
from oracle import IA3S, IDS, LORAS, ROWS, net
from safetensors.torch import load_file, save_file

import peft
from peft import LoraConfig
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

NO_TABLE = {name: entry for name, entry in LORAS.items() if name != "table"}
NO_ROWS = {name: entry for name, entry in LORAS.items() if name != "rows"}
"""A table is adapted by LoRA or by rows, not both."""


def machine(door, recipes):
    return type(
        door.__name__, (door,), {"recipes": recipes, "can_swap": door.can_swap and recipes not in (IA3S, ROWS)}
    )


MACHINES = {
    "PeftModel, LoRA and token rows": machine(PeftCalls, NO_TABLE),
    "PeftModel, LoRA and tables": machine(PeftCalls, NO_ROWS),
    "PeftModel, IA3": machine(PeftCalls, IA3S),
    "PeftModel, token rows": machine(PeftCalls, ROWS),
    "PeftMixedModel": MixedCalls,
    "PeftModel, prompts": PromptCalls,
    "injected, LoRA and token rows": machine(InjectCalls, NO_TABLE),
    "injected, LoRA and tables": machine(InjectCalls, NO_ROWS),
    "injected, IA3": machine(InjectCalls, IA3S),
}


@pytest.mark.parametrize("few", [4, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.filterwarnings("ignore")
def test_calls_in_any_order(name, few):
    run_machine(MACHINES[name], few, steps=20)


# ------------------------------------------------------------------------------------------------- found by these calls


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def two(**options):
    """Two LoRA adapters with copies of the head, `a` active and some of its tensors frozen by hand."""
    config = LoraConfig(r=2, target_modules=["lin", "twin"], modules_to_save=["head"], **options)
    model = peft.get_peft_model(net(), config, adapter_name="a")
    model.add_adapter("b", config)
    for name, parameter in model.named_parameters():
        if "lora_A.a" in name or "modules_to_save.a.bias" in name or "tokens_delta.a" in name:
            parameter.requires_grad_(False)
    return model


ROW_OPTIONS = {"trainable_token_indices": {"embed": [1, 3]}}


@pytest.mark.parametrize("options", [{}, ROW_OPTIONS], ids=["copies", "rows"])
def test_what_was_frozen_by_hand_stays_so_when_another_adapter_comes_and_goes(options):
    model = two(**options)
    before = flags(model)
    model.add_adapter("c", LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head"], **options))
    assert {name: flag for name, flag in flags(model).items() if ".c." not in f"{name}."} == before
    model.delete_adapter("c")
    assert flags(model) == before


@pytest.mark.parametrize("options", [{}, ROW_OPTIONS], ids=["copies", "rows"])
def test_what_was_frozen_by_hand_stays_so_when_an_injection_fails(options):
    model = two(**options)
    bad = LoraConfig(r=2, target_modules=["lin", "twin", "norm"], modules_to_save=["head"], **options)
    with whole_or_not_at_all(model) as caught:
        model.add_adapter("c", bad)
    assert caught


def test_what_takes_over_from_an_adapter_that_is_deleted_while_disabled_trains_when_enabled():
    model = two()
    model.base_model.disable_adapter_layers()
    model.delete_adapter("a")
    assert not any(flags(model).values())
    model.base_model.enable_adapter_layers()
    assert {name for name, flag in flags(model).items() if flag} == {n for n in flags(model) if ".b." in f"{n}."}


def test_a_new_adapter_has_nothing_of_a_deleted_one_of_its_name_when_enabled():
    model = two()
    model.merge_adapter(["a"])
    model.base_model.disable_adapter_layers()
    model.delete_adapter("a")
    model.add_adapter("a", LoraConfig(r=2, target_modules=["lin"]))
    model.base_model.enable_adapter_layers()
    assert not any(holder.merged_adapters for _, holder in model.base_model.holders)


def test_shared_weights_that_are_merged_into_move_with_the_model():
    model = peft.get_peft_model(net(), LoraConfig(r=2, target_modules=["lin", "twin"], init_lora_weights=False))
    weight = model.base_model.model.lin.base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    layers = model.base_model.model.lin.base_layer, model.base_model.model.twin.base_layer
    assert all(layer.weight is weight for layer in layers)
    assert weight.dtype == torch.float64 and torch.equal(weight, before.double())


@pytest.mark.parametrize("mixed", [False, True])
def test_a_failed_load_takes_the_layers_of_the_new_adapter_out_again(mixed, tmp_path):
    other = peft.LoHaConfig(target_modules=["lin", "twin"]) if mixed else LoraConfig(target_modules=["conv", "twin"])
    peft.get_peft_model(net(), other).save_pretrained(tmp_path)
    state = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME)
    save_file({key: value.to(torch.int8) for key, value in state.items()}, tmp_path / SAFETENSORS_WEIGHTS_NAME)
    model = peft.get_peft_model(net(), LoraConfig(r=2, target_modules=["lin"]), adapter_name="a", mixed=mixed)
    layers = [name for name, _ in model.base_model.holders]
    with whole_or_not_at_all(model, tmp_path) as caught:
        model.load_adapter(tmp_path, "b")
    assert "int8" in str(caught[0])
    assert [name for name, _ in model.base_model.holders] == layers
    assert model.base_model.targeted_module_names == ["lin"]


@pytest.mark.parametrize("used", ["merged", "activated through the tuner"])
def test_a_failed_load_leaves_what_is_merged_and_what_is_active(used, tmp_path):
    config = LoraConfig(r=2, target_modules=["lin"], modules_to_save=["head"], init_lora_weights=False)
    model = peft.get_peft_model(net(), config, adapter_name="b")
    model.add_adapter("a", config)
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    file = tmp_path / "a" / SAFETENSORS_WEIGHTS_NAME
    save_file({**load_file(file), "base_model.model.head.weights": torch.zeros(1)}, file)
    if used == "merged":
        model.merge_adapter()
    else:
        model.base_model.set_adapter(["a"])
    with whole_or_not_at_all(model, tmp_path) as caught:
        model.load_adapter(tmp_path / "a", "default", strict=True)
    assert "nearest: base_model.model.head.weight" in str(caught[0])


def test_dora_around_another_method_merges_to_what_it_computes():
    loha = peft.LoHaConfig(r=2, target_modules=["lin"], init_weights=False)
    model = peft.get_peft_model(net(), loha, adapter_name="a", mixed=True).eval()
    dora = LoraConfig(r=2, target_modules=["lin"], use_dora=True, init_lora_weights=False)
    model.add_adapter("b", dora)
    model.set_adapter(["a", "b"])
    expected = model(IDS)
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
