"""Cartridges: which tokens train, how they start at a text, and how several become one."""

from __future__ import annotations

import json
import os

import pytest
import torch
from prompts import (
    DECODERS,
    NEW,
    TASKS,
    N,
    assert_same,
    base_of,
    batch,
    continued_by_hand,
    gemma3,
    generate,
    gpt2,
    llama,
    prompted,
    state_of,
    t5,
    trainable,
)
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache

import peft
from peft import (
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
    prompt_embeddings_from_past_key_values,
)
from peft.tuners.cartridge import CartridgeEncoder
from peft.utils.caches import cache_argument

pytestmark = pytest.mark.compat

FROZEN, TRAINED = (f"prompt_encoder.default.{part}_embedding" for part in ("frozen", "trainable"))
WIDTH = 32


def with_cartridge(make=llama, task="CAUSAL_LM", **options):
    config = CartridgeConfig(**{"task_type": task, "num_virtual_tokens": N, **options})
    return get_peft_model(base_of(make), config).eval()


def encoder_of(model):
    return model.prompt_encoder["default"]


class TestEncoder:
    @pytest.mark.parametrize(
        "frozen, expected",
        [
            (0, {TRAINED: (N, WIDTH)}),
            (1, {FROZEN: (1, WIDTH), TRAINED: (N - 1, WIDTH)}),
            (N, {FROZEN: (N, WIDTH), TRAINED: (0, WIDTH)}),
        ],
    )
    def test_parameters(self, frozen, expected):
        model = with_cartridge(num_frozen_tokens=frozen)
        encoder = encoder_of(model)
        assert type(encoder) is CartridgeEncoder
        names = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("prompt_encoder")}
        assert names == expected
        assert trainable(model) == {TRAINED}
        assert (encoder.frozen_embedding is None) == (frozen == 0)
        parts = [part for part in (encoder.frozen_embedding, encoder.trainable_embedding) if part is not None]
        assert torch.equal(encoder.weight, torch.cat(parts))
        assert torch.equal(encoder.embedding.weight, encoder.weight)

    def test_in_inference_mode_nothing_trains(self):
        assert trainable(with_cartridge(inference_mode=True)) == set()

    def test_starts_standard_normal_the_frozen_tokens_first(self):
        encoder = encoder_of(with_cartridge())
        torch.manual_seed(4)
        encoder.reset_parameters()
        torch.manual_seed(4)
        assert torch.equal(encoder.weight, torch.cat([torch.randn(1, WIDTH), torch.randn(N - 1, WIDTH)]))

    def test_its_rows_by_index(self):
        encoder = encoder_of(with_cartridge())
        assert torch.equal(encoder(torch.tensor([[2, 0]])), encoder.weight[None, [2, 0]])

    def test_keys_and_values_can_be_given(self):
        model, given = with_cartridge(), torch.randn(N, WIDTH)
        encoder_of(model).load_prompt_embeddings(given)
        assert torch.equal(encoder_of(model).frozen_embedding, given[:1])
        assert torch.equal(model.get_prompt_embedding_to_save("default"), given)
        assert trainable(model) == {TRAINED}
        with pytest.raises(ValueError, match=r"shape \(3, 32\).*got \(3, 31\)"):
            encoder_of(model).load_prompt_embeddings(given[:, 1:])

    @pytest.mark.parametrize("frozen, mention", [(-1, "0 or more, got -1"), (N + 1, "num_virtual_tokens=3")])
    def test_frozen_tokens_must_be_among_all(self, frozen, mention):
        with pytest.raises(ValueError, match=mention):
            CartridgeConfig(num_virtual_tokens=N, num_frozen_tokens=frozen)

    def test_checkpointed_layers_take_no_cache(self):
        base = base_of(llama)
        base.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="CARTRIDGE does not work with gradient checkpointing"):
            get_peft_model(base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))


class TestUse:
    @pytest.mark.parametrize("make", [*DECODERS, gemma3])
    def test_computes_what_a_prefix_of_the_same_keys_and_values_does(self, make):
        model, inputs = with_cartridge(make), batch()
        prefix = get_peft_model(base_of(make), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
        prefix.prompt_encoder["default"].load_prompt_embeddings(model.get_prompt_embedding_to_save("default"))
        assert torch.equal(model(**inputs).logits, prefix(**inputs).logits)
        for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
            expected = continued_by_hand(model, **inputs, count=True)
            assert torch.equal(generate(model, **inputs, **options), expected)

    def test_a_step_changes_exactly_the_tokens_that_train(self):
        model, inputs = with_cartridge(), batch()
        before = state_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        assert_same(before, state_of(model), but={TRAINED})

    @pytest.mark.parametrize("frozen", [0, 1, N])
    def test_saved_as_one_tensor_and_loaded(self, frozen, tmp_path):
        model, inputs = with_cartridge(num_frozen_tokens=frozen), batch()
        output = model(**inputs).logits
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert saved.keys() == {"prompt_embeddings"}
        assert torch.equal(saved["prompt_embeddings"], encoder_of(model).weight)
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path)
        assert torch.equal(loaded(**inputs).logits, output)
        assert trainable(loaded) == set()
        encoder_of(model).reset_parameters()
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert torch.equal(model(**inputs).logits, output)
        assert trainable(model) == {TRAINED}


def filled(ids=None, make=llama, **options):
    """A base model, and the cache of a text with it."""
    base = base_of(make)
    ids = batch(padding=(0,))["input_ids"] if ids is None else ids
    cache = DynamicCache()
    with torch.no_grad():
        base(ids, use_cache=True, **{cache_argument(base.forward): cache})
    return base, cache


class Legacy:
    """A cache of older libraries."""

    def __init__(self, layers):
        self.layers = layers

    def to_legacy_cache(self):
        return self.layers


ZEROS = torch.zeros(1, 2, 5, 4)


class TestRowsOfACache:
    def test_are_keys_and_values_by_layer(self):
        _, cache = filled()
        found = prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=N)
        assert found.shape == (N, 4 * 8)
        parts = found.view(N, 4, 1, 8)
        for layer, (keys, values, *_) in enumerate(cache):
            assert torch.equal(parts[:, 2 * layer], keys[0, :, :N].transpose(0, 1))
            assert torch.equal(parts[:, 2 * layer + 1], values[0, :, :N].transpose(0, 1))
        assert not found.requires_grad

    def test_of_every_kind_of_cache(self):
        _, cache = filled()
        expected = prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=N)
        layers = tuple((keys, values) for keys, values, *_ in cache)
        longer = [(keys, values, None) for keys, values in layers]
        for kind in (layers, longer, iter(longer), Legacy(layers), EncoderDecoderCache(cache, filled()[1])):
            assert torch.equal(prompt_embeddings_from_past_key_values(kind, num_virtual_tokens=N), expected)

    @pytest.mark.parametrize(
        "cache, tokens, error, mention",
        [
            (3, 2, TypeError, "got int"),
            ("keys", 2, TypeError, "got str"),
            ((), 2, ValueError, "no layer"),
            (("a",), 2, ValueError, r"Layer 0.*expected a tuple \(keys, values\), found 'a'"),
            (((ZEROS,),), 2, ValueError, "Layer 0"),
            (((ZEROS[0], ZEROS[0]),), 2, ValueError, r"keys of layer 0.*found shape \(2, 5, 4\)"),
            (((ZEROS, None),), 2, ValueError, "values of layer 0.*found NoneType"),
            (((ZEROS.expand(2, 2, 5, 4),) * 2,), 2, ValueError, r"one text \(batch 1\), found 2"),
            (((ZEROS,) * 2,), 6, ValueError, "at least 6 tokens, found 5"),
            (((ZEROS,) * 2,), 0, ValueError, "num_virtual_tokens must be a positive number, got 0"),
            (
                ((ZEROS,) * 2, (ZEROS[:, :1],) * 2),
                2,
                ValueError,
                r"keys of layer 1.*\(2, 4\) as in layer 0, found \(1, 4\)",
            ),
            (((ZEROS, ZEROS[..., :3]),), 2, ValueError, r"values of layer 0.*found \(2, 3\)"),
        ],
        ids=str,
    )
    def test_what_is_not_one_is_named(self, cache, tokens, error, mention):
        with pytest.raises(error, match=mention):
            prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=tokens)


class Tokenizer:
    """A token per letter; as a system message, one more in front."""

    def __init__(self, template=True):
        self.template = template

    def __call__(self, text, return_tensors=None):
        ids = torch.tensor([[3 + ord(letter) % 40 for letter in text]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def apply_chat_template(self, messages, **options):
        assert options == {
            "tokenize": True,
            "add_generation_prompt": False,
            "return_dict": False,
            "return_tensors": "pt",
        }
        if self.template is not True:
            raise self.template
        ((role, text),) = [(message["role"], message["content"]) for message in messages]
        assert role == "system"
        return torch.cat([torch.tensor([[1]]), self(text)["input_ids"]], dim=1)


class TestStartAtAText:
    @pytest.mark.parametrize("method", [CartridgeConfig, PrefixTuningConfig])
    @pytest.mark.parametrize("make", [*DECODERS, gemma3])
    def test_the_first_tokens_have_the_effect_of_the_text(self, method, make):
        ids = batch(padding=(0,))["input_ids"]
        base, cache = filled(ids, make)
        expected = base(ids).logits[:, N:]
        model = get_peft_model(base, method(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
        loaded = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        assert torch.equal(loaded, prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=N))
        assert torch.equal(loaded, model.get_prompt_embedding_to_save("default"))
        torch.testing.assert_close(model(ids[:, N:]).logits, expected)

    @pytest.mark.parametrize(
        "options, ids",
        [
            ({}, "\x01hello"),
            ({"use_chat_template": False}, "hello"),
            ({"max_length": 4}, "\x01hel"),
            ({"num_virtual_tokens": N}, "\x01hello"),
        ],
        ids=str,
    )
    def test_reads_the_text_with_the_base_model(self, options, ids):
        model = with_cartridge().train()
        loaded = initialize_kv_prefix_from_text(model, Tokenizer(), text="hello", **options)
        tokens = torch.tensor([[1 if letter == "\x01" else 3 + ord(letter) % 40 for letter in ids]])
        expected = prompt_embeddings_from_past_key_values(filled(tokens)[1], num_virtual_tokens=N)
        torch.testing.assert_close(loaded, expected)
        assert torch.equal(model.get_prompt_embedding_to_save("default"), loaded)
        assert model.training
        assert trainable(model) == {TRAINED}

    def test_without_a_template_the_text_is_taken_as_it_is(self):
        from jinja2 import TemplateError

        model = with_cartridge()
        expected = initialize_kv_prefix_from_text(model, Tokenizer(), text="hello", use_chat_template=False)
        for error in (ValueError("there is none"), TemplateError("no system message")):
            loaded = initialize_kv_prefix_from_text(model, Tokenizer(template=error), text="hello")
            assert torch.equal(loaded, expected)
        with pytest.raises(RuntimeError, match="oh"):
            initialize_kv_prefix_from_text(model, Tokenizer(template=RuntimeError("oh")), text="hello")

    def test_windows_of_attention_do_not_cut_the_text(self):
        model, text = with_cartridge(gemma3), "a long text, longer than a window"
        loaded = initialize_kv_prefix_from_text(model, Tokenizer(), text=text)
        short = initialize_kv_prefix_from_text(model, Tokenizer(), text=text, max_length=N)
        torch.testing.assert_close(loaded, short)

    def test_another_adapter_than_the_active_one(self):
        model = with_cartridge()
        model.add_adapter("b", CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        before = state_of(model)
        loaded = initialize_kv_prefix_from_text(model, Tokenizer(), text="hello", adapter_name="b")
        assert len(loaded) == 2
        changed = {f"prompt_encoder.b.{part}_embedding" for part in ("frozen", "trainable")}
        assert_same(before, state_of(model), but=changed)

    @pytest.mark.parametrize(
        "make, options, error, mention",
        [
            (with_cartridge, {"adapter_name": "defaut"}, KeyError, "'defaut'; known are .*'default'"),
            (with_cartridge, {"adapter_name": "x"}, ValueError, "There is no adapter 'x'"),
            (with_cartridge, {"num_virtual_tokens": 2}, ValueError, r"shape \(3, 32\).*got \(2, 32\)"),
            (prompted, {}, ValueError, "'default' is of PROMPT_TUNING"),
            (lambda: with_cartridge(t5, "SEQ_2_SEQ_LM"), {}, ValueError, "two stacks"),
            (
                lambda: get_peft_model(
                    base_of(llama),
                    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True),
                ),
                {},
                ValueError,
                "prefix_projection=True",
            ),
        ],
    )
    def test_what_cannot_start_there_is_named(self, make, options, error, mention):
        model = make()
        before = state_of(model)
        with pytest.raises(error, match=mention):
            initialize_kv_prefix_from_past_key_values(model, past_key_values=filled()[1], **options)
        with pytest.raises(error, match=mention):
            initialize_kv_prefix_from_text(model, Tokenizer(), text="hello", **options)
        assert_same(before, state_of(model))

    def test_a_text_that_is_too_short(self):
        with pytest.raises(ValueError, match="has 2 tokens, and the adapter 'default' needs 3"):
            initialize_kv_prefix_from_text(with_cartridge(), Tokenizer(), text="a")

    def test_a_model_that_reads_both_ways_has_no_text_to_start_at(self):
        model = with_cartridge(TASKS["SEQ_CLS"], "SEQ_CLS")
        with pytest.raises(ValueError, match="CAUSAL_LM, the adapter 'default' has .*SEQ_CLS"):
            initialize_kv_prefix_from_text(model, Tokenizer(), text="hello")


def saved(folder, tokens, frozen=1, seed=0, make=llama, **options):
    model = with_cartridge(make, num_virtual_tokens=tokens, num_frozen_tokens=frozen, **options)
    torch.manual_seed(seed)
    encoder_of(model).reset_parameters()
    model.save_pretrained(folder)
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


class TestComposition:
    def test_tokens_stand_one_behind_the_other(self, tmp_path):
        sizes = [(4, 2), (3, 0), (2, 1)]
        models = [saved(tmp_path / str(i), tokens, frozen, i) for i, (tokens, frozen) in enumerate(sizes)]
        paths = [tmp_path / "0", str(tmp_path / "1"), tmp_path / "2"]
        assert compose_cartridge_adapters(paths, output_path=tmp_path / "all") is None
        assert set(contents(tmp_path / "all")) == {"adapter_config.json", "adapter_model.safetensors"}
        assert set(os.listdir(tmp_path)) == {"0", "1", "2", "all"}
        rows = load_file(tmp_path / "all" / "adapter_model.safetensors")
        expected = torch.cat([encoder_of(model).weight for model in models])
        assert rows.keys() == {"prompt_embeddings"}
        assert torch.equal(rows["prompt_embeddings"], expected)
        config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
        first = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
        assert config == {**first, "num_virtual_tokens": 9}
        loaded = PeftModel.from_pretrained(base_of(llama), tmp_path / "all")
        assert torch.equal(encoder_of(loaded).frozen_embedding, expected[:2])
        assert generate(loaded, **batch()).shape == (3, 6 + NEW)

    def test_in_torchs_format_in_place_of_another(self, tmp_path):
        for name in "ab":
            saved(tmp_path / name, 2)
        paths, output = [tmp_path / "a", tmp_path / "b"], tmp_path / "deep" / "all"
        compose_cartridge_adapters(paths, output_path=output)
        compose_cartridge_adapters(paths, output_path=output, safe_serialization=False)
        assert set(contents(output)) == {"adapter_config.json", "adapter_model.bin"}
        assert encoder_of(PeftModel.from_pretrained(base_of(llama), output)).weight.shape == (4, WIDTH)

    @pytest.mark.parametrize(
        "other, mention",
        [
            ({"make": gpt2}, "equal in token_dim.*has 8.*has 16"),
            ({"make": TASKS["SEQ_CLS"], "task": "SEQ_CLS"}, "equal in task_type"),
            ({"make": lambda: two_layers_more()}, "equal in num_layers"),
        ],
        ids=["width", "task", "layers"],
    )
    def test_what_does_not_fit_is_named(self, other, mention, tmp_path):
        saved(tmp_path / "a", 2)
        saved(tmp_path / "b", 2, **other)
        with pytest.raises(ValueError, match=mention):
            compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "all")
        assert contents(tmp_path / "all") is None

    def spoil(self, folder, change):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    @pytest.mark.parametrize(
        "change, mention",
        [
            (lambda state: state.update(head=torch.zeros(1)), r"has \['head', 'prompt_embeddings'\]"),
            (lambda state: state.update(prompts=state.pop("prompt_embeddings")), r"alone; .* has \['prompts'\]"),
            (lambda state: state.update(prompt_embeddings=torch.zeros(3, WIDTH)), r"\(2, 32\), found \(3, 32\)"),
            (lambda state: state["prompt_embeddings"].fill_(torch.nan), "b.*NaN"),
        ],
    )
    def test_weights_that_do_not_fit_are_named(self, change, mention, tmp_path):
        for name in "ab":
            saved(tmp_path / name, 2)
        self.spoil(tmp_path / "b", change)
        with pytest.raises(ValueError, match=mention):
            compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / "all")
        assert contents(tmp_path / "all") is None

    def test_there_must_be_two_cartridges_and_a_folder_to_write(self, tmp_path):
        saved(tmp_path / "a", 2)
        prefix = get_peft_model(base_of(llama), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
        prefix.save_pretrained(tmp_path / "prefix")
        output = {"output_path": tmp_path / "all"}
        for paths in ([], [tmp_path / "a"], str(tmp_path / "a")):
            with pytest.raises(ValueError, match="at least 2 cartridges"):
                compose_cartridge_adapters(paths, **output)
        with pytest.raises(ValueError, match="prefix' is no cartridge but PREFIX_TUNING"):
            compose_cartridge_adapters([tmp_path / "a", tmp_path / "prefix"], **output)
        with pytest.raises(ValueError, match="nowhere"):
            compose_cartridge_adapters([tmp_path / "a", tmp_path / "nowhere"], **output)
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FileExistsError, match="file' is a file"):
            compose_cartridge_adapters([tmp_path / "a"] * 2, output_path=tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"
        assert set(os.listdir(tmp_path)) == {"a", "prefix", "file"}

    def test_a_failure_leaves_the_folder_as_it_was(self, tmp_path, monkeypatch):
        for name in "ab":
            saved(tmp_path / name, 2)
        paths, output = [tmp_path / "a", tmp_path / "b"], tmp_path / "all"
        compose_cartridge_adapters(paths, output_path=output)
        before = contents(output)

        def fail(self, *args, **kwargs):
            raise OSError("no space")

        monkeypatch.setattr(CartridgeConfig, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space"):
            compose_cartridge_adapters(paths * 2, output_path=output)
        with pytest.raises(OSError, match="no space"):
            compose_cartridge_adapters(paths, output_path=tmp_path / "new")
        assert contents(output) == before
        assert set(os.listdir(tmp_path)) == {"a", "b", "all"}


def two_layers_more():
    config = llama().config
    config.num_hidden_layers += 2
    return type(llama())(config)


def test_the_helpers_are_public():
    for helper in (
        compose_cartridge_adapters,
        initialize_kv_prefix_from_past_key_values,
        initialize_kv_prefix_from_text,
        prompt_embeddings_from_past_key_values,
    ):
        assert getattr(peft, helper.__name__) is helper
        assert helper.__name__ in peft.__all__
