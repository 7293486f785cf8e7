"""What a family of prompt encoders may declare, shown by toys, and the helpers of prompt learning."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from prompts import (
    NEW,
    TWO_STACKS,
    VOCAB,
    N,
    base_of,
    batch,
    config_for,
    continued_by_hand,
    generate,
    greedy,
    llama,
    move,
    ones_before,
    prompted,
    trainable,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    T5Config,
)

from peft import (
    PeftModel,
    PeftType,
    get_peft_model_state_dict,
)
from peft.engine.encoders import BasePromptEncoder
from peft.tuners.prompt_tuning import PromptEmbedding
from peft.utils.caches import cache_argument, cached_length
from peft.utils.prompts import _prepare_prompt_learning_config, create_attention_mask, shift_tokens_right
from peft.utils.registry import METHODS, method

pytestmark = pytest.mark.compat


def distilbert():
    """A model whose attention layers know no cache."""
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, dim=16, hidden_dim=24, n_layers=1, n_heads=2, dropout=0.0)
    )


class Open(BertForSequenceClassification):
    """A head that hands on what it does not know."""


class Closed(Open):
    """One that does not, as heads of older libraries."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        return super().forward(input_ids, attention_mask=attention_mask, return_dict=return_dict)


def head(cls):
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return cls(config)


# What a family of encoders may declare. Each toy stands in for the encoder of prompt tuning.


class Keys(BasePromptEncoder):
    """A prompt of keys and values for two layers with one head of the width 8."""

    fills_cache = True

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.num_virtual_tokens, 2 * 2 * 8)

    def forward(self, indices):
        return self.embedding(indices)

    def cache(self, prompt, base_model, config, max_cache_len=None, into=None):
        filled = DynamicCache() if into is None else into
        for layer, (keys, values) in enumerate(prompt.unflatten(-1, (2, 2, 1, 8)).permute(2, 3, 0, 4, 1, 5)):
            filled.update(keys, values, layer)
        return filled


class Tasks(PromptEmbedding):
    """One more tensor in the file, a prompt that depends on the task, and one before the decoder's input."""

    takes_task_ids = True
    prompts_decoder = True
    frozen = ("embedding.weight",)

    def __init__(self, config, word_embeddings):
        super().__init__(config, word_embeddings)
        self.scales = nn.Parameter(torch.tensor([1.0, 2.0]))

    def prompt(self, indices, batch_size, task_ids=None):
        return self(indices) * self.scales[task_ids].view(-1, 1, 1)

    def saved_shapes(self):
        return {**super().saved_shapes(), "scales": self.scales.shape}

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {**saved, "scales": model.prompt_encoder[adapter_name].scales.detach()}

    def _load_adapter_state_dict(self, state_dict):
        super()._load_adapter_state_dict(state_dict)
        self.scales.copy_(state_dict["scales"])


class Weighted(PromptEmbedding):
    """A loss of its own, with an argument of its own."""

    own_arguments = ("weight",)
    computes_loss = True

    def loss(self, logits, labels, weight=1.0):
        return weight * logits[:, :, 0].mean() + labels.sum()


@pytest.fixture
def encoder(request, monkeypatch):
    entry = method(PeftType.PROMPT_TUNING)
    monkeypatch.setitem(METHODS, PeftType.PROMPT_TUNING, dataclasses.replace(entry, model_cls=request.param))


class TestFamilies:
    @pytest.mark.parametrize("encoder", [Keys], indirect=True)
    def test_a_prompt_that_fills_the_cache(self, encoder):
        model, inputs = prompted(), batch(padding=(0, 0))
        assert cached_length(model.get_prompt(2)) == N
        name = cache_argument(model.base_model.forward)
        output = model(**inputs, labels=inputs["input_ids"])
        expected = model.base_model(
            inputs["input_ids"],
            attention_mask=ones_before(inputs["attention_mask"]),
            labels=inputs["input_ids"],
            **{name: model.get_prompt(2)},
        )
        assert output.logits.shape == (2, 6, VOCAB)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        for options in ({}, {"use_cache": False}):
            assert torch.equal(generate(model, **inputs, **options), continued_by_hand(model, **inputs))
        assert get_peft_model_state_dict(model).keys() == {"prompt_embeddings"}

    @pytest.mark.parametrize("encoder", [Keys], indirect=True)
    def test_positions_go_on_after_such_a_prompt(self, encoder):
        model, inputs = prompted(), batch(padding=(0, 0))
        places = torch.arange(6).expand(2, 6)
        assert torch.equal(model(**inputs, position_ids=places).logits, model(**inputs).logits)

    @pytest.mark.parametrize("encoder", [Keys], indirect=True)
    def test_a_model_that_takes_no_cache_is_named(self, encoder):
        model = prompted(distilbert, "SEQ_CLS")
        with pytest.raises(ValueError, match="DistilBertForSequenceClassification"):
            model(**batch())

    @pytest.mark.parametrize("encoder", [Keys], indirect=True)
    def test_a_head_that_lets_no_cache_through(self, encoder):
        open_head, closed = (prompted(lambda cls=cls: head(cls), "SEQ_CLS") for cls in (Open, Closed))
        assert torch.equal(closed(**batch()).logits, open_head(**batch()).logits)
        assert len(closed.base_model.bert._forward_pre_hooks) == 0
        with closed.disable_adapter():
            assert not torch.equal(closed(**batch()).logits, open_head(**batch()).logits)

    @pytest.mark.parametrize("encoder", [Tasks], indirect=True)
    def test_a_prompt_by_task(self, encoder):
        model, inputs = prompted(), batch()
        assert trainable(model) == {"prompt_encoder.default.scales"}
        first, second = (model(**inputs, task_ids=torch.full((3,), task)).logits for task in (0, 1))
        mixed = model(**inputs, task_ids=torch.tensor([0, 1, 0])).logits
        torch.testing.assert_close(mixed, torch.stack([first[0], second[1], first[2]]))
        apart = [generate(model, **inputs, task_ids=torch.full((3,), task)) for task in (0, 1)]
        mixed = generate(model, **inputs, task_ids=torch.tensor([0, 1, 0]))
        assert torch.equal(mixed, torch.stack([apart[0][0], apart[1][1], apart[0][2]]))

    @pytest.mark.parametrize("encoder", [Tasks], indirect=True)
    def test_more_tensors_in_a_file(self, encoder, tmp_path):
        model, inputs = prompted(), {**batch(), "task_ids": torch.tensor([0, 1, 0])}
        move(model, "default")
        model.save_pretrained(tmp_path)
        assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"prompt_embeddings", "scales"}
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize("encoder", [Tasks], indirect=True)
    @pytest.mark.parametrize("make", TWO_STACKS)
    def test_a_prompt_before_the_decoders_input(self, encoder, make):
        model, inputs = prompted(make, "SEQ_2_SEQ_LM"), {**batch(), "task_ids": torch.tensor([0, 1, 0])}
        labels = torch.randint(3, VOCAB, (3, 4))
        output = model(**inputs, labels=labels)
        prompt = model.get_prompt(3, task_ids=inputs["task_ids"])
        start = torch.full((3, 1), model.config.decoder_start_token_id)
        decoder_ids = torch.cat([start, labels[:, :-1]], dim=1)
        embed = model.word_embeddings
        expected = model.base_model(
            inputs_embeds=torch.cat([prompt[:, :N], embed(inputs["input_ids"])], dim=1),
            attention_mask=ones_before(inputs["attention_mask"]),
            decoder_inputs_embeds=torch.cat([prompt[:, N:], embed(decoder_ids)], dim=1),
        ).logits
        assert torch.equal(output.logits, expected)
        expected_loss = nn.functional.cross_entropy(expected[:, N:].flatten(0, 1), labels.flatten())
        torch.testing.assert_close(output.loss, expected_loss)
        with torch.no_grad():
            decoded = start
            for _ in range(NEW):
                logits = model(**inputs, decoder_input_ids=decoded).logits
                decoded = torch.cat([decoded, greedy(logits, 2)], dim=1)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(generate(model, **inputs, **options), decoded)

    @pytest.mark.parametrize("encoder", [Weighted], indirect=True)
    def test_a_loss_of_its_own(self, encoder):
        model, inputs = prompted(), batch()
        logits = model(**inputs, weight=3.0).logits
        labels = inputs["input_ids"]
        expected = 3 * logits[:, :, 0].mean() + labels.sum()
        assert torch.equal(model(**inputs, labels=labels, weight=3.0).loss, expected)
        assert torch.equal(model(**inputs, labels=labels, weight=3.0, return_dict=False)[0], expected)
        with model.disable_adapter():
            plain = model(**inputs, labels=labels, weight=3.0).loss
        assert torch.equal(plain, base_of(llama)(**inputs, labels=labels).loss)


class TestHelpers:
    @pytest.mark.parametrize(
        "found, expected",
        [
            ({"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4}, (2, 8, 4)),
            ({"n_layer": 2, "n_embd": 8, "n_head": 4}, (2, 8, 4)),
            ({"num_layers": 2, "d_model": 8, "encoder_attention_heads": 4}, (2, 8, 4)),
            ({"text_config": {"num_layers": 2, "d_model": 8, "num_heads": 4}, "hidden_size": 1}, (2, 8, 4)),
            (T5Config(num_layers=2, d_model=8, num_heads=4), (2, 8, 4)),
            (GPT2Config(n_layer=2, n_embd=8, n_head=4), (2, 8, 4)),
            (DistilBertConfig(n_layers=2, dim=8, n_heads=4), (2, 8, 4)),
        ],
        ids=str,
    )
    def test_a_configuration_is_completed(self, found, expected):
        config = _prepare_prompt_learning_config(config_for("CAUSAL_LM"), found)
        assert (config.num_layers, config.token_dim, config.num_attention_heads) == expected
        given = config_for("CAUSAL_LM", num_layers=7, token_dim=6, num_attention_heads=5)
        config = _prepare_prompt_learning_config(given, found)
        assert (config.num_layers, config.token_dim, config.num_attention_heads) == (7, 6, 5)

    @pytest.mark.parametrize("field", ["num_layers", "token_dim", "num_attention_heads"])
    def test_what_nobody_says_is_named(self, field):
        given = {"num_layers": 7, "token_dim": 6, "num_attention_heads": 5, field: None}
        with pytest.raises(ValueError, match=f"Set {field}"):
            _prepare_prompt_learning_config(config_for("CAUSAL_LM", **given), {})

    def test_labels_become_a_decoders_input(self):
        labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
        assert shift_tokens_right(labels, 0, 1).tolist() == [[1, 5, 6], [1, 8, 0]]
        with pytest.raises(ValueError, match="pad_token_id"):
            shift_tokens_right(labels, None, 1)

    def test_a_mask_of_a_step(self):
        arguments = {
            "model_input": {},
            "past_key_values": None,
            "cache_position": torch.arange(4),
            "batch_size": 2,
            "sequence_length": 4,
            "position_ids": None,
        }
        mask = create_attention_mask(
            base_of(llama), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), **arguments
        )
        allowed = mask if mask.dtype == torch.bool else mask == 0
        assert allowed[1, 0].tolist() == torch.ones(4, 4).tril().bool().tolist()
        assert not allowed[0, 0, 1:, 0].any()

    def test_the_name_of_a_cache_is_the_signatures(self):
        assert cache_argument(lambda ids, past_key_values=None: None) == "past_key_values"
        assert cache_argument(lambda ids, cache=None: None) == "cache"
        assert cache_argument(lambda ids: None) is None

    def test_the_length_of_a_cache(self):
        cache = DynamicCache()
        assert cached_length(None) == cached_length(cache) == cached_length(()) == 0
        cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
        assert cached_length(cache) == 5
        assert cached_length(((torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)),)) == 5
