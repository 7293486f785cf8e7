"""Context-aware prompt tuning: the tokens of a context in front, moved a little, and labels in both."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from prompts import (
    DECODERS,
    VOCAB,
    WAYS,
    WIDTH,
    assert_generates,
    assert_same,
    base_of,
    batch,
    gpt2,
    llama,
    move,
    ones_before,
    state_of,
    trainable,
)
from safetensors.torch import load_file
from torch import nn
from training import counted
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from peft import (
    CPTConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.cpt import CPTEmbedding
from peft.tuners.cpt.model import context_loss, example_weights, projected

pytestmark = pytest.mark.compat

IDS = [3, 4, 5, 6, 7, 8, 9, 10]
TYPES = [1, 2, 3, 4, 5, 6, 7, 8]
N = len(IDS)
EPSILON, FORMAT_EPSILON = 20.0, 10.0
"""So large that the limits, with a width of 16, are about as long as the embeddings."""
UNIT = math.sqrt(WIDTH / 2048)
LIMITS = [FORMAT_EPSILON * UNIT, EPSILON * UNIT, FORMAT_EPSILON * UNIT, 1e-10] * 2
DELTA = "prompt_encoder.default.delta_embedding.weight"


def config_for(**options):
    defaults = {
        "cpt_token_ids": IDS,
        "cpt_tokens_type_mask": TYPES,
        "opt_projection_epsilon": EPSILON,
        "opt_projection_format_epsilon": FORMAT_EPSILON,
    }
    return CPTConfig(**{"task_type": "CAUSAL_LM", **defaults, **options})


def moved(model, name="default", scale=1.0):
    """With deltas as training would make them: none for labels, none too long."""
    encoder = model.prompt_encoder[name]
    with torch.no_grad():
        torch.manual_seed(1)
        delta = scale * torch.randn_like(encoder.delta_embedding.weight)
        delta[encoder.types % 4 == 0] = 0
        encoder.delta_embedding.weight.copy_(delta)
        encoder.get_projection()
    return model


def prompted(make=llama, **options):
    return moved(get_peft_model(base_of(make), config_for(**options)).eval())


def labelled():
    """A padded batch with labels; those of padding and of one more token do not count."""
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, 2] = -100
    return {**inputs, "labels": labels}


class TestConfiguration:
    def test_the_context_says_how_many_tokens_there_are(self):
        config = CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=[3, 4],
            num_virtual_tokens=7,
            num_layers=1,
            token_dim=2,
            num_attention_heads=3,
            num_transformer_submodules=2,
        )
        assert (config.num_virtual_tokens, config.num_transformer_submodules) == (2, 1)
        assert (config.num_layers, config.token_dim, config.num_attention_heads) == (None, None, None)
        assert (config.cpt_mask, config.cpt_tokens_type_mask) == ([1, 1], [1, 1])
        assert config.is_prompt_learning is True

    def test_by_default_it_is_one_token(self):
        config = CPTConfig(task_type="CAUSAL_LM")
        assert (config.cpt_token_ids, config.cpt_mask, config.cpt_tokens_type_mask) == ([0], [1], [1])

    @pytest.mark.parametrize(
        "options, mention",
        [
            ({"task_type": "SEQ_CLS"}, "CAUSAL_LM.*'SEQ_CLS'"),
            ({"task_type": None}, "CAUSAL_LM.*None"),
            ({"cpt_mask": [1]}, "cpt_mask must have one entry for each of the 8 cpt_token_ids, got 1"),
            ({"cpt_tokens_type_mask": [1, 2]}, "cpt_tokens_type_mask must have one entry .* got 2"),
            ({"opt_weighted_loss_type": "decays"}, "none of none, decay. Did you mean 'decay'"),
            ({"opt_loss_decay_factor": -0.5}, "opt_loss_decay_factor must be .* got -0.5"),
            ({"opt_projection_epsilon": None}, "opt_projection_epsilon must be .* got None"),
            ({"opt_projection_format_epsilon": math.nan}, "opt_projection_format_epsilon must be .* got nan"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, options, mention):
        with pytest.raises(ValueError, match=mention):
            config_for(**options)

    @pytest.mark.parametrize("ids", [[3, VOCAB], [-1, 3]])
    def test_tokens_that_the_vocabulary_lacks_are_refused(self, ids):
        base = base_of(llama)
        with pytest.raises(ValueError, match=f"cpt_token_ids has .*vocabulary has 0 to {VOCAB - 1}"):
            get_peft_model(base, config_for(cpt_token_ids=ids, cpt_tokens_type_mask=[1, 4]))
        assert all(parameter.requires_grad for parameter in base.parameters())


class TestPrompt:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_starts_at_the_contexts_embeddings(self, dtype):
        base = base_of(llama).to(dtype)
        model = get_peft_model(base, config_for())
        encoder = model.prompt_encoder["default"]
        assert type(encoder) is CPTEmbedding
        assert {name: (tuple(p.shape), p.dtype) for name, p in encoder.named_parameters()} == {
            "embedding.weight": ((N, WIDTH), torch.float32),
            "delta_embedding.weight": ((N, WIDTH), torch.float32),
        }
        assert torch.equal(encoder.embedding.weight, base.get_input_embeddings().weight[IDS].float())
        assert encoder.delta_embedding.weight.count_nonzero() == 0
        assert trainable(model) == {DELTA}
        assert model(**batch()).logits.dtype == dtype

    @pytest.mark.parametrize("make", DECODERS)
    def test_unmoved_it_is_the_context_itself(self, make):
        model = get_peft_model(base_of(make), config_for()).eval()
        ids = batch(padding=(0, 0))["input_ids"]
        text = torch.cat([torch.tensor(IDS).expand(2, N), ids], dim=1)
        torch.testing.assert_close(model(ids).logits, model.base_model(text).logits)

    def test_deltas_are_added(self):
        model, inputs = prompted(), batch()
        encoder = model.prompt_encoder["default"]
        prompt = encoder.embedding.weight + encoder.delta_embedding.weight
        expected = model.base_model(
            inputs_embeds=torch.cat([prompt.expand(3, N, WIDTH), model.word_embeddings(inputs["input_ids"])], dim=1),
            attention_mask=ones_before(inputs["attention_mask"], N),
        )
        assert torch.equal(model(**inputs).logits, expected.logits)

    def test_limits_by_the_types(self):
        encoder = prompted().prompt_encoder["default"]
        torch.testing.assert_close(encoder.get_epsilon(), torch.tensor(LIMITS))
        other = prompted(cpt_token_ids=[3, 4, 5], cpt_tokens_type_mask=[0, 2, 4]).prompt_encoder["default"]
        torch.testing.assert_close(other.get_epsilon(), torch.tensor([1e-10, EPSILON * UNIT, 1e-10]))

    def test_rows_that_are_too_long_are_shortened(self):
        delta = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])
        found = projected(delta, torch.tensor([1.0, 10.0, 0.0, 0.0]))
        torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]))

    def test_projected_before_each_use_and_in_place(self):
        model, inputs = prompted(), batch()
        delta = model.prompt_encoder["default"].delta_embedding.weight
        with torch.no_grad():
            delta.normal_().mul_(100)
            delta[1] = 0
        direction = delta.detach().clone()
        output = model(**inputs).logits
        expected = torch.tensor(LIMITS).index_fill(0, torch.tensor([1]), 0)
        torch.testing.assert_close(delta.norm(dim=1), expected)
        torch.testing.assert_close(nn.functional.cosine_similarity(delta, direction)[[0, 2]], torch.ones(2))
        before = delta.detach().clone()
        assert torch.equal(model(**inputs).logits, output)
        assert torch.equal(delta, before)

    def test_saving_projects_and_changes_nothing(self):
        model = prompted()
        delta = model.prompt_encoder["default"].delta_embedding.weight
        with torch.no_grad():
            delta.normal_().mul_(100)
        before = delta.detach().clone()
        saved = model.get_prompt_embedding_to_save("default")
        assert torch.equal(delta, before)
        assert torch.equal(saved, model.get_prompt(1)[0])

    def test_a_changed_configuration_is_read_on_demand(self):
        model = prompted()
        encoder = model.prompt_encoder["default"]
        model.peft_config["default"].cpt_tokens_type_mask = [4] * N
        encoder.set_updated_tokens()
        model(**batch())
        assert encoder.delta_embedding.weight.norm(dim=1).max() < 2e-10

    def test_the_mask_of_the_context_takes_part_in_nothing(self):
        inputs = labelled()
        one, other = prompted()(**inputs), prompted(cpt_mask=[1, 0] * 4)(**inputs)
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.loss, other.loss)


def through_gpu_and_back(model):
    """What moving to another device does to a model's tensors, where there is no other device."""
    return model._apply(torch.clone)


def gradient(model):
    model.zero_grad()
    model(**labelled()).loss.backward()
    return model.get_parameter(DELTA).grad


class TestTraining:
    @pytest.mark.parametrize(
        "copied",
        [
            lambda model: model,
            copy.deepcopy,
            lambda model: pickle.loads(pickle.dumps(model)),
            through_gpu_and_back,
            lambda model: model.to(torch.float64),
        ],
        ids=["", "deepcopy", "pickle", "moved", "float64"],
    )
    def test_labels_of_the_context_get_no_gradient(self, copied):
        expected = gradient(prompted())
        found = gradient(copied(prompted()))
        assert (found.abs().sum(dim=1) > 0).tolist() == [kind % 4 != 0 for kind in TYPES]
        torch.testing.assert_close(found.float(), expected)

    def test_the_gradient_is_that_of_the_prompt(self):
        model, inputs = prompted(), labelled()
        found = gradient(model)
        prompt = model.get_prompt(1).detach().requires_grad_()
        embeds = torch.cat([prompt.expand(3, N, WIDTH), model.word_embeddings(inputs["input_ids"])], dim=1)
        logits = model.base_model(inputs_embeds=embeds, attention_mask=ones_before(inputs["attention_mask"], N)).logits
        model.prompt_encoder["default"].loss(logits, inputs["labels"]).backward()
        moves = torch.tensor([kind % 4 != 0 for kind in TYPES]).unsqueeze(1)
        torch.testing.assert_close(found, prompt.grad[0] * moves)

    def test_a_step_changes_exactly_the_deltas(self):
        model = prompted()
        before = state_of(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        model(**labelled()).loss.backward()
        optimizer.step()
        assert_same(before, state_of(model), but={DELTA})
        labels = torch.tensor(TYPES) % 4 == 0
        assert model.get_parameter(DELTA)[labels].count_nonzero() == 0

    def test_steps_make_the_labels_likelier(self):
        model = prompted(opt_projection_epsilon=1.0, opt_projection_format_epsilon=1.0)
        optimizer = torch.optim.Adam(model.prompt_encoder.parameters(), lr=0.02)
        losses = []
        for _ in range(8):
            loss = model(**labelled()).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        model(**labelled())
        limits = torch.tensor([UNIT, UNIT, UNIT, 0] * 2)
        assert (model.get_parameter(DELTA).norm(dim=1) <= limits * (1 + 2e-5)).all()

    def test_several_forwards_before_a_backward(self):
        model = prompted()
        (model(**labelled()).loss + model(**labelled()).loss).backward()
        found = model.get_parameter(DELTA).grad.clone()
        torch.testing.assert_close(found, 2 * gradient(model))

    def test_checkpointed_activations_change_no_gradient(self):
        expected = gradient(prompted().train())
        model = prompted().train()
        model.base_model.gradient_checkpointing_enable()
        assert torch.equal(gradient(model), expected)

    def test_compiles_without_a_break(self):
        model, inputs = prompted(), labelled()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


LOSSES = torch.tensor([21.0, 23.0, 29.0, 47.0, 101.0, 263.0, 749.0, 2207.0, 6581.0])
"""Of the second to the tenth token."""


def logits_with(losses):
    """Logits of two tokens, (1, tokens, 2), such that the token 0 has these losses."""
    return torch.stack([torch.zeros(len(losses) + 1), torch.cat([losses, torch.zeros(1)])], dim=-1)[None]


class TestLoss:
    @pytest.mark.parametrize(
        "types, decay, lost",
        [
            ([1, 2, 3, 4, 4, 5, 6, 7, 8, 8], 1.0, 0.0),
            ([1, 2, 3, 4, 4, 5, 6, 7, 8, 8], 0.5, 0.5 * (29 + 47)),
            ([1, 2, 3, 4, 4, 5, 6, 7, 8, 8], 0.0, 29 + 47),
            ([0, 8, 8, 0, 4, 4, 0, 0, 0, 0], 0.5, 0.5 * (47 + 101)),  # by their codes, not by their places
            ([4, 0, 8, 0, 0, 12, 0, 0, 16, 0], 0.5, 0.75 * 23 + 0.5 * 101),
            ([4, 8, 0, 0, 0, 0, 0, 0, 0, 0], 0.5, 0.0),
            ([12, 8, 4, 0, 0, 0, 0, 0, 0, 0], 0.5, 0.5 * 23),  # nothing predicts the first token
            ([-4, 0, 0, 0, 4, 0, 0, 0, 0, 0], 0.5, 0.0),
            ([0] * 10, 0.5, 0.0),
        ],
    )
    def test_is_a_weighted_mean(self, types, decay, lost):
        """Labels of the last example have the weight 1, those of each earlier one `decay` times that of the next."""
        labels = torch.zeros(1, 10, dtype=torch.long)
        found = context_loss(logits_with(LOSSES), labels, torch.tensor([types]), decay)
        torch.testing.assert_close(found, (LOSSES.sum() - lost) / 9)

    def test_what_has_no_label_does_not_count(self):
        types, labels = torch.tensor([[0, 0, 0, 4, 4, 0, 0, 8, 8, 8]]), torch.zeros(1, 10, dtype=torch.long)
        labels[0, 3] = -100
        found = context_loss(logits_with(LOSSES), labels, types, 0.5)
        torch.testing.assert_close(found, (LOSSES.sum() - 29 - 0.5 * 47) / 8)
        nothing = context_loss(logits_with(LOSSES).requires_grad_(), torch.full_like(labels, -100), types, 0.5)
        assert nothing == 0
        nothing.backward()

    def test_each_row_has_its_own_examples(self):
        types = torch.tensor([[0, 0, 4, 0, 8, 0, 12, 0], [0, 0, 4, 0, 4, 0, 8, 0]])
        expected = [[1, 1, 0.25, 1, 0.5, 1, 1, 1], [1, 1, 0.5, 1, 0.5, 1, 1, 1]]
        assert example_weights(types, 0.5).tolist() == expected

    @pytest.mark.parametrize("decay", [1.0, 0.5])
    def test_of_the_context_and_the_input(self, decay):
        options = {} if decay == 1 else {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
        model, inputs = prompted(**options), labelled()
        output = model(**inputs)
        text = torch.cat([torch.tensor(IDS).expand(3, N), inputs["labels"]], dim=1)
        log_probabilities = output.logits.log_softmax(-1)
        total, count = 0.0, 0
        for row in range(3):
            for place in range(N + 6):
                weight = {3: decay**2, 7: decay}.get(place, float(place >= N))
                if weight and text[row, place] != -100:
                    total -= weight * log_probabilities[row, place - 1, text[row, place]]
                    count += 1
        assert count == 3 * 2 + 6 + 4 + 2 - 1
        torch.testing.assert_close(output.loss, total / count)

    def test_types_of_the_input(self):
        model, inputs = prompted(), labelled()
        types = torch.tensor([[1, 2, 3, 4, 4, 4], [0, 0, 1, 4, 3, 4], [0, 0, 0, 0, 1, 4]])
        given = types.clone()
        found = model(**inputs, input_type_mask=types).loss
        assert torch.equal(types, given)
        without = inputs["labels"].masked_fill(types % 4 + (types == 0) != 0, -100)
        torch.testing.assert_close(found, model(**{**inputs, "labels": without}).loss)
        assert not torch.equal(found, model(**inputs).loss)
        torch.testing.assert_close(model(**inputs, input_type_mask=torch.full((3, 6), 4)).loss, model(**inputs).loss)

    @pytest.mark.parametrize("types", [[1, 2, 3], [1, 1, 1], [5, 6, 7]])
    def test_labels_of_the_input_count_also_after_a_context_without_labels(self, types):
        model, inputs = prompted(cpt_token_ids=[3, 4, 5], cpt_tokens_type_mask=types), labelled()
        logits = model(**inputs).logits
        labels = torch.cat([torch.full((3, 3), -100), inputs["labels"]], dim=1)
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(model(**inputs).loss, expected)

    def test_each_adapter_has_its_own(self):
        model, inputs = prompted(), labelled()
        decay = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.0}
        model.add_adapter("b", config_for(**decay))
        moved(model, "b")
        alone = get_peft_model(base_of(llama), config_for(**decay), adapter_name="b").eval()
        expected, before = moved(alone, "b")(**inputs).loss, model(**inputs).loss
        model.set_adapter("b")
        assert torch.equal(model(**inputs).loss, expected)
        assert not torch.equal(before, expected)
        model.set_adapter("default")
        assert torch.equal(model(**inputs).loss, before)

    def test_none_without_labels_and_the_base_models_where_it_is_disabled(self):
        model, inputs = prompted(), labelled()
        types = torch.full((3, 6), 4)
        assert model(**batch(), input_type_mask=types).loss is None
        with model.disable_adapter():
            found = model(**inputs, input_type_mask=types)
        expected = base_of(llama)(**inputs)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.logits, expected.logits)

    def test_in_a_tuple(self):
        model, inputs = prompted(), labelled()
        output, expected = model(**inputs, return_dict=False), model(**inputs)
        assert torch.equal(output[0], expected.loss)
        assert torch.equal(output[1], expected.logits)

    def test_from_embeddings(self):
        model, inputs = prompted(), labelled()
        embeds = model.word_embeddings(inputs.pop("input_ids"))
        assert torch.equal(model(inputs_embeds=embeds, **inputs).loss, model(**labelled()).loss)

    def test_in_half_precision_it_is_float32(self):
        model = get_peft_model(base_of(llama).to(torch.bfloat16), config_for())
        assert model(**labelled()).loss.dtype == torch.float32

    def test_batches_whose_gradients_are_added_up_have_their_shares(self):
        """As `Trainer` asks for by num_items_in_batch, the number of labels in all of them."""
        model, inputs = prompted(), labelled()
        whole = (inputs["labels"][:, 1:] != -100).sum()
        shares = []
        for row in range(3):
            part = {name: value[row : row + 1] for name, value in inputs.items()}
            own = (part["labels"][:, 1:] != -100).sum()
            shares.append(model(**part, num_items_in_batch=whole).loss)
            torch.testing.assert_close(shares[-1], model(**part).loss * own / whole)
        torch.testing.assert_close(model(**inputs, num_items_in_batch=whole).loss, model(**inputs).loss)

    def test_trainer_adds_up_gradients_so(self, tmp_path):
        model, inputs = prompted(), labelled()
        rows = [{name: value[row] for name, value in inputs.items()} for row in range(3)]
        before = model.get_parameter(DELTA).detach().clone()
        whole = counted(inputs["labels"])
        expected = torch.zeros_like(before)
        for row in rows:
            part = {name: value[None] for name, value in row.items()}
            model.zero_grad()
            model(**part, num_items_in_batch=whole).loss.backward()
            expected += model.get_parameter(DELTA).grad
        model.zero_grad()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            max_steps=1,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        sgd = torch.optim.SGD(model.prompt_encoder.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)
        Trainer(model, arguments, train_dataset=rows, optimizers=(sgd, schedule)).train()
        torch.testing.assert_close(before - model.get_parameter(DELTA), expected)

    @pytest.mark.parametrize("name", ["labels", "input_type_mask"])
    def test_of_another_shape_it_is_refused(self, name):
        with pytest.raises(ValueError, match=rf"{name} must be .*\(3, 6\), got \(3, 5\)"):
            prompted()(**{**labelled(), name: torch.ones(3, 5, dtype=torch.long)})

    def test_as_a_function_of_an_output(self):
        output = CausalLMOutput(logits=logits_with(LOSSES))
        labels, types = torch.zeros(1, 10, dtype=torch.long), torch.tensor([[0, 0, 0, 4, 4, 0, 0, 8, 8, 8]])
        config = config_for(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5)
        found = CPTEmbedding.calculate_loss(output, labels, types, config)
        assert found is output
        torch.testing.assert_close(found.loss, (LOSSES.sum() - 0.5 * (29 + 47)) / 9)


class TestGeneration:
    @pytest.mark.parametrize("way", list(WAYS))
    @pytest.mark.parametrize("make", [llama, gpt2])
    def test_is_a_forward_repeated(self, make, way):
        assert_generates(prompted(make), batch(), way)

    def test_types_of_the_input_are_of_no_effect(self):
        model, inputs = prompted(), batch()
        options = {"max_new_tokens": 3, "do_sample": False}
        found = model.generate(**inputs, **options, input_type_mask=torch.full((3, 6), 4))
        assert torch.equal(found, model.generate(**inputs, **options))


class TestFiles:
    def test_hold_the_moved_context(self, tmp_path):
        model, inputs = prompted(), labelled()
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        encoder = model.prompt_encoder["default"]
        assert saved.keys() == {"prompt_embeddings"}
        assert torch.equal(saved["prompt_embeddings"], encoder.embedding.weight + encoder.delta_embedding.weight)
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path)
        assert trainable(loaded) == {DELTA}
        output, expected = loaded(**inputs), model(**inputs)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        config = model.peft_config["default"].to_dict()
        assert loaded.peft_config["default"].to_dict() == {**config, "inference_mode": True}

    def test_may_be_made_of_a_state_dict(self):
        model, other = prompted(), prompted()
        move(other, "default")
        found = get_peft_model_state_dict(model, state_dict=other.state_dict())["prompt_embeddings"]
        assert torch.equal(found, get_peft_model_state_dict(other)["prompt_embeddings"])

    @pytest.mark.parametrize("scale", [0.1, 100.0], ids=["within the limits", "at the limits"])
    def test_loaded_into_the_adapter_of_that_name(self, scale, tmp_path):
        """As `Trainer` does with the best checkpoint: the context is what it was, and so are the deltas."""
        model, inputs = moved(prompted(), scale=scale), labelled()
        output = model(**inputs)
        before, prompt = state_of(model), model.get_prompt_embedding_to_save("default")
        model.save_pretrained(tmp_path)
        moved(model, scale=0.5)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(model.get_prompt_embedding_to_save("default"), prompt)
        assert torch.equal(model(**inputs).logits, output.logits)
        assert torch.equal(model(**inputs).loss, output.loss)
        assert trainable(model) == {DELTA}
        after = state_of(model)
        for name in before:
            torch.testing.assert_close(after[name], before[name])

    def test_a_prompt_out_of_reach_is_where_it_starts_anew(self):
        model, far = prompted(), torch.randn(N, WIDTH) * 1000
        encoder = model.prompt_encoder["default"]
        set_peft_model_state_dict(model, {"prompt_embeddings": far})
        assert torch.equal(model.get_prompt(1)[0], far)
        assert torch.equal(encoder.embedding.weight, far)
        assert encoder.delta_embedding.weight.count_nonzero() == 0

    def test_a_loaded_one_can_be_trained_on(self, tmp_path):
        model = prompted()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path)
        loaded.set_adapter("default")
        assert trainable(loaded) == {DELTA}
        torch.testing.assert_close(gradient(loaded), gradient(model))
        torch.testing.assert_close(loaded.get_parameter(DELTA), model.get_parameter(DELTA))

    @pytest.mark.parametrize(
        "value, error", [(torch.zeros(2, WIDTH), RuntimeError), (torch.full((N, WIDTH), torch.inf), ValueError)]
    )
    def test_weights_that_do_not_fit_change_nothing(self, value, error):
        model = prompted()
        before = state_of(model)
        with pytest.raises(error, match="prompt_embeddings"):
            set_peft_model_state_dict(model, {"prompt_embeddings": value})
        assert_same(before, state_of(model))
