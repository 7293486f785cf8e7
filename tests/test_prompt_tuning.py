"""Prompt tuning: where a prompt starts, what it does to a forward, and what a file holds of it."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import transformers
from prompts import (
    DECODERS,
    TASKS,
    TWO_STACKS,
    VOCAB,
    WIDTH,
    N,
    assert_same,
    base_of,
    batch,
    config_for,
    llama,
    move,
    ones_before,
    prompted,
    state_of,
    trainable,
    two,
    weights_of,
    with_prompt,
)
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.prompt_tuning import PromptEmbedding
from peft.utils.caches import cache_argument

pytestmark = pytest.mark.compat


class TestStart:
    def test_names_and_what_is_found_out(self):
        model = prompted()
        assert type(model.prompt_encoder["default"]) is PromptEmbedding
        assert isinstance(model.prompt_encoder, nn.ModuleDict)
        assert model.transformer_backbone_name == "model"
        assert model.word_embeddings is model.base_model.get_input_embeddings()
        assert torch.equal(model.prompt_tokens["default"], torch.arange(N))
        config = model.peft_config["default"]
        assert (config.num_layers, config.token_dim, config.num_attention_heads) == (2, WIDTH, 2)
        assert config.num_transformer_submodules == 1
        live = {name for name in model.state_dict() if not name.startswith("base_model.")}
        assert live == {"prompt_encoder.default.embedding.weight", "word_embeddings.weight"}

    @pytest.mark.parametrize(
        "task, name", [("SEQ_2_SEQ_LM", "encoder"), ("SEQ_CLS", "bert"), ("FEATURE_EXTRACTION", None)]
    )
    def test_of_other_tasks(self, task, name):
        model = prompted(TASKS[task], task)
        assert model.__dict__.get("transformer_backbone_name") == name
        assert model.peft_config["default"].num_transformer_submodules == (2 if task == "SEQ_2_SEQ_LM" else 1)

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_the_prompt_for_a_batch(self, batch_size):
        model = prompted()
        weight = model.prompt_encoder["default"].embedding.weight
        assert torch.equal(model.get_prompt(batch_size), weight.expand(batch_size, N, WIDTH))

    def test_random(self):
        torch.manual_seed(0)
        expected = nn.Embedding(64, WIDTH).weight
        base = base_of(llama)
        torch.manual_seed(0)
        model = get_peft_model(base, config_for("CAUSAL_LM", num_virtual_tokens=64))
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_at_tokens_of_the_vocabulary(self, dtype):
        base = base_of(llama).to(dtype)
        model = get_peft_model(base, config_for("CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB"))
        weight = model.prompt_encoder["default"].embedding.weight
        assert weight.dtype == torch.float32
        table = base.get_input_embeddings().weight.float()
        assert all((table == row).all(dim=1).any() for row in weight)

    @pytest.mark.parametrize(
        "text, ids",
        [("a bb ccc", [3, 5]), ("a bb ccc", [3, 5, 6, 7]), ("a bb", [3, 5, 6, 3, 5, 6, 3]), ("", [3, 3])],
    )
    def test_at_a_text(self, text, ids, monkeypatch):
        asked = {}

        def from_pretrained(name, **options):
            asked.update(name=name, **options)
            return lambda text: {"input_ids": [3, *(4 + len(word) for word in text.split())]}

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
        model = prompted(
            num_virtual_tokens=len(ids),
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path="some/tokenizer",
            tokenizer_kwargs={"trust_remote_code": True, "use_fast": False},
        )
        assert asked == {"name": "some/tokenizer", "use_fast": False}
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, model.word_embeddings.weight[ids])

    @pytest.mark.parametrize(
        "options, mention",
        [
            ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, "tokenizer_name_or_path"),
            ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"}, "prompt_tuning_init_text"),
            ({"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs"),
            ({"prompt_tuning_init": "SAMPLE"}, "SAMPLE_VOCAB"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, options, mention):
        with pytest.raises(ValueError, match=mention):
            config_for("CAUSAL_LM", **options)

    @pytest.mark.parametrize("number", [None, 0, -1])
    def test_a_number_of_tokens_is_needed(self, number):
        with pytest.raises(ValueError, match="num_virtual_tokens"):
            prompted(num_virtual_tokens=number)

    def test_a_model_without_word_embeddings_is_refused_and_left_as_it_was(self):
        class Pictures(nn.Module):
            config = {"hidden_size": 4, "num_layers": 1, "num_attention_heads": 1}

            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)

        base = Pictures()
        with pytest.raises(ValueError, match="Pictures has no word embeddings"):
            get_peft_model(base, config_for("FEATURE_EXTRACTION"))
        assert all(parameter.requires_grad for parameter in base.parameters())


class TestForward:
    @pytest.mark.parametrize("make", DECODERS)
    def test_the_prompt_goes_before_the_input(self, make):
        model, inputs = prompted(make), batch()
        output = model(**inputs).logits
        assert output.shape == (3, N + 6, VOCAB)
        expected = model.base_model(
            inputs_embeds=with_prompt(model, inputs["input_ids"]), attention_mask=ones_before(inputs["attention_mask"])
        )
        assert torch.equal(output, expected.logits)

    def test_embeddings_may_be_given_instead_of_ids(self):
        model, inputs = prompted(), batch()
        embeds = model.word_embeddings(inputs["input_ids"])
        given = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        assert torch.equal(given.logits, model(**inputs).logits)

    def test_without_a_mask_none_is_made(self):
        model = prompted()
        ids = batch(padding=(0, 0))["input_ids"]
        assert torch.equal(model(ids).logits, model.base_model(inputs_embeds=with_prompt(model, ids)).logits)

    def test_virtual_tokens_have_no_labels(self):
        model, inputs = prompted(), batch()
        labels = inputs["input_ids"]
        loss = model(**inputs, labels=labels).loss
        logits = model(**inputs).logits[:, N:-1]  # the last virtual token's prediction of the first token does count
        before = model(**inputs).logits[:, N - 1 : N]
        predictions = torch.cat([before, logits], dim=1)
        expected = nn.functional.cross_entropy(predictions.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(loss, expected)

    @pytest.mark.parametrize("make", TWO_STACKS)
    @pytest.mark.parametrize("submodules", [None, 1])
    def test_with_two_stacks_the_first_tokens_go_before_the_encoders_input(self, make, submodules):
        model, inputs = prompted(make, "SEQ_2_SEQ_LM", num_transformer_submodules=submodules), batch()
        assert model.prompt_encoder["default"].embedding.weight.shape == (N if submodules == 1 else 2 * N, WIDTH)
        labels = torch.randint(3, VOCAB, (3, 4))
        output = model(**inputs, labels=labels)
        prompt = model.prompt_encoder["default"].embedding.weight[:N]
        expected = model.base_model(
            inputs_embeds=with_prompt(model, inputs["input_ids"], prompt),
            attention_mask=ones_before(inputs["attention_mask"]),
            labels=labels,
        )
        assert output.logits.shape == (3, 4, VOCAB)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)

    @pytest.mark.parametrize("task", ["SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "TOKEN_CLS"])
    def test_of_the_other_tasks(self, task):
        model, inputs = prompted(TASKS[task], task), batch()
        output = model(**inputs)[0]
        expected = model.base_model(
            inputs_embeds=with_prompt(model, inputs["input_ids"]), attention_mask=ones_before(inputs["attention_mask"])
        )[0]
        assert torch.equal(output, expected)
        lengths = {"SEQ_CLS": (3, 3), "QUESTION_ANS": (3, N + 6), "TOKEN_CLS": (3, N + 6, 3)}
        assert output.shape == lengths.get(task, (3, N + 6, WIDTH))

    def test_tokens_without_a_label_do_not_count_when_tokens_are_classified(self):
        model, inputs = prompted(TASKS["TOKEN_CLS"], "TOKEN_CLS"), batch()
        labels = torch.randint(0, 3, (3, 6))
        loss = model(**inputs, labels=labels).loss
        expected = nn.functional.cross_entropy(model(**inputs).logits[:, N:].flatten(0, 1), labels.flatten())
        torch.testing.assert_close(loss, expected)
        covering = torch.cat([torch.full((3, N), -100), labels], dim=1)
        torch.testing.assert_close(model(**inputs, labels=covering).loss, expected)

    @pytest.mark.parametrize("task", ["SEQ_CLS", "QUESTION_ANS", "TOKEN_CLS"])
    def test_virtual_tokens_are_of_the_first_type(self, task):
        model, inputs = prompted(TASKS[task], task), batch()
        types = torch.ones(3, 6, dtype=torch.long)
        expected = model.base_model(
            inputs_embeds=with_prompt(model, inputs["input_ids"]),
            attention_mask=ones_before(inputs["attention_mask"]),
            token_type_ids=torch.cat([torch.zeros(3, N, dtype=torch.long), types], dim=1),
        )[0]
        output = model(**inputs, token_type_ids=types)[0]
        assert torch.equal(output, expected)
        assert not torch.equal(output, model(**inputs)[0])

    @pytest.mark.parametrize(
        "task, name",
        [("CAUSAL_LM", "position_ids"), ("FEATURE_EXTRACTION", "token_type_ids"), ("SEQ_CLS", "position_ids")],
    )
    def test_what_does_not_cover_the_prompt_is_left_out(self, task, name):
        model, inputs = prompted(TASKS[task], task), batch()
        with pytest.warns(UserWarning, match=name):
            output = model(**inputs, **{name: torch.ones(3, 6, dtype=torch.long)})[0]
        assert torch.equal(output, model(**inputs)[0])

    def test_a_cache_holds_the_prompt_already(self):
        model = prompted()
        ids = batch(padding=(0, 0))["input_ids"]
        name = cache_argument(model.base_model.forward)
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:], attention_mask=torch.ones_like(ids), **{name: first[name]})
        assert second.logits.shape[1] == 2
        torch.testing.assert_close(second.logits, model(input_ids=ids).logits[:, -2:])

    def test_what_is_missing_or_of_another_shape_is_named(self):
        model, inputs = prompted(), batch()
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(attention_mask=inputs["attention_mask"])
        with pytest.raises(ValueError, match=r"attention_mask must be .*\(3, 1, 6, 6\)"):
            model(inputs["input_ids"], attention_mask=torch.ones(3, 1, 6, 6))

    def test_the_prompt_takes_the_inputs_dtype(self):
        model = get_peft_model(base_of(llama).to(torch.bfloat16), config_for("CAUSAL_LM"))
        assert model.prompt_encoder["default"].embedding.weight.dtype == torch.float32
        assert model(**batch()).logits.dtype == torch.bfloat16

    def test_compiles_without_a_break(self):
        model, inputs = prompted(), batch()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


SAVED = {
    "CAUSAL_LM": {"prompt_embeddings": (N, WIDTH)},
    "SEQ_2_SEQ_LM": {"prompt_embeddings": (2 * N, WIDTH)},
    "SEQ_CLS": {
        "prompt_embeddings": (N, WIDTH),
        "base_model.classifier.weight": (3, WIDTH),
        "base_model.classifier.bias": (3,),
    },
}


class TestFiles:
    @pytest.mark.parametrize("task", list(SAVED))
    def test_saved_and_loaded(self, task, tmp_path):
        model, inputs = prompted(TASKS[task], task), batch()
        if task == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = torch.ones(3, 2, dtype=torch.long)
        move(model, "default")
        model.save_pretrained(tmp_path)
        assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()} == SAVED[task]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lack")
            loaded = PeftModel.from_pretrained(base_of(TASKS[task]), tmp_path)
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
        assert trainable(loaded) == {"prompt_encoder.default.embedding.weight"}  # and no copy of a head
        assert not loaded.training
        config = model.peft_config["default"]
        assert dataclasses.replace(config, inference_mode=True).to_dict() == loaded.peft_config["default"].to_dict()

    @pytest.mark.parametrize("active", ["a", "b"])
    def test_each_adapter_has_its_own(self, active, tmp_path):
        model = two()
        model.set_adapter(active)
        model.save_pretrained(tmp_path)
        for name, tokens in (("a", N), ("b", 2)):
            saved = load_file(tmp_path / name / "adapter_model.safetensors")
            assert torch.equal(saved["prompt_embeddings"], model.prompt_encoder[name].embedding.weight)
            copies = model.base_model.classifier.modules_to_save
            assert torch.equal(saved["base_model.classifier.weight"], copies[name].weight)
            assert len(saved["prompt_embeddings"]) == tokens

    def test_loaded_beside_another(self, tmp_path):
        model, inputs = two(), batch()
        model.set_adapter("b")
        output = model(**inputs).logits
        model.save_pretrained(tmp_path)
        other = prompted(TASKS["SEQ_CLS"], "SEQ_CLS", name="x")
        before = other(**inputs).logits
        result = other.load_adapter(tmp_path / "b", adapter_name="b")
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert torch.equal(other(**inputs).logits, before)
        other.set_adapter("b", inference_mode=True)
        assert torch.equal(other(**inputs).logits, output)
        assert trainable(other) == set()

    def test_trains_on_where_the_file_left_it(self, tmp_path):
        prompted().save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
        model = PeftModel.from_pretrained(base_of(llama), tmp_path)
        model.load_adapter(tmp_path, "b")
        first, second = (model.prompt_encoder[name].embedding.weight for name in ("default", "b"))
        assert (first.requires_grad, second.requires_grad) == (True, False)
        inputs = batch()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        torch.optim.SGD([first, second], lr=0.1).step()
        assert torch.equal(first, saved - 0.1 * first.grad) and first.grad.any()
        assert torch.equal(second, saved)
        with model.disable_adapter():
            assert trainable(model) == set()
        assert trainable(model) == {"prompt_encoder.default.embedding.weight"}
        model.set_adapter("b")
        assert trainable(model) == {"prompt_encoder.b.embedding.weight"}

    def test_cannot_be_loaded_to_be_trained_on(self, tmp_path):
        prompted().save_pretrained(tmp_path)
        base = base_of(llama)
        with pytest.raises(ValueError, match="inference"):
            PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        model = get_peft_model(base, config_for("CAUSAL_LM"), adapter_name="x")
        with pytest.raises(ValueError, match="inference"):
            model.load_adapter(tmp_path, "y", is_trainable=True)
        assert list(model.peft_config) == ["x"]

    def test_loaded_into_the_adapter_of_that_name(self, tmp_path):
        model, inputs = prompted(), batch()
        output = model(**inputs).logits
        model.save_pretrained(tmp_path)
        move(model, "default")
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(model(**inputs).logits, output)
        assert trainable(model) == weights_of("default", "CAUSAL_LM")

    @pytest.mark.parametrize(
        "spoil, error, mention",
        [
            (
                lambda s: s.update(prompt_embeddings=torch.zeros(2, WIDTH)),
                RuntimeError,
                r"expected \(3, 16\), found \(2, 16\)",
            ),
            (
                lambda s: s.update({"base_model.classifier.bias": torch.zeros(4)}),
                RuntimeError,
                "base_model.classifier.bias",
            ),
            (lambda s: s["prompt_embeddings"].fill_(torch.nan), ValueError, "prompt_embeddings.*NaN"),
        ],
    )
    def test_weights_that_do_not_fit_change_nothing(self, spoil, error, mention):
        model = prompted(TASKS["SEQ_CLS"], "SEQ_CLS")
        state = {name: value.clone() + 1 for name, value in get_peft_model_state_dict(model).items()}
        spoil(state)
        before = state_of(model)
        with pytest.raises(error, match=mention):
            set_peft_model_state_dict(model, state)
        assert_same(before, state_of(model))

    def test_weights_of_another_shape_can_be_left_out(self):
        model = prompted(TASKS["SEQ_CLS"], "SEQ_CLS")
        state = {name: value + 1 for name, value in get_peft_model_state_dict(model).items()}
        state["prompt_embeddings"] = torch.zeros(2, WIDTH)
        before = state_of(model)
        with pytest.warns(UserWarning, match=r"prompt_embeddings: expected \(3, 16\)"):
            set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
        copies = {f"base_model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
        assert_same(before, state_of(model), but=copies)

    def test_what_is_missing_or_unknown_is_told(self):
        model = prompted()
        result = set_peft_model_state_dict(model, {"prompt": torch.zeros(N, WIDTH)})
        assert result.unexpected_keys == ["prompt"]
        assert "prompt_embeddings" in result.missing_keys

    @pytest.mark.parametrize("name", ["prompt_embeddings", "base_model.classifier.bias"])
    def test_a_failed_load_leaves_the_base_model_as_it_was(self, name, tmp_path):
        prompted(TASKS["SEQ_CLS"], "SEQ_CLS").save_pretrained(tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        save_file({**state, name: torch.zeros(7)}, tmp_path / "adapter_model.safetensors")
        base = base_of(TASKS["SEQ_CLS"])
        before, modules = state_of(base), str(base)
        with pytest.raises(RuntimeError, match=name):
            PeftModel.from_pretrained(base, tmp_path)
        assert_same(before, state_of(base))
        assert str(base) == modules
        assert all(parameter.requires_grad for parameter in base.parameters())
        model = get_peft_model(base_of(TASKS["SEQ_CLS"]), config_for("SEQ_CLS"), adapter_name="x")
        with pytest.raises(RuntimeError, match=name):
            model.load_adapter(tmp_path, "default")
        assert list(model.peft_config) == list(model.prompt_encoder) == ["x"]
        assert trainable(model) == weights_of("x")

    def test_values_may_come_from_a_state_dict(self):
        model = prompted(TASKS["SEQ_CLS"], "SEQ_CLS")
        full = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
        state = get_peft_model_state_dict(model, state_dict=full)
        assert state.keys() == SAVED["SEQ_CLS"].keys()
        assert all((value == 1).all() for value in state.values())

    def test_what_is_saved_is_on_the_cpu_and_has_no_history(self):
        model = prompted()
        saved = model.get_prompt_embedding_to_save("default")
        assert (saved.device.type, saved.requires_grad, saved.shape) == ("cpu", False, (N, WIDTH))
