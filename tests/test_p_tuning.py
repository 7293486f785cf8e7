"""P-tuning: a small network makes the prompt, and a file holds what it makes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from prompts import (
    DECODERS,
    TASKS,
    TWO_STACKS,
    VOCAB,
    WAYS,
    WIDTH,
    N,
    assert_generates,
    assert_same,
    base_of,
    batch,
    gpt2,
    llama,
    move,
    ones_before,
    state_of,
    t5,
    trainable,
    with_prompt,
)
from safetensors.torch import load_file
from torch import nn

from peft import (
    PeftModel,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.p_tuning import PromptEncoder

pytestmark = pytest.mark.compat

HIDDEN = 6
MLP = {f"mlp_head.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
LSTM = {f"mlp_head.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")} | {
    f"lstm_head.{part}_l{layer}{direction}"
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for layer in (0, 1)
    for direction in ("", "_reverse")
}
NETWORKS = {"MLP": MLP, "LSTM": LSTM}


def config_for(task="CAUSAL_LM", network="MLP", **options):
    defaults = {"num_virtual_tokens": N, "encoder_hidden_size": HIDDEN}
    return PromptEncoderConfig(task_type=task, encoder_reparameterization_type=network, **{**defaults, **options})


def prompted(make=llama, task="CAUSAL_LM", network="MLP", **options):
    """With a prompt as far from 0 as embeddings are."""
    model = get_peft_model(base_of(make), config_for(task, network, **options)).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(3)
    return model


@torch.no_grad()  # an LSTM rounds otherwise where gradients are recorded
def prompt_of(model):
    return model.get_prompt(1)[0]


@torch.no_grad()
def logits_of(model, **inputs):
    return model(**batch(), **inputs).logits


def weights_of(network):
    return {f"prompt_encoder.default.{name}" for name in NETWORKS[network] | {"embedding.weight"}}


class TestNetwork:
    @pytest.mark.parametrize("network", list(NETWORKS))
    def test_names_and_shapes(self, network):
        model = prompted(network=network)
        assert type(model.prompt_encoder["default"]) is PromptEncoder
        assert trainable(model) == weights_of(network)
        shapes = {name: tuple(p.shape) for name, p in model.prompt_encoder["default"].named_parameters()}
        assert shapes["embedding.weight"] == (N, WIDTH)
        if network == "MLP":
            linears = [(HIDDEN, WIDTH), (HIDDEN, HIDDEN), (WIDTH, HIDDEN)]
            assert [shapes[f"mlp_head.{i}.weight"] for i in (0, 2, 4)] == linears
        else:
            assert shapes["lstm_head.weight_ih_l0"] == (4 * HIDDEN, WIDTH)
            assert shapes["lstm_head.weight_ih_l1_reverse"] == (4 * HIDDEN, 2 * HIDDEN)
            assert shapes["mlp_head.0.weight"] == (2 * HIDDEN, 2 * HIDDEN)
            assert shapes["mlp_head.2.weight"] == (WIDTH, 2 * HIDDEN)

    def test_an_mlp_by_hand(self):
        """E = (1, -2); relu(E + (0, 1)) = (1, 0); relu(2 of it) = (2, 0); the sum and the difference, + (0, 10)."""
        encoder = PromptEncoder(
            config_for(num_virtual_tokens=1, token_dim=2, encoder_hidden_size=2, num_transformer_submodules=1)
        )
        eye = torch.eye(2)
        layers = [(eye, [0, 1]), (2 * eye, [0, 0]), (torch.tensor([[1, 1], [1, -1]]), [0, 10])]
        with torch.no_grad():
            encoder.embedding.weight.copy_(torch.tensor([[1, -2]]))
            for linear, (weight, bias) in zip(encoder.mlp_head[::2], layers):
                linear.weight.copy_(weight)
                linear.bias.copy_(torch.tensor(bias))
        assert encoder(torch.tensor([[0]])).tolist() == [[[2.0, 12.0]]]

    def test_an_lstm_by_hand(self):
        encoder = PromptEncoder(
            config_for(network="LSTM", token_dim=WIDTH, num_transformer_submodules=1, encoder_num_layers=1)
        )
        inputs, lstm = encoder.embedding.weight, encoder.lstm_head
        halves = []
        for end, order in (("", range(N)), ("_reverse", reversed(range(N)))):
            w_in, w_hidden, b_in, b_hidden = (
                getattr(lstm, f"{name}_l0{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            hidden, cell, outputs = torch.zeros(HIDDEN), torch.zeros(HIDDEN), {}
            for token in order:
                i, f, g, o = (w_in @ inputs[token] + b_in + w_hidden @ hidden + b_hidden).chunk(4)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = outputs[token] = o.sigmoid() * cell.tanh()
            halves.append(torch.stack([outputs[token] for token in range(N)]))
        first, _, last = encoder.mlp_head
        expected = last(first(torch.cat(halves, dim=1)).relu())
        torch.testing.assert_close(encoder(torch.arange(N)[None])[0], expected)

    @pytest.mark.parametrize("network", list(NETWORKS))
    def test_starts_seed_for_seed(self, network):
        torch.manual_seed(0)
        expected = [nn.Embedding(N, WIDTH)]
        if network == "MLP":
            sizes = [(WIDTH, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, WIDTH)]
        else:
            expected.append(nn.LSTM(WIDTH, HIDDEN, 2, bidirectional=True))
            sizes = [(2 * HIDDEN, 2 * HIDDEN), (2 * HIDDEN, WIDTH)]
        expected += [nn.Linear(*size) for size in sizes]
        base = base_of(llama)
        torch.manual_seed(0)
        encoder = get_peft_model(base, config_for(network=network)).prompt_encoder["default"]
        ours = [encoder.embedding, *([encoder.lstm_head] if network == "LSTM" else []), *encoder.mlp_head[::2]]
        for module, wanted in zip(ours, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(module.parameters(), wanted.parameters(), strict=True))

    def test_is_as_wide_as_the_embeddings_by_default(self):
        model = prompted(encoder_hidden_size=None)
        assert model.prompt_encoder["default"].mlp_head[0].weight.shape == (WIDTH, WIDTH)
        assert model.peft_config["default"].encoder_hidden_size == WIDTH

    def test_an_lstm_has_layers_and_dropout(self):
        lstm = prompted(network="LSTM", encoder_num_layers=3, encoder_dropout=0.25).prompt_encoder["default"].lstm_head
        assert (lstm.num_layers, lstm.dropout, lstm.bidirectional) == (3, 0.25, True)

    @pytest.mark.parametrize("name, value", [("encoder_num_layers", 3), ("encoder_dropout", 0.5)])
    def test_an_mlp_has_neither_and_says_so(self, name, value):
        with pytest.warns(UserWarning, match=rf"{name}={value} .*'LSTM'"):
            prompted(**{name: value})
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*no effect")
            prompted()
            prompted(network="LSTM", **{name: value})

    @pytest.mark.parametrize("network", list(NETWORKS))
    def test_in_inference_mode_there_is_none(self, network):
        model = prompted(network=network, inference_mode=True)
        encoder = model.prompt_encoder["default"]
        assert [name for name, _ in encoder.named_parameters()] == ["embedding.weight"]
        assert torch.equal(prompt_of(model), encoder.embedding.weight)

    def test_an_unknown_one_is_refused_and_leaves_the_model_as_it_was(self):
        base = base_of(llama)
        with pytest.raises(ValueError, match=r"'LSTMs' is none of MLP, LSTM\. Did you mean 'LSTM'"):
            get_peft_model(base, config_for(network="LSTMs"))
        assert all(parameter.requires_grad for parameter in base.parameters())

    def test_the_choice_may_be_an_enum(self):
        model = prompted(network=PromptEncoderReparameterizationType.LSTM)
        assert trainable(model) == weights_of("LSTM")


class TestForward:
    @pytest.mark.parametrize("network", list(NETWORKS))
    @pytest.mark.parametrize("make", DECODERS)
    def test_the_prompt_goes_before_the_input(self, make, network):
        model, inputs = prompted(make, network=network), batch()
        labels = inputs["input_ids"]
        output = model(**inputs, labels=labels)
        expected = model.base_model(
            inputs_embeds=with_prompt(model, inputs["input_ids"], model.get_prompt(1)[0]),
            attention_mask=ones_before(inputs["attention_mask"]),
            labels=torch.cat([torch.full((3, N), -100), labels], dim=1),
        )
        assert output.logits.shape == (3, N + 6, VOCAB)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)

    @pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
    def test_of_the_other_tasks(self, task):
        model, inputs = prompted(TASKS[task], task), batch()
        labels = {
            "SEQ_CLS": {"labels": torch.tensor([0, 1, 2])},
            "TOKEN_CLS": {"labels": torch.arange(18).view(3, 6) % 3},
            "QUESTION_ANS": {"start_positions": torch.tensor([3, 4, 5]), "end_positions": torch.tensor([5, 5, 6])},
            "FEATURE_EXTRACTION": {},
        }[task]
        output = model(**inputs, **labels)
        if task == "TOKEN_CLS":
            labels = {"labels": torch.cat([torch.full((3, N), -100), labels["labels"]], dim=1)}
        expected = model.base_model(
            inputs_embeds=with_prompt(model, inputs["input_ids"], model.get_prompt(1)[0]),
            attention_mask=ones_before(inputs["attention_mask"]),
            **labels,
        )
        assert all(torch.equal(output[name], expected[name]) for name in expected)
        assert ("loss" in output) == bool(labels)

    @pytest.mark.parametrize("network", list(NETWORKS))
    @pytest.mark.parametrize("make", TWO_STACKS)
    def test_with_two_stacks_the_first_tokens_go_before_the_encoders_input(self, make, network):
        model, inputs = prompted(make, "SEQ_2_SEQ_LM", network), batch()
        assert prompt_of(model).shape == (2 * N, WIDTH)
        labels = torch.randint(3, VOCAB, (3, 4))
        output = model(**inputs, labels=labels)
        expected = model.base_model(
            inputs_embeds=with_prompt(model, inputs["input_ids"], model.get_prompt(1)[0, :N]),
            attention_mask=ones_before(inputs["attention_mask"]),
            labels=labels,
        )
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)

    @pytest.mark.parametrize("network", list(NETWORKS))
    def test_the_gradient_reaches_every_weight(self, network):
        model, inputs = prompted(network=network), batch()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        encoder = model.prompt_encoder["default"]
        assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())

    def test_takes_the_inputs_dtype(self):
        model = get_peft_model(base_of(llama).to(torch.bfloat16), config_for())
        assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
        assert model(**batch()).logits.dtype == torch.bfloat16

    def test_compiles_without_a_break(self):
        model, inputs = prompted(), batch()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)


class TestGeneration:
    @pytest.mark.parametrize("way", list(WAYS))
    @pytest.mark.parametrize("make, network", [(llama, "MLP"), (gpt2, "LSTM")])
    def test_is_a_forward_repeated(self, make, network, way):
        assert_generates(prompted(make, network=network), batch(), way)

    @pytest.mark.parametrize("way", list(WAYS))
    def test_with_two_stacks_is_a_forward_repeated(self, way):
        assert_generates(prompted(t5, "SEQ_2_SEQ_LM"), batch(), way)


class TestFiles:
    @pytest.mark.parametrize("network", list(NETWORKS))
    @pytest.mark.parametrize("make, task", [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
    def test_hold_the_prompt_and_not_the_network(self, make, task, network, tmp_path):
        model, inputs = prompted(make, task, network), {}
        if task == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = torch.ones(3, 2, dtype=torch.long)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert saved.keys() == {"prompt_embeddings"}
        assert torch.equal(saved["prompt_embeddings"], prompt_of(model))
        loaded = PeftModel.from_pretrained(base_of(make), tmp_path)
        assert [n for n, _ in loaded.prompt_encoder.named_parameters()] == ["default.embedding.weight"]
        assert trainable(loaded) == {"prompt_encoder.default.embedding.weight"}
        assert torch.equal(logits_of(loaded, **inputs), logits_of(model, **inputs))
        config = model.peft_config["default"]
        assert dataclasses.replace(config, inference_mode=True).to_dict() == loaded.peft_config["default"].to_dict()

    def test_are_without_dropout(self):
        model = prompted(network="LSTM", encoder_dropout=0.5)
        expected = prompt_of(model)
        model.train()
        assert not torch.equal(prompt_of(model), expected)
        assert torch.equal(get_peft_model_state_dict(model)["prompt_embeddings"], expected)
        assert model.prompt_encoder["default"].training

    def test_may_be_made_of_a_state_dict(self):
        model, other = prompted(), prompted()
        move(other, "default")
        state = get_peft_model_state_dict(model, state_dict=other.state_dict())
        assert torch.equal(state["prompt_embeddings"], prompt_of(other))
        assert not torch.equal(prompt_of(model), prompt_of(other))

    @pytest.mark.parametrize("network", list(NETWORKS))
    def test_a_loaded_prompt_can_be_trained_itself(self, network, tmp_path):
        prompted(network=network).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(base_of(llama), tmp_path)
        model.set_adapter("default")
        assert trainable(model) == {"prompt_encoder.default.embedding.weight"}


def loss_of(model):
    return model(**batch(), labels=batch()["input_ids"]).loss


class TestLoadedIntoAnAdapterThatTrains:
    """As `Trainer` does with the best checkpoint: the network cannot be in the file, and the prompt is right."""

    @pytest.fixture(params=list(NETWORKS))
    def network(self, request):
        return request.param

    @pytest.fixture
    def saved(self, network, tmp_path):
        """A model that has moved on since it was saved, the folder, and what was saved."""
        model = prompted(network=network)
        model.save_pretrained(tmp_path)
        prompt = prompt_of(model)
        move(model, "default")
        assert not torch.equal(prompt_of(model), prompt)
        return model, tmp_path, prompt

    def test_it_gives_exactly_the_loaded_prompt(self, saved, network):
        model, folder, prompt = saved
        result = model.load_adapter(folder, "default", is_trainable=True)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert torch.equal(prompt_of(model), prompt)
        assert torch.equal(get_peft_model_state_dict(model)["prompt_embeddings"], prompt)
        assert torch.equal(logits_of(model), logits_of(PeftModel.from_pretrained(base_of(llama), folder)))
        assert trainable(model) == weights_of(network)

    def test_training_goes_on_through_the_network(self, saved, network):
        model, folder, prompt = saved
        optimizer = torch.optim.SGD(model.prompt_encoder.parameters(), lr=0.01)
        model.load_adapter(folder, "default", is_trainable=True)
        before, first = state_of(model), loss_of(model)
        first.backward()
        optimizer.step()
        assert_same(before, state_of(model), but=weights_of(network))
        assert not torch.equal(prompt_of(model), prompt)
        assert loss_of(model) < first

    def test_what_is_learned_is_what_the_network_learns(self, saved):
        model, folder, prompt = saved
        before = prompt_of(model)
        model.load_adapter(folder, "default", is_trainable=True)
        encoder = model.prompt_encoder["default"]
        with torch.no_grad():
            encoder.mlp_head[-1].bias.add_(1)
        torch.testing.assert_close(prompt_of(model), prompt + 1)
        torch.testing.assert_close(encoder.compute(torch.arange(N)[None])[0], before + 1)

    def test_it_can_be_loaded_again_and_saved_again(self, saved, tmp_path):
        model, folder, prompt = saved
        model.load_adapter(folder, "default", is_trainable=True)
        move(model, "default")
        moved = prompt_of(model)
        model.save_pretrained(tmp_path / "again")
        model.load_adapter(folder, "default", is_trainable=True)
        assert torch.equal(prompt_of(model), prompt)
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path / "again")
        assert torch.equal(prompt_of(loaded), moved)

    def test_dropout_takes_no_part(self, tmp_path):
        model = prompted(network="LSTM", encoder_dropout=0.5)
        state = get_peft_model_state_dict(model)
        move(model, "default")
        model.train()
        set_peft_model_state_dict(model, state)
        assert model.prompt_encoder["default"].training
        assert torch.equal(prompt_of(model.eval()), state["prompt_embeddings"])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, saved, copied):
        model, folder, prompt = saved
        model.load_adapter(folder, "default", is_trainable=True)
        twin = copied(model)
        assert torch.equal(prompt_of(twin), prompt)
        move(twin, "default")
        assert torch.equal(prompt_of(model), prompt)

    def test_a_state_dict_of_the_whole_model_has_it(self, saved, network):
        model, folder, prompt = saved
        fresh = prompted(network=network)
        before, start = state_of(fresh), prompt_of(fresh)
        model.load_adapter(folder, "default", is_trainable=True)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(prompt_of(fresh), prompt)
        fresh.load_state_dict(before)
        assert torch.equal(prompt_of(fresh), start)

    def test_weights_that_do_not_fit_change_nothing(self, saved):
        model, _, _ = saved
        before = state_of(model)
        with pytest.raises(RuntimeError, match=r"prompt_embeddings: expected \(3, 16\), found \(2, 16\)"):
            set_peft_model_state_dict(model, {"prompt_embeddings": torch.zeros(2, WIDTH)})
        assert_same(before, state_of(model))
