"""The life of an adapter inside transformers models, through transformers' own calls."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import life  # noqa: E402
from life import Door, PeftModelDoor  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper  # noqa: E402

pytestmark = pytest.mark.compat


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0)
    return GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )


def tokens(dtype):
    return {"input_ids": torch.tensor([[1, 5, 7, 2], [3, 9, 4, 8]])}


MODELS = {
    "llama": (llama, tokens, ["q_proj", "v_proj"], ["lm_head"]),
    "gpt2": (gpt2, tokens, ["c_attn"], ["ln_f"]),
    "bert": (bert, tokens, ["query", "value"], ["classifier"]),
}


class TransformersDoor(Door):
    """The calls of transformers' adapter mixin."""

    def fresh(self):
        return type(self)(self.make, self.make_inputs, self.targets, self.saved, dtype=self.dtype)

    def add(self, name, copies=True, **options):
        self.model.add_adapter(self.config(copies, **options), adapter_name=name)

    def set(self, name):
        self.model.set_adapter(name)

    def set_list(self, names):
        self.model.set_adapter(names)

    def active(self):
        return self.model.active_adapters()

    def disable(self):
        self.model.disable_adapters()

    def enable(self):
        self.model.enable_adapters()

    def delete(self, name):
        self.model.delete_adapter(name)

    def save(self, name, folder):
        active = self.active()
        self.set(name)
        self.model.save_pretrained(folder)
        self.set_list(active)

    def load(self, folder, name, trainable=False):
        self.model.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)


LACKS = {"merge_and_unmerge", "unload_after_merging", "unload"}
"""transformers' mixin has no call to merge adapters or to take them out."""

CASES = [
    pytest.param(door, model, name, frozen, dtype, id=f"{door.__name__}-{model}-{name}-{frozen}-{dtype}")
    for door in (TransformersDoor, PeftModelDoor)
    for model in MODELS
    for name in life.STEPS
    if door is PeftModelDoor or name not in LACKS
    for frozen in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("door_cls, model, name, frozen, dtype", CASES)
def test_step(door_cls, model, name, frozen, dtype, tmp_path):
    life.run(name, door_cls(*MODELS[model], frozen=frozen, dtype=dtype), tmp_path)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestFiles:
    def test_saved_by_transformers_loads_as_a_peft_model(self, tmp_path):
        door = TransformersDoor(*MODELS["llama"])
        door.add("a")
        door.perturb("a", 1)
        door.model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        assert torch.equal(door.out(loaded), door.out())
        assert trainable(loaded) == set()

    def test_saved_by_a_peft_model_loads_in_transformers(self, tmp_path):
        door = PeftModelDoor(*MODELS["llama"])
        door.add("default")
        door.perturb("default", 1)
        door.model.save_pretrained(tmp_path)
        model = llama()
        model.load_adapter(str(tmp_path))
        assert torch.equal(door.out(model), door.out())
        assert trainable(model) == set()

    def test_loaded_for_inference_stays_frozen(self, tmp_path):
        door = TransformersDoor(*MODELS["llama"])
        door.add("a")
        door.save("a", tmp_path)
        fresh = door.fresh()
        fresh.load(tmp_path, "a")
        assert fresh.trainable() == set()
        fresh.disable()
        fresh.enable()
        assert fresh.trainable() == set()


class TestTiedEmbeddings:
    def config(self, **options):
        return LoraConfig(r=2, target_modules=["q_proj"], **options)

    def test_copies_stay_tied(self):
        model = get_peft_model(
            llama(tied=True), self.config(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        )
        base = model.get_base_model()
        assert isinstance(base.lm_head, ModulesToSaveWrapper)
        embedding, head = base.model.embed_tokens.modules_to_save["default"], base.lm_head.modules_to_save["default"]
        assert embedding.weight is head.weight
        assert embedding.weight.requires_grad
        before = model(**tokens(None)).logits
        with torch.no_grad():
            embedding.weight.add_(0.1)
        assert not torch.equal(model(**tokens(None)).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(**tokens(None)).logits, llama(tied=True)(**tokens(None)).logits)

    def test_without_the_option_the_head_keeps_the_original(self):
        with pytest.warns(UserWarning, match="ensure_weight_tying"):
            model = get_peft_model(llama(tied=True), self.config(modules_to_save=["embed_tokens"]))
        base = model.get_base_model()
        assert base.lm_head.weight is base.model.embed_tokens.original_module.weight
        assert trainable(model) >= {"base_model.model.model.embed_tokens.modules_to_save.default.weight"}

    @pytest.mark.parametrize("tied", [False, True])
    def test_token_rows_follow_the_life_cycle(self, tied):
        base = llama(tied=tied).eval()
        plain = base(**tokens(None)).logits
        model = base
        for name in ("a", "b"):
            model.add_adapter(self.config(trainable_token_indices=[1, 5]), adapter_name=name)
            with torch.no_grad():
                model.model.embed_tokens.token_adapter.trainable_tokens_delta[name].add_(1.0)
        wrapper = model.model.embed_tokens
        assert isinstance(wrapper, TrainableTokensWrapper)
        assert isinstance(model.lm_head, TrainableTokensWrapper) is tied
        assert {name for name in trainable(model) if "token" in name} == {
            "model.embed_tokens.token_adapter.trainable_tokens_delta.b"
        }
        model.set_adapter("a")
        assert {name for name in trainable(model) if "token" in name} == {
            "model.embed_tokens.token_adapter.trainable_tokens_delta.a"
        }
        output = model(**tokens(None)).logits
        assert not torch.equal(output, plain)
        model.disable_adapters()
        assert torch.equal(model(**tokens(None)).logits, plain)
        assert trainable(model) == set()
        model.enable_adapters()
        assert torch.equal(model(**tokens(None)).logits, output)
        model.delete_adapter("a")
        assert wrapper.active_adapters == ["b"]
        model.delete_adapter("b")
        assert torch.equal(model(**tokens(None)).logits, plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(
            llama().train(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        )
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        model(**tokens(None), labels=tokens(None)["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_a_mixed_batch_goes_through_wrappers():
    door = PeftModelDoor(*MODELS["llama"])
    door.two()
    single = {"__base__": door.base_output}
    for name in ("a", "b"):
        door.set(name)
        single[name] = door.out()
    rows = ["b", "__base__"]
    with torch.no_grad():
        mixed = door.model(**tokens(None), adapter_names=rows).logits
    for row, name in enumerate(rows):
        assert torch.allclose(mixed[row], single[name][row], atol=1e-5)
