"""The wrappers by themselves: what `update` and `set_adapter` make of a copy, whoever froze the original."""

import copy

import pytest
import torch
from torch import nn

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

X = torch.linspace(-1, 1, 12).view(3, 4)


def linear(frozen):
    torch.manual_seed(0)
    return nn.Linear(4, 2).requires_grad_(not frozen)


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def names(adapter):
    return {f"modules_to_save.{adapter}.weight", f"modules_to_save.{adapter}.bias"}


@pytest.mark.parametrize("frozen", [False, True])
class TestModulesToSaveWrapper:
    def test_the_first_copy_trains_and_the_original_does_not(self, frozen):
        assert trainable(ModulesToSaveWrapper(linear(frozen), "a")) == names("a")

    def test_update_adds_a_frozen_copy_while_another_is_active(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.update("b")
        assert trainable(wrapper) == names("a")
        assert wrapper.active_adapters == ["a"]

    def test_update_of_the_active_adapter_trains(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.delete_adapter("a")
        wrapper._active_adapter = ["b"]
        wrapper.update("b")
        assert trainable(wrapper) == names("b")

    def test_update_freezes_an_original_that_was_freed(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.original_module.requires_grad_(True)
        wrapper.update("b")
        assert trainable(wrapper) == names("a")

    def test_update_keeps_a_copy_that_is_there(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        kept = wrapper.modules_to_save["a"]
        wrapper.update("a")
        assert wrapper.modules_to_save["a"] is kept

    def test_set_adapter(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.update("b")
        with torch.no_grad():
            wrapper.modules_to_save["b"].weight.zero_()
        wrapper.set_adapter("b")
        assert trainable(wrapper) == names("b")
        assert torch.equal(wrapper(X), wrapper.modules_to_save["b"].bias.expand(3, 2))
        wrapper.set_adapter([])
        assert trainable(wrapper) == set()
        assert torch.equal(wrapper(X), linear(frozen)(X))

    def test_set_adapter_for_inference(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.set_adapter("a", inference_mode=True)
        assert trainable(wrapper) == set()
        wrapper.update("b")
        wrapper.set_adapter("b")
        wrapper.set_adapter("a")
        assert trainable(wrapper) == names("a")

    def test_check_set_adapter(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.update("b")
        assert wrapper.check_set_adapter("zzz") == "zzz"
        assert wrapper.check_set_adapter(["zzz", "b"]) == "b"
        assert wrapper.check_set_adapter(["zzz"]) is None
        for several in ([], ["a", "b"]):
            with pytest.raises(ValueError):
                wrapper.check_set_adapter(several)

    def test_delete_adapter(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.update("b")
        with pytest.warns(UserWarning, match="'b' becomes"):
            wrapper.delete_adapter("a")
        assert trainable(wrapper) == names("b")
        wrapper.delete_adapter("b")
        assert wrapper.active_adapters == []
        assert torch.equal(wrapper(X), linear(frozen)(X))

    def test_delete_adapter_with_the_next_ones(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        wrapper.update("b")
        wrapper.delete_adapter("a", ["b"])
        assert wrapper.active_adapters == ["b"]
        assert trainable(wrapper) == names("b")

    def test_names_on_disk(self, frozen):
        wrapper = ModulesToSaveWrapper(linear(frozen), "a")
        assert wrapper.adapter_state_dict_load_map("a") == {
            "weight": "modules_to_save.a.weight",
            "bias": "modules_to_save.a.bias",
        }
        assert wrapper.adapter_state_dict_load_map("zzz") == {}
        assert set(wrapper.adapter_state_dict("a", wrapper.state_dict())) == {"weight", "bias"}

    def test_merge_ties_and_unties(self, frozen):
        original = linear(frozen)
        other = nn.Linear(4, 2)
        other.weight = original.weight
        wrapper = ModulesToSaveWrapper(original, "a")
        with torch.no_grad():
            wrapper.modules_to_save["a"].weight.add_(1)
        wrapper.merge()
        assert torch.equal(original.weight, wrapper.modules_to_save["a"].weight)
        assert not torch.equal(original.weight, other.weight)  # what is tied to the original keeps its own
        wrapper.unmerge()
        assert original.weight is other.weight


def test_copies_that_share_a_weight_train_again_after_disabling():
    embedding = ModulesToSaveWrapper(nn.Embedding(5, 3), "a")
    head = ModulesToSaveWrapper(nn.Linear(3, 5, bias=False), "a", tied_module=embedding.modules_to_save["a"])
    shared = head.modules_to_save["a"].weight
    assert shared is embedding.modules_to_save["a"].weight
    for first, second in ((embedding, head), (head, embedding)):
        for enabled in (False, True):
            first.enable_adapters(enabled)
            second.enable_adapters(enabled)
            assert shared.requires_grad is enabled
    shared.requires_grad_(False)  # by hand, which stays
    for wrapper in (embedding, head):
        wrapper.enable_adapters(False)
    for wrapper in (embedding, head):
        wrapper.enable_adapters(True)
    assert not shared.requires_grad


def test_wrappers_are_tuner_layers():
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "a")
    assert isinstance(wrapper, BaseTunerLayer) and isinstance(wrapper, AuxiliaryTrainingWrapper)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: module])
def test_a_mixed_batch(copied):
    wrapper = ModulesToSaveWrapper(linear(False), "a")
    wrapper.update("b")
    with torch.no_grad():
        wrapper.modules_to_save["b"].weight.zero_()
    wrapper = copied(wrapper)
    mixed = wrapper(X, adapter_names=["b", "__base__", "a"])
    assert torch.allclose(mixed[0], wrapper.modules_to_save["b"](X[0]))
    assert torch.allclose(mixed[1], wrapper.original_module(X[1]))
    with pytest.raises(ValueError, match="one adapter per row"):
        wrapper(X, adapter_names=["a", "b"])
    with pytest.raises(TypeError, match="LayerNorm"):
        ModulesToSaveWrapper(nn.LayerNorm(4), "a")(X, adapter_names=["a", "a", "a"])


class TestTrainableTokensWrapper:
    def wrapper(self):
        torch.manual_seed(0)
        return TrainableTokensWrapper(nn.Embedding(5, 3), "a", token_indices=[1, 3])

    def test_names(self):
        wrapper = self.wrapper()
        assert trainable(wrapper) == {"token_adapter.trainable_tokens_delta.a"}
        assert set(wrapper.state_dict()) == {
            "token_adapter.base_layer.weight",
            "token_adapter.trainable_tokens_delta.a",
        }

    def test_the_weight_has_the_rows_in_place(self):
        wrapper = self.wrapper()
        with torch.no_grad():
            wrapper.token_adapter.trainable_tokens_delta["a"].fill_(7)
        expected = wrapper.original_module.weight.clone()
        expected[[1, 3]] = 7
        assert torch.equal(wrapper.weight, expected)
        assert torch.equal(wrapper(torch.arange(5)), expected)
        wrapper.enable_adapters(False)
        assert torch.equal(wrapper(torch.arange(5)), wrapper.original_module.weight)
        assert trainable(wrapper) == set()

    def test_update_and_set(self):
        wrapper = self.wrapper()
        wrapper.update("b", token_indices=[0])
        assert trainable(wrapper) == {"token_adapter.trainable_tokens_delta.a"}
        wrapper.set_adapter("b")
        assert trainable(wrapper) == {"token_adapter.trainable_tokens_delta.b"}
        assert wrapper.active_adapters == wrapper.token_adapter.active_adapters == ["b"]
