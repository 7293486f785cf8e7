"""The life of prompts, and of the copies of heads beside them, through `PeftModel`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from prompts import (
    HEADS,
    TASKS,
    VOCAB,
    WIDTH,
    N,
    assert_same,
    base_of,
    batch,
    config_for,
    move,
    prompted,
    state_of,
    trainable,
    two,
    weights_of,
)

from peft import (
    get_peft_model,
)

pytestmark = pytest.mark.compat


class TestLifeCycle:
    @pytest.mark.parametrize("task", list(TASKS))
    @pytest.mark.parametrize("frozen", [False, True])
    def test_exactly_the_adapter_trains(self, task, frozen):
        base = base_of(TASKS[task]).requires_grad_(not frozen)
        model = get_peft_model(base, config_for(task), adapter_name="a")
        heads = {"QUESTION_ANS": {f"base_model.qa_outputs.modules_to_save.a.{part}" for part in ("weight", "bias")}}
        assert trainable(model) == weights_of("a", task) | heads.get(task, set())

    @pytest.mark.parametrize("task", ["CAUSAL_LM", *HEADS])
    def test_in_inference_mode_nothing_trains_until_it_is_set(self, task):
        model = prompted(TASKS[task], task, name="a", inference_mode=True)
        assert trainable(model) == set()
        model.set_adapter("a")
        assert trainable(model) == weights_of("a", task)

    @pytest.mark.parametrize("task", ["CAUSAL_LM", *HEADS])
    def test_a_second_adapter_waits(self, task):
        model, inputs = prompted(TASKS[task], task, name="a"), batch()
        output = model(**inputs)[0]
        model.add_adapter("b", config_for(task, num_virtual_tokens=2))
        assert model.active_adapter == "a"
        assert model.active_adapters == ["a"]
        assert trainable(model) == weights_of("a", task)
        assert torch.equal(model(**inputs)[0], output)

    @pytest.mark.parametrize("task", ["CAUSAL_LM", *HEADS])
    def test_the_one_that_is_set_is_used_and_trains(self, task):
        model, inputs = two(task), batch()
        before, output = state_of(model), model(**inputs)[0]
        model.set_adapter("b")
        assert trainable(model) == weights_of("b", task)
        assert not torch.equal(model(**inputs)[0][..., :3], output[..., :3])
        model.set_adapter("a", inference_mode=True)
        assert trainable(model) == set()
        assert torch.equal(model(**inputs)[0], output)
        assert_same(before, state_of(model))

    def test_where_the_active_adapter_has_no_copy_the_original_is_used(self):
        model = prompted(name="a")
        model.add_adapter("b", config_for("CAUSAL_LM", modules_to_save=["lm_head"]))
        move(model, "b")
        head = model.base_model.lm_head
        assert head.module_in_use() is head.original_module
        assert trainable(model) == weights_of("a", "CAUSAL_LM")
        model.set_adapter("b")
        assert head.module_in_use() is head.modules_to_save["b"]
        copy_name = "base_model.lm_head.modules_to_save.b.weight"
        assert trainable(model) == weights_of("b", "CAUSAL_LM") | {copy_name}

    def test_a_copy_of_the_embeddings_is_looked_up_in(self):
        model, inputs = prompted(name="a", modules_to_save=["embed_tokens"]), batch()
        output = model(**inputs).logits
        with torch.no_grad():
            model.base_model.model.embed_tokens.modules_to_save["a"].weight.neg_()
        assert not torch.equal(model(**inputs).logits, output)
        model(**inputs).logits.sum().backward()
        assert model.base_model.model.embed_tokens.modules_to_save["a"].weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("name", ["c", ""])
    def test_an_unknown_name_changes_nothing(self, name):
        model = two()
        flags = trainable(model)
        with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
            model.set_adapter(name)
        with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
            model.delete_adapter(name)
        assert trainable(model) == flags
        with pytest.raises(TypeError):
            model.set_adapter(["a", "b"])
        with pytest.raises(TypeError):
            model.set_requires_grad("a")

    @pytest.mark.parametrize("task", ["CAUSAL_LM", *HEADS])
    def test_disabled_it_is_the_base_model(self, task):
        model, inputs = two(task), batch()
        expected = base_of(TASKS[task])(**inputs)[0]
        output, flags = model(**inputs)[0], trainable(model)
        with model.disable_adapter():
            assert torch.equal(model(**inputs)[0], expected)
            assert trainable(model) == set()
            with model.disable_adapter():
                assert torch.equal(model(**inputs)[0], expected)
            assert torch.equal(model(**inputs)[0], expected)
        assert torch.equal(model(**inputs)[0], output)
        assert trainable(model) == flags
        with pytest.raises(RuntimeError, match="oh"), model.disable_adapter():
            raise RuntimeError("oh")
        assert torch.equal(model(**inputs)[0], output)
        assert trainable(model) == flags

    def test_what_was_frozen_by_hand_stays_frozen(self):
        model = two()
        model.prompt_encoder["a"].embedding.weight.requires_grad_(False)
        flags = trainable(model)
        with model.disable_adapter():
            pass
        assert trainable(model) == flags == weights_of("a") - {"prompt_encoder.a.embedding.weight"}

    def test_set_while_disabled(self):
        model = two()
        with model.disable_adapter():
            model.set_adapter("b")
            assert trainable(model) == set()
        assert trainable(model) == weights_of("b")
        assert model.base_model.classifier.module_in_use() is model.base_model.classifier.modules_to_save["b"]

    @pytest.mark.parametrize("task", ["CAUSAL_LM", *HEADS])
    def test_a_step_changes_exactly_the_active_adapter(self, task):
        model, inputs = two(task), batch()
        labels = {"CAUSAL_LM": inputs["input_ids"], "SEQ_CLS": torch.tensor([0, 1, 2])}
        before = state_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**inputs, labels=labels.get(task, torch.ones(3, 6, dtype=torch.long))).loss.backward()
        optimizer.step()
        assert_same(before, state_of(model), but=weights_of("a", task))

    def test_checkpointed_activations_change_no_gradient(self):
        gradients = []
        for checkpointed in (False, True):
            model = prompted().train()
            if checkpointed:
                model.base_model.gradient_checkpointing_enable()
            model(**batch(), labels=batch()["input_ids"]).loss.backward()
            gradients.append(model.prompt_encoder["default"].embedding.weight.grad)
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("deleted, left", [("a", "b"), ("b", "a")])
    def test_deleting(self, deleted, left, recwarn):
        model, inputs = two(), batch()
        model.delete_adapter(deleted)
        assert [str(w.message).count("becomes the active") for w in recwarn if "deleted" in str(w.message)] == (
            [1] if deleted == "a" else []
        )
        assert model.active_adapter == left
        assert list(model.peft_config) == list(model.prompt_encoder) == list(model.prompt_tokens) == [left]
        assert [name for name in model.state_dict() if f".{deleted}." in name] == []
        assert trainable(model) == weights_of(left)
        assert model(**inputs).logits.shape == (3, 3)

    def test_the_one_that_was_added_first_takes_over(self):
        model = prompted(name="c")
        for name in ("b", "a"):
            model.add_adapter(name, config_for("CAUSAL_LM"))
        with pytest.warns(UserWarning, match="'c' was deleted; 'b' becomes the active"):
            model.delete_adapter("c")
        assert model.active_adapter == "b"
        assert trainable(model) == weights_of("b", "CAUSAL_LM")

    def test_without_any_it_is_the_base_model(self):
        model, inputs = prompted(TASKS["SEQ_CLS"], "SEQ_CLS", name="a"), batch()
        move(model, "a")
        model.delete_adapter("a")
        assert model.active_adapters == []
        assert trainable(model) == set()
        assert torch.equal(model(**inputs).logits, base_of(TASKS["SEQ_CLS"])(**inputs).logits)
        model.add_adapter("b", config_for("SEQ_CLS"))
        model.set_adapter("b")
        assert trainable(model) == weights_of("b")
        assert torch.equal(
            model.base_model.classifier.modules_to_save["b"].weight, base_of(TASKS["SEQ_CLS"]).classifier.weight
        )

    @pytest.mark.parametrize(
        "name, options, mention",
        [
            ("a", {}, "already"),
            ("x.y", {}, "x_y"),
            ("b", {"num_virtual_tokens": -1}, "num_virtual_tokens"),
            ("b", {"modules_to_save": ["encoder.layer"]}, "ModuleList"),
        ],
    )
    def test_an_adapter_that_cannot_be_added_leaves_no_trace(self, name, options, mention):
        model = prompted(TASKS["SEQ_CLS"], "SEQ_CLS", name="a")
        before, flags, modules = state_of(model), trainable(model), str(model)
        with pytest.raises((ValueError, TypeError), match=mention):
            model.add_adapter(name, config_for("SEQ_CLS", **options))
        assert_same(before, state_of(model))
        assert (trainable(model), str(model), list(model.peft_config)) == (flags, modules, ["a"])
        model.add_adapter("b", config_for("SEQ_CLS"))
        model.set_adapter("b")
        assert trainable(model) == weights_of("b")

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, copied):
        model, inputs = two(), batch()
        model.set_adapter("b")
        twin = copied(model)
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
        assert trainable(twin) == trainable(model)
        twin.set_adapter("a")
        assert trainable(twin) == weights_of("a")
        assert trainable(model) == weights_of("b")

    @pytest.mark.parametrize("name", ["merge", "plan", "r"])
    def test_a_name_that_is_a_method_of_ours(self, name):
        model = prompted(name=name)
        assert list(model.prompt_encoder) == [name]
        assert trainable(model) == weights_of(name, "CAUSAL_LM")
        assert model(**batch()).logits.shape == (3, N + 6, VOCAB)

    def test_there_is_nothing_to_merge(self):
        model = prompted()
        assert not hasattr(model, "merge_and_unload")
        assert model.supports_lora_conversion() is False
        assert model.get_base_model() is model.base_model
        assert model.get_nb_trainable_parameters()[0] == N * WIDTH
