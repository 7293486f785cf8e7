"""Prefix tuning: which layer gets which keys and values, what they do to a forward and to a generation, and files."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from prompts import (
    DECODERS,
    NEW,
    TASKS,
    TOKENS,
    TWO_STACKS,
    VOCAB,
    WIDTH,
    N,
    assert_same,
    bart,
    base_of,
    batch,
    continued_by_hand,
    decoded_by_hand,
    gemma2,
    gemma3,
    generate,
    gpt2,
    llama,
    move,
    ones_before,
    opt,
    state_of,
    t5,
    trainable,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    DynamicCache,
    EncoderDecoderCache,
    FalconConfig,
    FalconForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaForSequenceClassification,
    Mamba2Config,
    Mamba2ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
)
from versions import needs

from peft import PeftModel, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.prefix_tuning import PrefixEncoder
from peft.tuners.prefix_tuning.model import key_value_pairs
from peft.utils.caches import (
    cache_argument,
    cached_length,
    fill_cache,
    key_value_sizes,
    layer_shapes,
    new_cache,
)
from peft.utils.prompts import _prepare_prompt_learning_config

pytestmark = pytest.mark.compat

WEIGHT = "prompt_encoder.default.embedding.weight"
NETWORK = {WEIGHT} | {f"prompt_encoder.default.transform.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
CAUSAL = [*DECODERS, gemma2, gemma3]


def prefix_config(task="CAUSAL_LM", **options):
    return PrefixTuningConfig(**{"task_type": task, "num_virtual_tokens": N, **options})


def prefixed(make=llama, task="CAUSAL_LM", **options):
    return get_peft_model(base_of(make), prefix_config(task, **options)).eval()


def encoder_of(model):
    return model.prompt_encoder["default"]


def parts_of(model):
    """The rows as (parts, heads, tokens, width of a head), each part the keys or the values of a layer."""
    config, weight = model.peft_config["default"], model.get_prompt_embedding_to_save("default")
    return weight.view(len(weight), 2 * config.num_layers, config.num_attention_heads, -1).permute(1, 2, 0, 3)


def layers_of(cache):
    layers = getattr(cache, "self_attention_cache", cache).layers
    return [(layer.keys, layer.values) for layer in layers]


def two_stack_model(encoder_layers, decoder_layers, heads=2, d_kv=8):
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=d_kv,
            d_ff=24,
            num_layers=encoder_layers,
            num_decoder_layers=decoder_layers,
            num_heads=heads,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def falcon():
    config = FalconConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, alibi=False)
    return FalconForCausalLM(config)


def bigcode():
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, multi_query=True)
    )


class TestCache:
    @pytest.mark.parametrize("make", CAUSAL)
    def test_layer_l_gets_the_parts_2l_and_2l_plus_1(self, make):
        model = prefixed(make)
        cache, parts = model.get_prompt(4), parts_of(model)
        assert type(cache) is DynamicCache
        assert cached_length(cache) == N
        assert len(layers_of(cache)) == 2
        for layer, (keys, values) in enumerate(layers_of(cache)):
            for got, part in ((keys, parts[2 * layer]), (values, parts[2 * layer + 1])):
                assert torch.equal(got, part.expand(4, *part.shape))

    @pytest.mark.parametrize(
        "stored, layers, expected",
        [(4, 4, [0, 2, 0, 2]), (3, 3, [0, 2, 1]), (2, 2, [0, 0]), (1, 3, [0, 0, 0]), (3, 1, [0])],
    )
    def test_with_two_stacks_layers_share(self, stored, layers, expected):
        model = prefixed(lambda: two_stack_model(stored, layers), "SEQ_2_SEQ_LM")
        cache, parts = model.get_prompt(2), parts_of(model)
        assert type(cache) is EncoderDecoderCache
        assert encoder_of(model).embedding.weight.shape == (N, 2 * stored * WIDTH)
        for (keys, values), place in zip(layers_of(cache), expected, strict=True):
            assert torch.equal(keys[1], parts[2 * place])
            assert torch.equal(values[1], parts[2 * place + 1])
        assert cache.is_updated == dict.fromkeys(range(layers), False)
        assert cache.cross_attention_cache.get_seq_length() == 0
        inputs = {**batch(), "decoder_input_ids": torch.ones(3, 2, dtype=torch.long)}
        assert model(**inputs).logits.shape == (3, 2, VOCAB)

    def test_with_one_submodule_in_two_stacks_they_do_not(self):
        model = prefixed(t5, "SEQ_2_SEQ_LM", num_transformer_submodules=1)
        parts = parts_of(model)
        for layer, (keys, values) in enumerate(layers_of(model.get_prompt(1))):
            assert torch.equal(keys[0], parts[2 * layer])
            assert torch.equal(values[0], parts[2 * layer + 1])

    @pytest.mark.parametrize("make", [llama, gemma3])
    def test_one_of_fixed_size(self, make):
        model = prefixed(make)
        cache, growing = model.get_prompt(2, max_cache_len=9), model.get_prompt(2)
        assert type(cache) is StaticCache
        assert cached_length(cache) == N
        for fixed, grown in zip(layers_of(cache), layers_of(growing), strict=True):
            for whole, part in zip(fixed, grown, strict=True):
                assert torch.equal(whole[:, :, :N], part)
                assert not whole[:, :, N:].any()
        assert layers_of(cache)[1][0].shape[2] == 9

    def test_the_prefix_takes_the_models_dtype(self):
        model = get_peft_model(base_of(llama).to(torch.bfloat16), prefix_config())
        assert encoder_of(model).embedding.weight.dtype == torch.float32
        assert layers_of(model.get_prompt(1))[0][0].dtype == torch.bfloat16
        assert model(**batch()).logits.dtype == torch.bfloat16

    def test_keys_may_be_smaller_in_some_layers(self):
        pairs = [(torch.randn(2, 3, N, 8), torch.randn(2, 3, N, 8)) for _ in range(4)]
        with pytest.warns(UserWarning, match=r"layers \[1, 3\] get no prompt.*3 heads of the width 8"):
            cache = fill_cache(DynamicCache(), pairs, {0: (3, 8), 1: (4, 8), 2: (2, 6)})
        layers = cache.layers
        assert torch.equal(layers[0].keys, pairs[0][0])
        assert torch.equal(layers[2].values, pairs[2][1][:, :2, :, :6])
        assert cache.get_seq_length(1) == 0
        with pytest.raises(ValueError, match=r"No layer can take the prompt.*\(5, 8\)"):
            fill_cache(DynamicCache(), pairs[:1], {0: (5, 8)})

    def test_each_layer_where_it_is_computed(self):
        pairs = [(torch.randn(1, 1, N, 8), torch.randn(1, 1, N, 8)) for _ in range(2)]
        cache = fill_cache(DynamicCache(), pairs, devices={0: "cpu", 1: "meta"})
        assert [keys.device.type for keys, _ in layers_of(cache)] == ["cpu", "meta"]

    def test_a_spread_model_says_where(self, monkeypatch):
        model = prefixed()
        monkeypatch.setattr(
            "peft.tuners.prefix_tuning.model.get_layer_device_map", lambda model: {0: "cpu", 1: "meta"}
        )
        model.base_model.hf_device_map = {"": 0}
        assert [keys.device.type for keys, _ in layers_of(model.get_prompt(1))] == ["cpu", "cpu"]
        model.base_model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
        assert [keys.device.type for keys, _ in layers_of(model.get_prompt(1))] == ["cpu", "meta"]

    def test_what_layers_say_of_their_keys(self):
        assert layer_shapes(base_of(llama)) == {0: (1, 8), 1: (1, 8)}
        assert layer_shapes(base_of(gemma3)) == {0: (1, 6), 1: (1, 6)}
        assert layer_shapes(base_of(gpt2)) is None

    @pytest.mark.parametrize("make, kind", [(llama, DynamicCache), (t5, EncoderDecoderCache)])
    def test_a_new_one_is_the_models_kind(self, make, kind):
        cache = new_cache(base_of(make))
        assert type(cache) is kind
        assert cached_length(cache) == 0


class TestConfiguration:
    @pytest.mark.parametrize(
        "found, expected",
        [
            ({"num_attention_heads": 4, "hidden_size": 16}, (4, 16)),
            ({"num_attention_heads": 4, "hidden_size": 16, "head_dim": 8}, (4, 16)),  # nothing is grouped
            ({"num_attention_heads": 4, "hidden_size": 16, "num_key_value_heads": 2}, (2, 8)),
            ({"num_attention_heads": 4, "hidden_size": 16, "num_key_value_heads": 2, "head_dim": 8}, (2, 16)),
            (
                {
                    "num_attention_heads": 4,
                    "hidden_size": 16,
                    "num_key_value_heads": 2,
                    "head_dim": 4,
                    "per_layer_config": {"1": {"head_dim": 8}},
                },
                (2, 16),
            ),
            (
                {
                    "num_attention_heads": 4,
                    "hidden_size": 16,
                    "num_key_value_heads": 2,
                    "head_dim": 4,
                    "global_head_dim": 8,
                    "num_global_key_value_heads": 1,
                },
                (2, 16),
            ),
            ({"num_attention_heads": 4, "hidden_size": 16, "multi_query": True}, (1, 4)),
            (
                {"num_attention_heads": 4, "hidden_size": 16, "multi_query": True, "new_decoder_architecture": True},
                (4, 16),
            ),
        ],
        ids=str,
    )
    def test_heads_and_width_are_those_of_the_keys(self, found, expected):
        found["num_hidden_layers"] = 2
        config = _prepare_prompt_learning_config(prefix_config(), found)
        assert (config.num_attention_heads, config.token_dim) == expected
        assert config.encoder_hidden_size == config.token_dim

    def test_what_the_user_says_of_grouped_heads_is_put_right(self):
        found = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "num_key_value_heads": 2}
        config = prefix_config(token_dim=32, num_attention_heads=4, encoder_hidden_size=5)
        _prepare_prompt_learning_config(config, {**found, "head_dim": 6})
        assert (config.num_attention_heads, config.token_dim, config.encoder_hidden_size) == (2, 12, 5)

    def test_in_the_decoder_of_two_stacks(self):
        assert key_value_sizes({"d_kv": 6}, 2, 16, in_decoder=True) == (2, 6)
        assert key_value_sizes({"decoder_attention_heads": 4}, 2, 16, in_decoder=True) == (4, 4)

    @pytest.mark.parametrize("make, heads, width", [(falcon, 1, 8), (bigcode, 1, 8), (gemma2, 1, 6)])
    def test_models_that_share_keys(self, make, heads, width):
        model = prefixed(make)
        config = model.peft_config["default"]
        assert (config.num_attention_heads, config.token_dim) == (heads, heads * width)
        assert model(**batch(padding=(0, 0))).logits.shape == (2, 6, VOCAB)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: two_stack_model(2, 2, d_kv=6),
            lambda: BartForConditionalGeneration(
                BartConfig(
                    vocab_size=VOCAB,
                    d_model=WIDTH,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_ffn_dim=24,
                    decoder_ffn_dim=24,
                    encoder_attention_heads=2,
                    decoder_attention_heads=4,
                    decoder_start_token_id=2,
                    **TOKENS,
                )
            ),
        ],
        ids=["t5 with keys of another width", "bart with more heads in the decoder"],
    )
    def test_two_stacks_of_other_sizes(self, make):
        model = prefixed(make, "SEQ_2_SEQ_LM")
        labels = torch.randint(3, VOCAB, (3, 4))
        assert model(**batch(), labels=labels).logits.shape == (3, 4, VOCAB)

    def test_an_unknown_start_is_named(self):
        with pytest.raises(ValueError, match="'zeros' is none of None .* and 'zero'"):
            prefix_config(init_weights="zeros")

    def test_checkpointed_layers_take_no_cache(self):
        base = base_of(llama)
        base.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
            get_peft_model(base, prefix_config())
        assert all(parameter.requires_grad for parameter in base.parameters())
        model = prefixed()
        model.base_model.gradient_checkpointing_enable()
        assert model(**batch()).logits.shape == (3, 6, VOCAB)
        with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
            model.train()(**batch())


class TestEncoder:
    @pytest.mark.parametrize(
        "options, expected",
        [
            ({}, {WEIGHT: (N, 32)}),
            (
                {"prefix_projection": True, "encoder_hidden_size": 5},
                dict(zip(sorted(NETWORK), [(N, 8), (5,), (5, 8), (32,), (32, 5)])),
            ),
            ({"prefix_projection": True, "inference_mode": True}, {WEIGHT: (N, 32)}),
        ],
    )
    def test_parameters(self, options, expected):
        model = prefixed(**options)
        assert type(encoder_of(model)) is PrefixEncoder
        names = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("prompt_encoder")}
        assert names == expected
        assert trainable(model) == (set() if options.get("inference_mode") else set(expected))
        assert {name for name in model.state_dict() if name.startswith("prompt_encoder")} == set(expected)
        assert get_peft_model_state_dict(model)["prompt_embeddings"].shape == (N, 32)

    def test_starts_seed_for_seed(self):
        torch.manual_seed(3)
        config = _prepare_prompt_learning_config(prefix_config(prefix_projection=True), base_of(llama).config)
        torch.manual_seed(3)
        encoder = PrefixEncoder(config)
        torch.manual_seed(3)
        embedding, first, last = nn.Embedding(N, 8), nn.Linear(8, 8), nn.Linear(8, 32)
        expected = last(torch.tanh(first(embedding.weight)))
        assert torch.equal(encoder(torch.arange(N).unsqueeze(0))[0], expected)

    @pytest.mark.parametrize("projection", [False, True])
    def test_a_start_at_zero(self, projection):
        model = prefixed(init_weights="zero", prefix_projection=projection)
        assert not model.get_prompt_embedding_to_save("default").any()
        assert not any(part.any() for pair in layers_of(model.get_prompt(2)) for part in pair)
        assert model.prompt_encoder["default"].embedding.weight.any() == projection

    def test_keys_and_values_can_be_given(self):
        model, given = prefixed(), torch.randn(N, 32)
        encoder_of(model).load_prompt_embeddings(given)
        assert torch.equal(model.get_prompt_embedding_to_save("default"), given)
        assert trainable(model) == {WEIGHT}
        with pytest.raises(ValueError, match=r"shape \(3, 32\).*got \(2, 32\)"):
            encoder_of(model).load_prompt_embeddings(given[:2])
        with pytest.raises(ValueError, match="prefix_projection=True"):
            encoder_of(prefixed(prefix_projection=True)).load_prompt_embeddings(given)


def by_hand(model, inputs, **extra):
    """The base model's output with the prefix as its cache."""
    name = cache_argument(model.base_model.forward)
    mask = ones_before(inputs["attention_mask"])
    cache = {name: model.get_prompt(len(mask))}
    return model.base_model(input_ids=inputs["input_ids"], attention_mask=mask, **cache, **extra)


class TestForward:
    @pytest.mark.parametrize("make", CAUSAL)
    def test_the_prefix_is_the_cache(self, make):
        model, inputs = prefixed(make), batch()
        labels = inputs["input_ids"]
        output, expected = model(**inputs, labels=labels), by_hand(model, inputs, labels=labels)
        assert output.logits.shape == (3, 6, VOCAB)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)

    @pytest.mark.parametrize("make", CAUSAL)
    def test_keys_and_values_of_tokens_are_those_tokens(self, make):
        """What a text's tokens put into the cache has the effect of those tokens: also as to masks and positions."""
        base, ids = base_of(make), batch(tokens=6, padding=(0,))["input_ids"]
        name = cache_argument(base.forward)
        expected = base(ids).logits[:, N:]
        cache = base(ids[:, :N], use_cache=True)[name]
        rows = [part[0].transpose(0, 1).flatten(1) for pair in layers_of(cache) for part in pair]
        model = get_peft_model(base, prefix_config()).eval()
        encoder_of(model).load_prompt_embeddings(torch.cat(rows, dim=1))
        torch.testing.assert_close(model(ids[:, N:]).logits, expected)
        text = torch.cat([ids, ids[:, :2]], dim=1)
        with model.disable_adapter():
            whole = generate(model, input_ids=text, attention_mask=torch.ones_like(text))
        assert torch.equal(generate(model, input_ids=text[:, N:]), whole[:, N:])

    @pytest.mark.parametrize("make", TWO_STACKS)
    def test_with_two_stacks_the_decoder_has_it(self, make):
        model, inputs = prefixed(make, "SEQ_2_SEQ_LM"), batch()
        labels = torch.randint(3, VOCAB, (3, 4))
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
        name = cache_argument(model.base_model.forward)
        expected = model.base_model(
            **inputs, labels=labels, decoder_attention_mask=ones_before(mask), **{name: model.get_prompt(3)}
        )
        output = model(**inputs, labels=labels, decoder_attention_mask=mask)
        assert output.logits.shape == (3, 4, VOCAB)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        with model.disable_adapter():
            assert not torch.equal(model(**inputs, labels=labels).logits, output.logits)

    def test_a_model_that_is_no_decoder_looks_at_it_from_every_token(self):
        model, inputs = prefixed(TASKS["FEATURE_EXTRACTION"], "FEATURE_EXTRACTION"), batch()
        base = model.base_model
        hidden = base.embeddings(inputs["input_ids"], position_ids=torch.arange(N, N + 6)[None])
        attention = base.encoder.layer[0].attention

        def heads(x):
            return x.unflatten(-1, (2, 8)).transpose(1, 2)

        keys, values = layers_of(model.get_prompt(3))[0]
        q = heads(attention.self.query(hidden))
        k = torch.cat([keys, heads(attention.self.key(hidden))], dim=2)
        v = torch.cat([values, heads(attention.self.value(hidden))], dim=2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(8)
        scores = scores.masked_fill(ones_before(inputs["attention_mask"])[:, None, None] == 0, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        expected = base.encoder.layer[0].feed_forward_chunk(attention.output(attended, hidden))
        torch.testing.assert_close(model(**inputs)[0], expected)

    @pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
    def test_heads(self, task):
        model, inputs = prefixed(TASKS[task], task), batch()
        hidden = prefixed(TASKS["FEATURE_EXTRACTION"], "FEATURE_EXTRACTION")
        hidden.base_model.load_state_dict(model.base_model.bert.state_dict(), strict=False)
        encoder_of(hidden).load_prompt_embeddings(model.get_prompt_embedding_to_save("default"))
        found = hidden(**inputs)[0]
        head = model.base_model.qa_outputs if task == "QUESTION_ANS" else model.base_model.classifier
        expected = head(model.base_model.bert.pooler(found) if task == "SEQ_CLS" else found)
        output = model(**inputs)
        if task == "QUESTION_ANS":
            output = torch.stack([output.start_logits, output.end_logits], dim=-1)
        else:
            output = output.logits
        torch.testing.assert_close(output, expected)

    @pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
    def test_tokens_keep_types_labels_and_positions(self, task):
        model, inputs = prefixed(TASKS[task], task), batch(padding=(0, 0))
        output = model(**inputs)[0]
        assert output.shape == {"SEQ_CLS": (2, 3), "TOKEN_CLS": (2, 6, 3), "QUESTION_ANS": (2, 6)}[task]
        assert not torch.equal(model(**inputs, token_type_ids=torch.ones(2, 6, dtype=torch.long))[0], output)
        places = torch.arange(6).expand(2, 6)
        assert torch.equal(model(**inputs, position_ids=places)[0], output)
        labels = {"SEQ_CLS": torch.tensor([0, 1]), "TOKEN_CLS": torch.randint(0, 3, (2, 6))}.get(task)
        if task == "QUESTION_ANS":
            ends = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
            loss = model(**inputs, **ends).loss
            scores = model(**inputs)
            pairs = [(scores.start_logits, ends["start_positions"]), (scores.end_logits, ends["end_positions"])]
            expected = sum(nn.functional.cross_entropy(logits, target) for logits, target in pairs) / 2
        else:
            loss = model(**inputs, labels=labels).loss
            expected = nn.functional.cross_entropy(output.view(-1, 3), labels.flatten())
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert encoder_of(model).embedding.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
    def test_token_types_are_left_out_where_the_task_has_none(self, task):
        make = {"CAUSAL_LM": gpt2, "FEATURE_EXTRACTION": TASKS["FEATURE_EXTRACTION"], "SEQ_2_SEQ_LM": t5}[task]
        model, inputs = prefixed(make, task), batch(padding=(0, 0))
        if task == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = torch.ones(2, 3, dtype=torch.long)
        with pytest.warns(UserWarning, match="token_type_ids are left out"):
            output = model(**inputs, token_type_ids=torch.ones(2, 6, dtype=torch.long))[0]
        assert torch.equal(output, model(**inputs)[0])

    def test_a_head_on_the_encoder_of_two_stacks_takes_no_prefix(self):
        config = T5Config(
            vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        model = prefixed(lambda: T5ForQuestionAnswering(config), "QUESTION_ANS")
        with pytest.raises(ValueError, match="the forward of T5ForQuestionAnswering takes none"):
            model(**batch())

    @needs("transformers", "5.23", "keeps the state of a Mamba2 in no cache of layers")
    def test_layers_without_keys_take_no_prefix(self):
        config = Mamba2Config(
            vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1
        )
        model = prefixed(lambda: Mamba2ForCausalLM(config))
        with pytest.raises(ValueError, match="No layer can take the prompt"):
            model(**batch())

    @pytest.mark.parametrize("padding", [(0, 0), (0, 3)])
    def test_sequences_are_classified_by_a_decoder(self, padding):
        def make():
            return LlamaForSequenceClassification(base_of(llama).config)

        model, inputs = prefixed(make, "SEQ_CLS"), batch(padding=padding)
        assert torch.equal(model(**inputs).logits, by_hand(model, inputs).logits)

    def test_of_two_stacks_the_decoder_has_it_in_other_tasks_too(self):
        model, inputs = prefixed(lambda: BartModel(bart().config), "FEATURE_EXTRACTION"), batch()
        name = cache_argument(model.base_model.forward)
        expected = model.base_model(**inputs, **{name: model.get_prompt(3)})[0]
        assert torch.equal(model(**inputs)[0], expected)
        with model.disable_adapter():
            assert not torch.equal(model(**inputs)[0], expected)

    def test_a_cache_that_is_not_empty_has_the_prefix_already(self):
        model, ids = prefixed(), batch(padding=(0, 0))["input_ids"]
        name = cache_argument(model.base_model.forward)
        first = model(input_ids=ids[:, :4], use_cache=True)
        assert cached_length(first[name]) == N + 4
        second = model(input_ids=ids[:, 4:], attention_mask=torch.ones_like(ids), **{name: first[name]})
        torch.testing.assert_close(second.logits, model(input_ids=ids).logits[:, -2:])

    @pytest.mark.parametrize("name", ["cache", "past_key_values"])
    def test_an_empty_cache_is_filled_in_place(self, name):
        model, inputs = prefixed(), batch(padding=(0, 0))
        given = StaticCache(config=model.config, max_cache_len=N + 6)
        output = model(**inputs, **{name: given})
        torch.testing.assert_close(output.logits, model(**inputs).logits)
        assert cached_length(given) == N + 6

    def test_half_precision_by_autocast(self):
        model, inputs = prefixed(), batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert encoder_of(model).embedding.weight.grad.isfinite().all()

    def test_compiles_without_a_break(self):
        model, inputs = prefixed(), batch()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


WAYS = [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}]


class TestGeneration:
    @pytest.mark.parametrize("make", CAUSAL)
    @pytest.mark.parametrize("options", WAYS, ids=str)
    def test_is_a_forward_repeated(self, make, options):
        # The oldest library numbers padding too when it reads in chunks.
        model, inputs = prefixed(make), batch(padding=(0, 0) if "prefill_chunk_size" in options else (0, 2, 4))
        expected = continued_by_hand(model, **inputs, count=True)
        assert torch.equal(generate(model, **inputs, **options), expected)
        with model.disable_adapter():
            assert not torch.equal(generate(model, **inputs, **options), expected)

    @pytest.mark.parametrize("make", DECODERS)  # in a window of attention, padding takes room
    def test_padding_on_the_left_changes_nothing(self, make):
        model, inputs = prefixed(make), batch()
        together = generate(model, **inputs)[:, -NEW:]
        alone = [generate(model, input_ids=row[mask == 1][None]) for row, mask in zip(*inputs.values())]
        assert torch.equal(together, torch.cat([row[:, -NEW:] for row in alone]))

    @pytest.mark.parametrize("make", TWO_STACKS)
    @pytest.mark.parametrize("options", WAYS[:3], ids=str)
    def test_with_two_stacks_is_a_forward_repeated(self, make, options):
        model, inputs = prefixed(make, "SEQ_2_SEQ_LM"), batch()
        expected = decoded_by_hand(model, **inputs)
        assert torch.equal(generate(model, **inputs, **options), expected)
        with model.disable_adapter():
            assert not torch.equal(generate(model, **inputs, **options), expected)

    @pytest.mark.parametrize("options", WAYS[:3], ids=str)
    def test_sampled(self, options):
        model, inputs = prefixed(), batch()

        def sample(logits):
            scores = logits[:, -1].clone()
            scores[:, 2] = -torch.inf
            return torch.multinomial(scores.softmax(-1), 1)

        torch.manual_seed(5)
        expected = continued_by_hand(model, **inputs, choose=sample, count=True)
        torch.manual_seed(5)
        sampled = generate(model, **inputs, do_sample=True, top_k=0, **options)
        assert torch.equal(sampled, expected)
        assert not torch.equal(sampled, generate(model, **inputs))

    @pytest.mark.parametrize("make, task", [(gpt2, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
    def test_token_types_are_left_out(self, make, task):
        model, inputs = prefixed(make, task), batch(padding=(0, 0))
        types = torch.ones(2, 6, dtype=torch.long)
        with pytest.warns(UserWarning, match="token_type_ids are left out"):
            found = model.generate(**inputs, token_type_ids=types, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=4, do_sample=False))

    @pytest.mark.parametrize("make, task", [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
    def test_beams_are_scored_with_the_prefix(self, make, task, options):
        model, inputs = prefixed(make, task), batch()
        found = generate(
            model,
            **inputs,
            num_beams=3,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        if task == "CAUSAL_LM":
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            output = model(input_ids=found.sequences, attention_mask=mask, position_ids=places)
            logits = output.logits[:, -NEW - 1 : -1]
        else:
            logits = model(**inputs, decoder_input_ids=found.sequences[:, :-1]).logits
        chosen = logits.log_softmax(-1).gather(-1, found.sequences[:, -NEW:, None]).squeeze(-1)
        torch.testing.assert_close(found.sequences_scores, chosen.sum(1), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("make", [llama, opt])
    def test_from_embeddings(self, make):
        model, inputs = prefixed(make), batch()
        embeds = model.word_embeddings(inputs["input_ids"])
        output = generate(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        assert torch.equal(output, continued_by_hand(model, **inputs, count=True)[:, 6:])

    @pytest.mark.parametrize("make", [llama, gpt2])
    def test_goes_on_from_a_cache(self, make):
        model, inputs = prefixed(make), batch(padding=(0, 0))
        name = cache_argument(model.base_model.forward)
        first = generate(model, **inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
        rest = {"max_new_tokens": NEW - 2, "min_new_tokens": NEW - 2}
        output = generate(model, input_ids=first.sequences, **{name: first[name]}, **rest)
        assert torch.equal(output, continued_by_hand(model, **inputs))

    def test_drafted_tokens_are_checked_with_the_prefix(self):
        model, inputs = prefixed(), batch(padding=(0,))
        assert torch.equal(generate(model, **inputs, prompt_lookup_num_tokens=2), continued_by_hand(model, **inputs))

    def test_a_cache_of_the_users_own(self):
        model, inputs = prefixed(), batch(padding=(0, 0))
        name, given = cache_argument(model.base_model.forward), DynamicCache()
        output = generate(model, **inputs, **{name: given})
        assert torch.equal(output, continued_by_hand(model, **inputs))
        assert cached_length(given) == N + 6 + NEW - 1

    @pytest.mark.parametrize("make", [bart, t5])
    def test_an_empty_cache_without_a_place_for_the_encoder_is_not_filled(self, make):
        model, inputs = prefixed(make, "SEQ_2_SEQ_LM"), batch(padding=(0, 0))
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
        name, given = cache_argument(model.base_model.forward), DynamicCache()
        assert torch.equal(model(**inputs, **{name: given}).logits, model(**inputs).logits)
        assert cached_length(given) == 0


class TestLife:
    @pytest.mark.parametrize("projection, weights", [(False, {WEIGHT}), (True, NETWORK)])
    def test_a_step_changes_exactly_the_prefix(self, projection, weights):
        model, inputs = prefixed(prefix_projection=projection), batch()
        model.add_adapter("other", prefix_config(num_virtual_tokens=2))
        assert trainable(model) == weights
        before = state_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        assert_same(before, state_of(model), but=weights)

    def test_each_adapter_has_its_own(self):
        model, inputs = prefixed(), batch()
        output = model(**inputs).logits
        model.add_adapter("other", prefix_config(num_virtual_tokens=2))
        model.set_adapter("other")
        assert cached_length(model.get_prompt(1)) == 2
        assert not torch.equal(model(**inputs).logits, output)
        model.set_adapter("default")
        assert torch.equal(model(**inputs).logits, output)
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, base_of(llama)(**inputs).logits)


class TestFiles:
    @pytest.mark.parametrize("projection", [False, True])
    @pytest.mark.parametrize("make, task", [(llama, "CAUSAL_LM"), (t5, "SEQ_2_SEQ_LM")])
    def test_saved_and_loaded(self, make, task, projection, tmp_path):
        model, inputs = prefixed(make, task, prefix_projection=projection), batch()
        if task == "SEQ_2_SEQ_LM":
            inputs["decoder_input_ids"] = torch.ones(3, 2, dtype=torch.long)
        model.save_pretrained(tmp_path)
        width = 4 * model.peft_config["default"].token_dim
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert {name: tuple(value.shape) for name, value in saved.items()} == {"prompt_embeddings": (N, width)}
        loaded = PeftModel.from_pretrained(base_of(make), tmp_path)
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert trainable(loaded) == {WEIGHT}
        assert encoder_of(loaded).embedding.weight.shape == (N, width)

    @pytest.mark.parametrize("projection", [False, True])
    def test_loaded_by_name_into_one_that_trains(self, projection, tmp_path):
        model, inputs = prefixed(prefix_projection=projection), batch()
        weights = trainable(model)
        output, saved = model(**inputs).logits, model.get_prompt_embedding_to_save("default")
        model.save_pretrained(tmp_path)
        names = set(model.state_dict())
        fresh = prefixed(prefix_projection=projection)
        move(model, "default")
        assert not torch.equal(model(**inputs).logits, output)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(model(**inputs).logits, output)
        assert torch.equal(model.get_prompt_embedding_to_save("default"), saved)
        assert trainable(model) == weights
        beside = {f"prompt_encoder.default.{name}" for name in ("loaded", "computed")} if projection else set()
        assert set(model.state_dict()) == names | beside
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, output)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(**inputs).logits, output)

    def test_loaded_into_a_network_it_goes_on_training_from_there(self, tmp_path):
        model, inputs = prefixed(prefix_projection=True), batch()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        best = model.get_prompt_embedding_to_save("default")
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        model.save_pretrained(tmp_path)
        move(model, "default")
        model.load_adapter(tmp_path, "default", is_trainable=True)
        for _ in range(5):  # with the optimizer that there was
            optimizer.zero_grad()
            last = model(**inputs, labels=inputs["input_ids"]).loss
            last.backward()
            optimizer.step()
        assert last < loss
        moved = model.get_prompt_embedding_to_save("default")
        assert not torch.equal(moved, best)
        model.save_pretrained(tmp_path / "moved")
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path / "moved")
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(model.get_prompt_embedding_to_save("default"), best)

    def test_one_of_another_shape_changes_nothing(self, tmp_path):
        prefixed(num_virtual_tokens=N + 1).save_pretrained(tmp_path)
        model = prefixed(prefix_projection=True)
        before, prompt = state_of(model), model.get_prompt_embedding_to_save("default")
        with pytest.raises(RuntimeError, match=r"expected \(3, 32\), found \(4, 32\)"):
            model.load_adapter(tmp_path, "default", is_trainable=True)
        assert_same(before, state_of(model))
        assert torch.equal(model.get_prompt_embedding_to_save("default"), prompt)

    def test_the_network_may_come_from_a_state_dict(self):
        model = prefixed(prefix_projection=True)
        zero = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        assert not get_peft_model_state_dict(model, state_dict=zero)["prompt_embeddings"].any()
        assert model.get_prompt_embedding_to_save("default").any()


def test_parts_are_cut_by_layer():
    config = prefix_config(num_layers=2, num_attention_heads=1, num_transformer_submodules=1)
    prompt = torch.arange(8.0).view(1, 1, 8)
    found = [
        (keys.flatten().tolist(), values.flatten().tolist()) for keys, values in key_value_pairs(prompt, config, 2)
    ]
    assert found == [([0, 1], [2, 3]), ([4, 5], [6, 7])]
