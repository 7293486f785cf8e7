"""aLoRA: an adapter that acts from the last invocation in each text on, in training, generation and mixed batches."""

import copy
import importlib.metadata

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import alora
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import (
    ALoraLinearVariant,
    calculate_alora_offsets,
    get_alora_offsets_for_forward,
    get_alora_offsets_for_generate,
    is_alora_relevant_in_batch,
)
from peft.utils.hotswap import hotswap_adapter

pytestmark = pytest.mark.compat

INVOCATION = [5, 6]
IDS = torch.tensor([[7, 5, 6, 8, 9, 3], [5, 6, 4, 5, 6, 7], [9, 8, 7, 4, 3, 9]])
"""The adapter acts on the last 5 tokens of the first text, the last 3 of the second, and none of the third."""
ACTING = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
OFFSETS = [5, 3, None]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=True,
    )
    return LlamaForCausalLM(config).eval()


def config(tokens=INVOCATION, **options):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "init_lora_weights": False, "alora_invocation_tokens": tokens, **options}
    )


def adapted(base=None, **options):
    return get_peft_model(llama() if base is None else base, config(**options)).eval()


def layer_of(base, adapter="default", **options):
    """One LoRA layer by itself."""
    return Linear(base, adapter, config(**options), r=3, lora_alpha=6)


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


# ------------------------------------------------------------------------------------------------------- finding offsets


@pytest.mark.parametrize(
    ("tokens", "offset"),
    [
        ([2, 3], 3),
        ([5, 6, 7, 8], None),
        ([1], 4),
        ([4], 1),
        ([1, 2, 3, 4], 4),
        ([3, 4, 5], None),
        ([1, 2, 3, 4, 5], None),
    ],
)
def test_an_offset_counts_from_the_end_to_the_start_of_the_invocation(tokens, offset):
    assert calculate_alora_offsets({"a": config(tokens)}, "a", torch.tensor([[1, 2, 3, 4]])) == [offset]


def test_the_last_complete_invocation_counts():
    ids = torch.tensor([[2, 3, 2, 3], [2, 3, 2, 2], [3, 2, 3, 2], [2, 2, 2, 2]])
    assert calculate_alora_offsets({"a": config([2, 3])}, "a", ids) == [2, 4, 3, None]
    assert calculate_alora_offsets({"a": config([2, 2])}, "a", ids) == [None, 2, None, 2]


def test_each_row_of_a_mixed_batch_has_its_own_invocation():
    configs = {"a": config([2, 3]), "b": config([4]), "plain": config(None)}
    ids = torch.tensor([[1, 2, 3, 4]]).repeat(5, 1)
    with pytest.warns(UserWarning, match=r"no adapter 'c'; known are \['a', 'b', 'plain'\].*rows \[4\]"):
        offsets = calculate_alora_offsets(configs, "a", ids, adapter_names=["a", "b", "plain", "__base__", "c"])
    assert offsets == [3, 1, None, None, None]


def test_the_arguments_of_a_call_get_offsets():
    model = adapted()
    assert get_alora_offsets_for_forward(model, input_ids=IDS, foo=1) == {"foo": 1, "alora_offsets": OFFSETS}
    assert get_alora_offsets_for_forward(model, input_ids=IDS, alora_offsets=[1, 1, 1]) == {"alora_offsets": [1, 1, 1]}
    assert get_alora_offsets_for_forward(model) == {"alora_offsets": None}
    assert get_alora_offsets_for_generate(model, IDS)["alora_offsets"] == OFFSETS
    assert get_alora_offsets_for_generate(model, IDS[0])["alora_offsets"] == [5]
    given = get_alora_offsets_for_generate(model, input_ids=IDS, max_new_tokens=2)
    assert given["alora_offsets"] == OFFSETS and given["input_ids"] is IDS and given["max_new_tokens"] == 2
    with pytest.warns(UserWarning, match="no input_ids are given"):
        embedded = get_alora_offsets_for_forward(model, inputs_embeds=torch.zeros(3, 6, 16))
    assert embedded["alora_offsets"] is None
    with pytest.warns(UserWarning, match="no input_ids are given"):
        assert get_alora_offsets_for_generate(model, attention_mask=IDS)["alora_offsets"] is None


def test_calls_without_an_alora_are_left_alone():
    model = adapted(tokens=None)
    model.add_adapter("invoked", config())
    assert not is_alora_relevant_in_batch(model)
    assert is_alora_relevant_in_batch(model, ["default", "invoked", "__base__"])
    assert not is_alora_relevant_in_batch(model, ["default", "__base__"])
    assert get_alora_offsets_for_forward(model, input_ids=IDS) == {}
    assert get_alora_offsets_for_generate(model, IDS) == {}
    assert get_alora_offsets_for_forward(model, input_ids=IDS, adapter_names=["default", "invoked", "invoked"])[
        "alora_offsets"
    ] == [None, 3, None]
    model.set_adapter("invoked")
    assert is_alora_relevant_in_batch(model) and is_alora_relevant_in_batch(model.base_model)


# --------------------------------------------------------------------------------------------------------------- a layer


@pytest.mark.parametrize("base", [nn.Linear(4, 5), Conv1D(5, 4)], ids=["linear", "conv1d"])
def test_the_term_is_added_to_the_tokens_from_the_offset_on(base):
    layer = layer_of(base).eval()
    x = torch.randn(3, 6, 4)
    output, plain = layer(x, alora_offsets=OFFSETS), base(x)
    torch.testing.assert_close(output[ACTING], (plain + layer.term(x, "default"))[ACTING])
    assert torch.equal(output[~ACTING], plain[~ACTING])


def test_offsets_beyond_what_a_layer_sees_mean_all_of_it():
    layer = layer_of(nn.Linear(4, 5)).eval()
    x = torch.randn(3, 2, 4)
    acting = torch.tensor([[1, 1], [0, 1], [0, 0]], dtype=torch.bool)
    torch.testing.assert_close(
        layer(x, alora_offsets=[9, 1, None])[acting], (layer.base_layer(x) + layer.term(x, "default"))[acting]
    )
    one = layer(x[:, -1], alora_offsets=[9, 1, None])  # a row per text
    torch.testing.assert_close(one, layer(x, alora_offsets=[9, 1, None])[:, -1])


def test_without_offsets_a_layer_gives_the_base_output_and_stays_trainable():
    layer = layer_of(nn.Linear(4, 5).requires_grad_(False))
    for offsets in ({}, {"alora_offsets": None}, {"alora_offsets": [None, None]}):
        output = layer(torch.ones(2, 3, 4), **offsets)
        assert torch.equal(output, layer.base_layer(torch.ones(2, 3, 4)))
        output.sum().backward()
        assert not layer.lora_B["default"].weight.grad.any()


def test_tokens_of_all_texts_in_one_list():
    layer = layer_of(nn.Linear(4, 5)).eval()
    x = torch.randn(3, 6, 4)
    with layer.roster.inputs.given({"alora_offsets": alora.Offsets(OFFSETS)}):
        torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))


def test_tokens_that_belong_to_no_text_are_refused():
    layer = layer_of(nn.Linear(4, 5)).eval()
    offsets = alora.Offsets(OFFSETS)
    offsets.tokens = 6
    with layer.roster.inputs.given({"alora_offsets": offsets}):
        for rows in (7, 9):  # 9 divides into three texts, but these have 6 tokens
            with pytest.raises(
                ValueError, match=f"{rows} rows for 3 texts of 6 tokens each.*'default'.*target_modules"
            ):
                layer(torch.randn(rows, 4))
        assert layer(torch.randn(3, 4)).shape == (3, 5)  # a row per text
    with pytest.raises(
        ValueError, match=r"Linear sees 3 rows, but alora_offsets of the adapter 'default' has 2 entries"
    ):
        layer(torch.randn(3, 6, 4), alora_offsets=[1, 2])


def test_an_empty_batch():
    layer = layer_of(nn.Linear(4, 5)).eval()
    assert layer(torch.randn(0, 6, 4), alora_offsets=[]).shape == (0, 6, 5)
    assert layer(torch.randn(0, 4), alora_offsets=[]).shape == (0, 5)


def test_dropout_and_half_precision():
    layer = layer_of(nn.Linear(4, 5).bfloat16(), lora_dropout=0.5)
    layer.lora_A.float(), layer.lora_B.float()
    x = torch.randn(3, 6, 4, dtype=torch.bfloat16)
    output = layer(x, alora_offsets=OFFSETS)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output[~ACTING], layer.base_layer(x)[~ACTING])


# --------------------------------------------------------------------------------------------------------------- a model


def test_earlier_tokens_are_the_base_models_bit_for_bit():
    base = llama()
    expected = logits(base)
    model = adapted(base)
    output = logits(model)
    assert torch.equal(output[~ACTING], expected[~ACTING])
    assert (output[ACTING] - expected[ACTING]).abs().amax(-1).min() > 1e-4


def test_from_its_invocation_on_it_is_the_plain_adapter():
    model = adapted()
    plain = adapted(tokens=None)
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 6, 4, 3]])  # invoked at once
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))


def test_padding_changes_nothing():
    model = adapted()
    for left, right in ((2, 0), (0, 2)):
        padded = nn.functional.pad(IDS, (left, right))
        mask = nn.functional.pad(torch.ones_like(IDS), (left, right))
        output = logits(model, padded, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp_min(0))
        torch.testing.assert_close(output[:, left : left + 6], logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [(), ("input_ids",)], ids=["positional", "keyword"])
def test_a_model_without_a_task(given):
    model = adapted(task_type="CAUSAL_LM")
    bare = PeftModel(llama(), config())
    bare.load_state_dict(model.state_dict())
    bare.eval()
    with torch.no_grad():
        output = bare(input_ids=IDS).logits if given else bare(IDS).logits
    torch.testing.assert_close(output, logits(model))
    tokens = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(bare.generate(IDS, **tokens), model.generate(IDS, **tokens))


def test_offsets_that_the_caller_gives_win():
    model = adapted()
    torch.testing.assert_close(logits(model, alora_offsets=OFFSETS), logits(model))
    assert torch.equal(logits(model, alora_offsets=[None] * 3), logits(model.get_base_model()))
    assert not torch.allclose(logits(model, alora_offsets=[6, 6, 6]), logits(model))


def test_only_embeddings_warn_and_use_the_base_model():
    model = adapted()
    embeds = model.get_input_embeddings()(IDS)
    with pytest.warns(UserWarning, match="no input_ids are given.*base model is used.*alora_offsets"), torch.no_grad():
        output = model(inputs_embeds=embeds).logits
    with model.disable_adapter():
        assert torch.equal(output, logits(model))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds, alora_offsets=OFFSETS).logits, logits(model))


def test_disabled_it_is_the_base_model():
    base = llama()
    expected = logits(base)
    model = adapted(base)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_the_layers_know_nothing_after_the_call():
    model = adapted()
    logits(model)
    assert model.base_model.roster.inputs.current is None
    model.generate(IDS, max_new_tokens=1, attention_mask=torch.ones_like(IDS))
    assert "prepare_inputs_for_generation" not in model.get_base_model().__dict__


def test_an_adapter_on_embeddings():
    base = llama()
    model = adapted(base, target_modules=["embed_tokens"])
    with torch.no_grad():
        embeddings = base.model.embed_tokens
        with embeddings.roster.inputs.given({"alora_offsets": OFFSETS}):
            output = embeddings(IDS)
        plain = embeddings.base_layer(IDS)
        assert torch.equal(output[~ACTING], plain[~ACTING])
        torch.testing.assert_close(output[ACTING], (plain + embeddings.term(IDS, "default"))[ACTING])
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model)[~ACTING], expected[~ACTING])


def test_two_active_ones_are_invoked_each_by_its_own_tokens():
    model = adapted()
    model.add_adapter("other", config([8]))
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    seen = {}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, args: seen.update(module.call_input("alora_offsets")))
    logits(model)
    assert seen == {"default": tuple(OFFSETS), "other": (3, None, 5)}


def test_an_alora_beside_a_plain_adapter():
    model = adapted()
    model.add_adapter("plain", config(None))
    model.base_model.set_adapter(["default", "plain"])
    both = logits(model.eval())
    model.set_adapter("plain")
    alone = logits(model)
    assert torch.equal(both[~ACTING], alone[~ACTING])
    assert not torch.allclose(both[ACTING], alone[ACTING])


def test_a_layer_that_sees_all_tokens_as_one_list():
    torch.manual_seed(0)
    small = OPTConfig(
        vocab_size=24,
        hidden_size=16,
        ffn_dim=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    base = OPTForCausalLM(small).eval()
    model = get_peft_model(base, config(target_modules=["fc1", "fc2", "q_proj"])).eval()
    with model.disable_adapter():
        expected = logits(model)
    output = logits(model)
    assert torch.equal(output[~ACTING], expected[~ACTING])
    assert not torch.allclose(output[ACTING], expected[ACTING])
    mixed = logits(model, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed[[0, 2]], output[[0, 2]])
    torch.testing.assert_close(mixed[1], expected[1])


# ---------------------------------------------------------------------------------------------------------- mixed batches


def test_a_mixed_batch_is_row_for_row_what_its_adapters_give():
    model = adapted()
    model.add_adapter("other", config([8]))
    model.add_adapter("plain", config(None))
    ids = torch.cat([IDS, IDS[:1]])
    names = ["other", "default", "plain", "__base__"]
    mixed = logits(model.eval(), ids, adapter_names=names)
    for row, name in enumerate(names[:3]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model, ids)[row], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[3], logits(model, ids)[3], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="no input_ids"), torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), adapter_names=names).logits
    torch.testing.assert_close(embedded[1], logits(model, ids, adapter_names=["__base__"] * 4)[1])


# ------------------------------------------------------------------------------------------------------------- generating


def greedy(model, prompt, steps, **kwargs):
    """The continuation by whole forwards, with the offsets counted by hand."""
    ids = prompt
    for step in range(steps):
        offsets = [None if o is None else o + step for o in alora.offsets_from_end(prompt, INVOCATION)]
        scores = logits(model, ids, alora_offsets=offsets, **kwargs)[:, -1]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {
            "prompt_lookup_num_tokens": 3,
            "eos_token_id": 2,
        },  # transformers 4.57 looks up only with an end, never seen here
    ],
    ids=["cache", "no cache", "static cache", "several tokens at once"],
)
def test_generating_goes_on_as_forwards_do(options):
    model = adapted()
    rows = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    output = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **{**OPTIONS, **options})
    assert torch.equal(output, greedy(model, rows, 6))
    with model.disable_adapter():
        assert not torch.equal(output, model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **OPTIONS))


def test_an_invocation_that_is_generated_does_not_move_the_start():
    model, seen = adapted(), []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.call_input("alora_offsets")["default"]))

    def forced(ids, scores):
        scores[:, INVOCATION[ids.shape[1] % 2]] = 1e9
        return scores

    output = model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        **{**OPTIONS, "max_new_tokens": 4},
        logits_processor=[forced],
    )
    assert output[:, 6:].tolist() == [[5, 6, 5, 6]] * 3
    assert seen == [(5, 3, None), (6, 4, None), (7, 5, None), (8, 6, None)]


def beam_search(model, prompt, steps, beams):
    """The best continuation of one text by beam search over whole forwards."""
    offset = alora.offsets_from_end(prompt, INVOCATION)[0]
    candidates = [(0.0, prompt[0])]
    for step in range(steps):
        ids = torch.stack([ids for _, ids in candidates])
        offsets = [None if offset is None else offset + step] * len(ids)
        scores = logits(model, ids, alora_offsets=offsets)[:, -1].log_softmax(-1)
        extended = [
            (total + scores[row, token].item(), torch.cat([ids, torch.tensor([token])]))
            for row, (total, ids) in enumerate(candidates)
            for token in range(scores.shape[1])
        ]
        candidates = sorted(extended, key=lambda entry: -entry[0])[:beams]
    return candidates[0][1]


def test_beam_search_gives_each_beam_the_offset_of_its_text():
    model = adapted()
    output = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), num_beams=3, **OPTIONS)
    for row in range(3):
        assert torch.equal(output[row], beam_search(model, IDS[row : row + 1], 6, beams=3))


def test_beam_search_of_a_mixed_batch():
    model = adapted()
    model.add_adapter("plain", config(None))
    names = ["default", "plain", "__base__"]
    options = {**OPTIONS, "num_beams": 2, "attention_mask": torch.ones_like(IDS)}
    mixed = model.eval().generate(input_ids=IDS, adapter_names=names, **options)
    alone = model.generate(input_ids=IDS, **options)
    assert torch.equal(mixed[0], alone[0])
    model.set_adapter("plain")
    assert torch.equal(mixed[1], model.generate(input_ids=IDS, **options)[1])


def test_several_samples_per_text():
    model = adapted()
    output = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), **{**OPTIONS, "do_sample": True}, num_return_sequences=2
    )
    assert output.shape == (6, 12)


# --------------------------------------------------------------------------------------------------------------- training


def gradients(model, ids=IDS, **kwargs):
    model.zero_grad()
    model(input_ids=ids, labels=ids, **kwargs).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_only_acting_tokens_train_it():
    model = adapted()
    assert all(grad.any() for grad in gradients(model).values())
    assert len(gradients(model)) == 12
    assert not any(grad.any() for grad in gradients(model, IDS[2:]).values())


def checkpointed(reentrant):
    model = adapted().train()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.config.use_cache = plain.config.use_cache = False
    return model, plain


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, plain = checkpointed(reentrant)
    for ids in (IDS, IDS.flip(0), IDS[1:]):
        expected, found = gradients(plain, ids), gradients(model, ids)
        assert expected.keys() == found.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad)
    with pytest.warns(UserWarning, match="no input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(IDS), labels=IDS).loss.backward()  # inactive, again too
    found = gradients(model)
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(found[name], grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_different_forwards_before_the_backward_pass_are_refused(reentrant):
    model, plain = checkpointed(reentrant)
    loss = model(input_ids=IDS, labels=IDS).loss + model(input_ids=IDS.flip(0), labels=IDS).loss
    with pytest.raises(ValueError, match=r"called twice with different alora_offsets before backward\(\)"):
        loss.backward()


def test_two_forwards_with_the_same_offsets_are_fine():
    model, plain = checkpointed(False)
    (model(input_ids=IDS, labels=IDS).loss + model(input_ids=IDS, labels=IDS).loss).backward()
    expected = gradients(plain)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, 2 * expected[name])


# ------------------------------------------------------------------------------------------------------ what it cannot do


def test_it_cannot_be_merged_and_nothing_is_changed():
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.merge_adapter(safe_merge=True),
        lambda: ALoraLinearVariant.merge_safe(layer, "default", layer.weight),
        lambda: ALoraLinearVariant.merge_unsafe(layer, "default", layer.weight),
        lambda: ALoraLinearVariant.unmerge(layer, "default", layer.weight),
    ):
        with pytest.raises(NotImplementedError, match=r"model\.layers\.\d.*'default' is an aLoRA.*no merged weight"):
            attempt()
    assert not model.base_model.roster.batch and layer.merged_adapters == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.supports_lora_conversion()


@pytest.mark.parametrize("base", [nn.Conv2d(3, 4, 2), nn.MultiheadAttention(4, 2)], ids=["conv2d", "attention"])
def test_layers_without_tokens_are_refused(base):
    with pytest.raises(ValueError, match="0.*does not support alora_invocation_tokens"):
        get_peft_model(nn.Sequential(base), config(target_modules=["0"], task_type=None))


def test_another_task_is_warned_of():
    with pytest.warns(UserWarning, match="alora_invocation_tokens act on causal language models.*SEQ_CLS"):
        config(task_type="SEQ_CLS")


def test_transformers_that_is_too_old_is_refused(monkeypatch):
    alora._check_transformers.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.52.0")
    with pytest.raises(ValueError, match=r"transformers 4\.52\.1 or newer, found 4\.52\.0"):
        adapted()
    alora._check_transformers.cache_clear()
    monkeypatch.undo()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    layer_of(nn.Linear(4, 5))
    alora._check_transformers.cache_clear()


def test_hotswapping(tmp_path):
    torch.manual_seed(4)
    new = adapted(tokens=[8])
    new.save_pretrained(tmp_path / "new")
    model = adapted()
    hotswap_adapter(model, tmp_path / "new", "default")
    torch.testing.assert_close(logits(model), logits(new))
    adapted(tokens=None).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="different variants.*in place: alora_invocation_tokens, plain LoRA"):
        hotswap_adapter(model, tmp_path / "plain", "default")


def test_saving_and_loading(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].alora_invocation_tokens == INVOCATION
    torch.testing.assert_close(logits(loaded), logits(model))
