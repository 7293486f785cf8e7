"""Multitask prompt tuning: a prompt that tasks share, times a matrix of low rank for each task."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
import transformers
from prompts import (
    DECODERS,
    NEW,
    TASKS,
    TWO_STACKS,
    VOCAB,
    WAYS,
    WIDTH,
    WITH_ASSISTANT,
    N,
    assert_generates,
    assert_same,
    base_of,
    batch,
    generate,
    gpt2,
    llama,
    move,
    new_tokens_by_hand,
    ones_before,
    state_of,
    t5,
    trainable,
)
from safetensors.torch import load_file, save_file
from torch import nn

from peft import (
    MultitaskPromptTuningConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding, MultitaskPromptTuningInit
from peft.tuners.prompt_tuning import PromptTuningInit
from peft.utils.caches import cache_argument

pytestmark = pytest.mark.compat

NUM_TASKS, RANK = 3, 2
NAMES = {"prefix_task_cols", "prefix_task_rows", "embedding.weight"}
ON_DISK = {
    "prompt_embeddings": (N, WIDTH),
    "prefix_task_cols": (NUM_TASKS, N, RANK),
    "prefix_task_rows": (NUM_TASKS, RANK, WIDTH),
}


def config_for(task="CAUSAL_LM", **options):
    defaults = {"num_virtual_tokens": N, "num_tasks": NUM_TASKS, "num_ranks": RANK}
    return MultitaskPromptTuningConfig(task_type=task, **{**defaults, **options})


def prompted(make=llama, task="CAUSAL_LM", **options):
    model = get_peft_model(base_of(make), config_for(task, **options)).eval()
    torch.manual_seed(1)
    move(model, "default")
    return model


def tasked():
    return {**batch(), "task_ids": torch.tensor([2, 0, 2])}


def prompts_of(model, task_ids):
    """(batch, tokens, width): P * (U_t V_t)."""
    encoder = model.prompt_encoder["default"]
    matrices = [encoder.prefix_task_cols[task] @ encoder.prefix_task_rows[task] for task in task_ids]
    return torch.stack([encoder.embedding.weight * matrix for matrix in matrices])


def embedded(model, ids, prompts):
    return torch.cat([prompts, model.word_embeddings(ids)], dim=1)


class TestPrompt:
    def test_names_and_shapes(self):
        model = prompted()
        encoder = model.prompt_encoder["default"]
        assert type(encoder) is MultitaskPromptEmbedding
        assert {name: tuple(p.shape) for name, p in encoder.named_parameters()} == {
            "embedding.weight": (N, WIDTH),
            "prefix_task_cols": (NUM_TASKS, N, RANK),
            "prefix_task_rows": (NUM_TASKS, RANK, WIDTH),
        }
        assert trainable(model) == {f"prompt_encoder.default.{name}" for name in NAMES}

    def test_starts_seed_for_seed(self):
        base = base_of(llama)
        torch.manual_seed(0)
        encoder = get_peft_model(base, config_for()).prompt_encoder["default"]
        torch.manual_seed(0)
        assert torch.equal(encoder.embedding.weight, nn.Embedding(N, WIDTH).weight)
        assert torch.equal(encoder.prefix_task_cols, 0.02 * torch.randn(NUM_TASKS, N, RANK))
        assert torch.equal(encoder.prefix_task_rows, 0.02 * torch.randn(NUM_TASKS, RANK, WIDTH))

    def test_by_hand(self):
        """Two tokens of width 2, two tasks of rank 1: P = ((1, 2), (3, 4)), U_1 V_1 = (1, -1)ᵀ (10, 100)."""
        config = config_for(num_virtual_tokens=2, token_dim=2, num_tasks=2, num_ranks=1, num_transformer_submodules=1)
        encoder = MultitaskPromptEmbedding(config, nn.Embedding(5, 2))
        with torch.no_grad():
            encoder.embedding.weight.copy_(torch.tensor([[1, 2], [3, 4]]))
            encoder.prefix_task_cols.copy_(torch.tensor([[[0], [0]], [[1], [-1]]]))
            encoder.prefix_task_rows.copy_(torch.tensor([[[7, 7]], [[10, 100]]]))
        found = encoder(torch.arange(2).expand(2, 2), torch.tensor([1, 0]))
        assert found.tolist() == [[[10, 200], [-30, -400]], [[0, 0], [0, 0]]]

    def test_at_a_text(self, monkeypatch):
        tokenizer = lambda text: {"input_ids": [5, 6]}  # noqa: E731
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
        options = {"prompt_tuning_init_text": "a text", "tokenizer_name_or_path": "some/tokenizer"}
        model = get_peft_model(base_of(llama), config_for(prompt_tuning_init="TEXT", **options))
        table = model.word_embeddings.weight
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, table[[5, 6, 5]])

    @pytest.mark.parametrize("start", ["SAMPLE_VOCAB", PromptTuningInit.SAMPLE_VOCAB])
    def test_at_tokens_of_the_vocabulary(self, start):
        model = get_peft_model(base_of(llama), config_for(prompt_tuning_init=start))
        table = model.word_embeddings.weight
        assert all((table == row).all(dim=1).any() for row in model.prompt_encoder["default"].embedding.weight)

    @pytest.mark.parametrize(
        "options, mention",
        [
            ({"prompt_tuning_init": "AVERAGE"}, "AVERAGE_SOURCE_TASKS"),
            ({"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path"),
            ({"num_tasks": 0}, "num_tasks must be a positive number, got 0"),
            ({"num_ranks": None}, "num_ranks must be a positive number, got None"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, options, mention):
        with pytest.raises(ValueError, match=mention):
            config_for(**options)


class TestForward:
    @pytest.mark.parametrize("make", DECODERS)
    def test_each_row_has_the_prompt_of_its_task(self, make):
        model, inputs = prompted(make), batch()
        labels, task_ids = inputs["input_ids"], torch.tensor([2, 0, 2])
        output = model(**inputs, task_ids=task_ids, labels=labels)
        expected = model.base_model(
            inputs_embeds=embedded(model, labels, prompts_of(model, task_ids)),
            attention_mask=ones_before(inputs["attention_mask"]),
            labels=torch.cat([torch.full((3, N), -100), labels], dim=1),
        )
        assert output.logits.shape == (3, N + 6, VOCAB)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)
        others = model(**inputs, task_ids=torch.tensor([2, 1, 2])).logits
        assert [torch.equal(a, b) for a, b in zip(output.logits, others)] == [True, False, True]

    @pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
    def test_of_the_other_tasks(self, task):
        model, inputs = prompted(TASKS[task], task), batch()
        labels = {
            "SEQ_CLS": {"labels": torch.tensor([0, 1, 2])},
            "TOKEN_CLS": {"labels": torch.arange(18).view(3, 6) % 3},
            "QUESTION_ANS": {"start_positions": torch.tensor([3, 4, 5]), "end_positions": torch.tensor([5, 5, 6])},
            "FEATURE_EXTRACTION": {},
        }[task]
        task_ids = torch.tensor([2, 0, 1])
        output = model(**inputs, **labels, task_ids=task_ids)
        if task == "TOKEN_CLS":
            labels = {"labels": torch.cat([torch.full((3, N), -100), labels["labels"]], dim=1)}
        expected = model.base_model(
            inputs_embeds=embedded(model, inputs["input_ids"], prompts_of(model, task_ids)),
            attention_mask=ones_before(inputs["attention_mask"]),
            **labels,
        )
        for name in expected:
            torch.testing.assert_close(output[name], expected[name])
        assert ("loss" in output) == bool(labels)

    @pytest.mark.parametrize("make", TWO_STACKS)
    def test_with_two_stacks_each_has_half_of_the_prompt(self, make):
        model, inputs = prompted(make, "SEQ_2_SEQ_LM"), batch()
        labels, task_ids = torch.randint(3, VOCAB, (3, 4)), torch.tensor([2, 0, 1])
        prompts = model.get_prompt(3, task_ids=task_ids)
        assert prompts.shape == (3, 2 * N, WIDTH)
        torch.testing.assert_close(prompts, prompts_of(model, task_ids))
        start = torch.full((3, 1), model.config.decoder_start_token_id)
        expected = model.base_model(
            inputs_embeds=embedded(model, inputs["input_ids"], prompts[:, :N]),
            attention_mask=ones_before(inputs["attention_mask"]),
            decoder_inputs_embeds=embedded(model, torch.cat([start, labels[:, :-1]], dim=1), prompts[:, N:]),
            labels=torch.cat([torch.full((3, N), -100), labels], dim=1),
        )
        output = model(**inputs, labels=labels, task_ids=task_ids)
        assert output.logits.shape == (3, N + 4, VOCAB)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)

    def test_with_two_stacks_the_encoder_alone_may_have_one(self):
        model, inputs = prompted(t5, "SEQ_2_SEQ_LM", num_transformer_submodules=1), batch()
        labels, task_ids = torch.randint(3, VOCAB, (3, 4)), torch.tensor([2, 0, 1])
        expected = model.base_model(
            inputs_embeds=embedded(model, inputs["input_ids"], model.get_prompt(3, task_ids=task_ids)),
            attention_mask=ones_before(inputs["attention_mask"]),
            labels=labels,
        )
        output = model(**inputs, labels=labels, task_ids=task_ids)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)

    def test_a_step_trains_what_the_tasks_of_the_batch_use(self):
        model, inputs = prompted(), batch()
        before = state_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**inputs, task_ids=torch.tensor([2, 0, 2]), labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        assert_same(before, state_of(model), but={f"prompt_encoder.default.{name}" for name in NAMES})
        cols = model.prompt_encoder["default"].prefix_task_cols
        old = before["prompt_encoder.default.prefix_task_cols"]
        assert [torch.equal(a, b) for a, b in zip(cols, old)] == [False, True, False]

    def test_one_task_for_all_rows(self):
        model, inputs = prompted(), batch()
        expected = model(**inputs, task_ids=torch.tensor([1, 1, 1])).logits
        for one in (torch.tensor([1]), [1], [1, 1, 1]):
            assert torch.equal(model(**inputs, task_ids=one).logits, expected)

    @pytest.mark.parametrize(
        "task_ids, also, mention",
        [
            (None, ValueError, r"needs task_ids.*below num_tasks=3"),
            (torch.tensor([0, 1]), RuntimeError, r"each of 3 rows, got the shape \(2,\)"),
            (torch.tensor([0, 1, 3]), IndexError, r"from 0 to 2; got \[0, 1, 3\]"),
            (torch.tensor([0, 1, -1]), IndexError, r"from 0 to 2; got \[0, 1, -1\]"),
        ],
        ids=str,
    )
    def test_tasks_that_there_are_not_are_refused(self, task_ids, also, mention):
        model, inputs = prompted(), batch()
        with pytest.raises(ValueError, match=mention) as caught:
            model(**inputs, task_ids=task_ids)
        assert isinstance(caught.value, also)
        with pytest.raises(ValueError, match=mention):
            model.generate(**inputs, task_ids=task_ids)

    def test_disabled_no_task_is_asked_for(self):
        model, inputs = prompted(), batch()
        expected = base_of(llama)(**inputs).logits
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)
            assert torch.equal(model(**inputs, task_ids=torch.tensor([0, 0, 0])).logits, expected)

    def test_compiles_without_a_break(self):
        model, inputs = prompted(), tasked()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


class TestGeneration:
    @pytest.mark.parametrize("way", list(WAYS))
    @pytest.mark.parametrize("make", [llama, gpt2])
    def test_is_a_forward_repeated(self, make, way):
        assert_generates(prompted(make), tasked(), way)

    @pytest.mark.parametrize("way", list(WAYS))
    @pytest.mark.parametrize("submodules", [2, 1])
    def test_with_two_stacks_is_a_forward_repeated(self, submodules, way):
        model = prompted(t5, "SEQ_2_SEQ_LM", num_transformer_submodules=submodules)
        assert_generates(model, tasked(), way)

    def test_goes_on_from_a_cache(self):
        model, inputs = prompted(), tasked()
        name = cache_argument(model.base_model.forward)
        options = {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}
        first = model.generate(**inputs, return_dict_in_generate=True, **options)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long)], dim=1)
        inputs = {"input_ids": first.sequences, "attention_mask": mask, "task_ids": inputs["task_ids"]}
        expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **{name: first[name]}, **options), expected)

    def test_an_assistant_drafts_for_a_task(self):
        model, inputs = prompted(), {**batch(padding=(0,)), "task_ids": torch.tensor([2])}
        expected = new_tokens_by_hand(model, inputs)
        assistant = {"assistant_model": base_of(llama), **WITH_ASSISTANT}
        drafted = generate(model, **inputs, **assistant)
        assert drafted[:, -NEW:].tolist() == expected.tolist()
        other = generate(model, **{**inputs, "task_ids": torch.tensor([0])}, **assistant)
        assert not torch.equal(other, drafted)


class TestFiles:
    def test_hold_the_prompt_and_the_factors(self, tmp_path):
        model, inputs = prompted(), tasked()
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {name: tuple(value.shape) for name, value in saved.items()} == ON_DISK
        encoder = model.prompt_encoder["default"]
        assert torch.equal(saved["prompt_embeddings"], encoder.embedding.weight)
        assert torch.equal(saved["prefix_task_rows"], encoder.prefix_task_rows)
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path)
        assert trainable(loaded) == {f"prompt_encoder.default.{name}" for name in NAMES}
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        config = model.peft_config["default"]
        assert dataclasses.replace(config, inference_mode=True).to_dict() == loaded.peft_config["default"].to_dict()

    def test_hold_the_head_beside_it(self, tmp_path):
        model, inputs = prompted(TASKS["SEQ_CLS"], "SEQ_CLS"), tasked()
        model.save_pretrained(tmp_path)
        head = {f"base_model.classifier.{part}" for part in ("weight", "bias")}
        assert load_file(tmp_path / "adapter_model.safetensors").keys() == ON_DISK.keys() | head
        loaded = PeftModel.from_pretrained(base_of(TASKS["SEQ_CLS"]), tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    def test_loaded_into_the_adapter_of_that_name(self, tmp_path):
        model, inputs = prompted(), tasked()
        output, flags = model(**inputs).logits, trainable(model)
        model.save_pretrained(tmp_path)
        move(model, "default")
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(model(**inputs).logits, output)
        assert trainable(model) == flags

    def test_may_be_made_of_a_state_dict(self):
        model, other = prompted(), prompted()
        move(other, "default")
        found = get_peft_model_state_dict(model, state_dict=other.state_dict())
        expected = get_peft_model_state_dict(other)
        assert found.keys() == expected.keys() == ON_DISK.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert not any(value.requires_grad for value in found.values())

    @pytest.mark.parametrize("name", list(ON_DISK))
    @pytest.mark.parametrize(
        "spoil, error, mention",
        [
            (lambda value: value[..., :1], RuntimeError, "expected .* found .*, 1\\)"),
            (lambda value: value * torch.nan, ValueError, "NaN"),
        ],
    )
    def test_weights_that_do_not_fit_change_nothing(self, name, spoil, error, mention):
        model = prompted()
        before = state_of(model)
        state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
        state[name] = spoil(state[name])
        with pytest.raises(error, match=mention):
            set_peft_model_state_dict(model, state)
        assert_same(before, state_of(model))

    def test_what_is_missing_is_told(self):
        model = prompted()
        state = get_peft_model_state_dict(model)
        del state["prefix_task_rows"]
        assert "prefix_task_rows" in set_peft_model_state_dict(model, state).missing_keys


def write(folder, state, form):
    path = os.fspath(folder / f"weights.{form}")
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    return path


def started(path, start, **options):
    options = {"prompt_tuning_init": start, "prompt_tuning_init_state_dict_path": path, **options}
    return get_peft_model(base_of(llama), config_for(**options)).prompt_encoder["default"]


class TestStartFromSourceTasks:
    @pytest.fixture
    def source(self):
        """The weights of three source tasks."""
        return get_peft_model_state_dict(prompted())

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    @pytest.mark.parametrize("num_tasks", [1, 2])
    @pytest.mark.parametrize(
        "start, task, chosen",
        [
            ("AVERAGE_SOURCE_TASKS", 0, lambda factor: factor.mean(dim=0)),
            (MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS, 0, lambda factor: factor.mean(dim=0)),
            ("EXACT_SOURCE_TASK", 0, lambda factor: factor[0]),
            ("EXACT_SOURCE_TASK", 2, lambda factor: factor[2]),
        ],
    )
    def test_of_the_prompt_and_the_factors(self, source, start, task, chosen, num_tasks, form, tmp_path):
        path = write(tmp_path, source, form)
        encoder = started(path, start, num_tasks=num_tasks, prompt_tuning_init_task=task)
        assert torch.equal(encoder.embedding.weight, source["prompt_embeddings"])
        for name in ("prefix_task_cols", "prefix_task_rows"):
            found = getattr(encoder, name)
            assert len(found) == num_tasks
            assert all(torch.equal(factor, chosen(source[name])) for factor in found)
            assert found.requires_grad

    def test_of_the_prompt_alone(self, source, tmp_path):
        path = write(tmp_path, {"prompt_embeddings": source["prompt_embeddings"]}, "safetensors")
        torch.manual_seed(0)
        encoder = started(path, "ONLY_SOURCE_SHARED")
        torch.manual_seed(0)
        random = get_peft_model(base_of(llama), config_for()).prompt_encoder["default"]
        assert torch.equal(encoder.embedding.weight, source["prompt_embeddings"])
        assert encoder.prefix_task_cols.shape == random.prefix_task_cols.shape
        assert 0 < encoder.prefix_task_cols.abs().max() < 0.1

    def test_a_saved_adapter_is_a_source(self, tmp_path):
        model = prompted()
        model.save_pretrained(tmp_path)
        encoder = started(os.fspath(tmp_path / "adapter_model.safetensors"), "EXACT_SOURCE_TASK", num_tasks=1)
        assert torch.equal(encoder.prefix_task_cols[0], model.prompt_encoder["default"].prefix_task_cols[0])

    def test_half_precision_becomes_float32(self, source, tmp_path):
        path = write(tmp_path, {name: value.half() for name, value in source.items()}, "safetensors")
        encoder = started(path, "AVERAGE_SOURCE_TASKS", num_tasks=1)
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}

    def test_in_inference_mode_no_file_is_read(self):
        encoder = started("/nowhere.safetensors", "EXACT_SOURCE_TASK", inference_mode=True)
        assert encoder.prefix_task_cols.shape == (NUM_TASKS, N, RANK)

    @pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
    def test_a_file_is_needed(self, start, tmp_path):
        with pytest.raises(ValueError, match=f"'{start}' needs prompt_tuning_init_state_dict_path"):
            started(None, start)
        for form in ("safetensors", "bin"):
            with pytest.raises(FileNotFoundError):
                started(os.fspath(tmp_path / f"nothing.{form}"), start)

    @pytest.mark.parametrize("task", [3, -1, None])
    def test_the_task_must_be_one_of_the_source(self, source, task, tmp_path):
        path = write(tmp_path, source, "bin")
        with pytest.raises(ValueError, match=f"prompt_tuning_init_task={task} is none of the 3 tasks .* 0 to 2"):
            started(path, "EXACT_SOURCE_TASK", prompt_tuning_init_task=task)

    @pytest.mark.parametrize(
        "spoil, mention",
        [
            (lambda s: s.pop("prefix_task_rows"), r"lacks 'prefix_task_rows' \(nearest: 'prefix_task_cols'\)"),
            (lambda s: s.update(prompt_embeddings=torch.zeros(2, WIDTH)), r"expected .*\(3, 16\), found .*\(2, 16\)"),
            (
                lambda s: s.update(prefix_task_cols=torch.zeros(3, N, 1)),
                r"expected .*\(tasks, 3, 2\), found .*\(3, 3, 1\)",
            ),
            (lambda s: s.update(prefix_task_cols=torch.zeros(0, N, RANK)), r"expected .*\(tasks, 3, 2\)"),
            (lambda s: s.update(prefix_task_cols=torch.zeros(2, N, RANK)), "2 tasks in prefix_task_cols and 3"),
            (lambda s: s.update(prompt_embeddings=torch.zeros(N, WIDTH).long()), "floating point numbers.*int64"),
            (lambda s: s["prefix_task_rows"].fill_(torch.nan), "prefix_task_rows.*NaN"),
        ],
    )
    def test_a_file_that_does_not_fit_changes_nothing(self, source, spoil, mention, tmp_path):
        source = {name: value.clone() for name, value in source.items()}
        spoil(source)
        base = base_of(llama)
        before = state_of(base)
        options = {
            "prompt_tuning_init": "AVERAGE_SOURCE_TASKS",
            "prompt_tuning_init_state_dict_path": write(tmp_path, source, "safetensors"),
        }
        with pytest.raises(ValueError, match=mention):
            get_peft_model(base, config_for(**options))
        assert_same(before, state_of(base))
        assert all(parameter.requires_grad for parameter in base.parameters())

    def test_nothing_but_tensors_is_unpickled(self, tmp_path):
        class Code:
            def __reduce__(self):
                return (os.mkdir, (os.fspath(tmp_path / "ran"),))

        path = write(tmp_path, {"prompt_embeddings": Code()}, "bin")
        with pytest.raises(ValueError, match="cannot be read as weights of source tasks"):
            started(path, "ONLY_SOURCE_SHARED")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [[torch.zeros(N, WIDTH)], {"prompt_embeddings": 1}])
    def test_something_else_is_refused(self, content, tmp_path):
        with pytest.raises(ValueError, match="no dictionary of tensors"):
            started(write(tmp_path, content, "bin"), "ONLY_SOURCE_SHARED")

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_a_broken_file_is_refused(self, form, tmp_path):
        path = tmp_path / f"weights.{form}"
        path.write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="cannot be read as weights of source tasks"):
            started(os.fspath(path), "ONLY_SOURCE_SHARED")
