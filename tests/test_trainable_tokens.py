"""Trainable tokens: selected rows of an embedding train, and of what is tied to it; alone or beside LoRA."""

import copy
import pickle

import pytest
import torch
from fuzzing import whole_or_not_at_all
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import peft
from peft import LoraConfig, PeftModel, TrainableTokensConfig, functional, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer


class Net(nn.Module):
    def __init__(self, embed=None):
        super().__init__()
        self.embed = nn.Embedding(10, 4) if embed is None else embed
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.embed(x))


def config(*indices, **options):
    return TrainableTokensConfig(**{"token_indices": list(indices), "target_modules": ["embed"], **options})


def adapted(*indices, model=None, adapter_name="default", **options):
    return get_peft_model(Net() if model is None else model, config(*indices, **options), adapter_name).eval()


def layer_of(model, name="embed"):
    return model.base_model.model.get_submodule(name)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(model, adapter="default"):
    """Give an adapter rows of its own."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and layer.tied_adapter is None:
            nn.init.normal_(layer.trainable_tokens_delta[adapter])
    return model


# ----------------------------------------------------------------------------------------------------- the mathematics


def worked_example():
    embed = nn.Embedding(3, 2)
    embed.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    return adapted(2, 0, model=nn.Sequential(embed), target_modules=["0"])


def test_worked_example():
    model = worked_example()
    layer = layer_of(model, "0")
    delta = layer.trainable_tokens_delta["default"]
    assert delta.tolist() == layer.trainable_tokens_original["default"].tolist() == [[5.0, 6.0], [1.0, 2.0]]
    delta.data = torch.tensor([[9.0, 9.0], [7.0, 7.0]])
    rows = [[7.0, 7.0], [3.0, 4.0], [9.0, 9.0]]
    assert model(torch.arange(3)).tolist() == rows
    assert layer.get_merged_weights(["default"]).tolist() == rows
    model.merge_adapter()
    assert layer.weight.tolist() == model(torch.arange(3)).tolist() == rows
    model.unmerge_adapter()
    assert layer.weight.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


class Scaled(nn.Embedding):
    """As Gemma has it."""

    embed_scale = 3.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale


class Shifted(nn.Embedding):
    """With a forward that only the layer itself knows."""

    def forward(self, x, shift=1.0):
        return super().forward(x) + shift


class Capped(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


TABLES = {
    "embedding": lambda: nn.Embedding(10, 4),
    "with a padding row": lambda: nn.Embedding(10, 4, padding_idx=3),
    "with a largest norm": lambda: nn.Embedding(10, 4, max_norm=0.5),
    "with gradients by frequency": lambda: nn.Embedding(10, 4, scale_grad_by_freq=True),
    "scaled": lambda: Scaled(10, 4),
    "with a forward of its own": lambda: Shifted(10, 4),
    "bag": lambda: nn.EmbeddingBag(10, 4, mode="sum"),
    "linear": lambda: nn.Linear(4, 10),
    "linear without bias": lambda: nn.Linear(4, 10, bias=False),
    "linear with a forward of its own": lambda: Capped(4, 10),
    "transformers Conv1D": lambda: Conv1D(10, 4),
}


def inputs_of(base):
    ids = torch.tensor([[1, 3, 9, 3], [0, 5, 7, 1]])
    return ids if isinstance(base, (nn.Embedding, nn.EmbeddingBag)) else torch.randn(2, 3, 4)


def replaced(base, tokens, rows):
    """The same layer with these rows in its weight, as a reference."""
    twin = copy.deepcopy(base)
    table = twin.weight.data.T if isinstance(base, Conv1D) else twin.weight.data
    table[tokens] = rows
    return twin.requires_grad_(True)


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_table(name):
    base = TABLES[name]()
    x, tokens = inputs_of(base), [3, 7, 1]
    plain, weight = copy.deepcopy(base), base.weight.data.clone()
    model = trained(adapted(*tokens, model=nn.Sequential(base), target_modules=["0"]))
    layer = layer_of(model, "0")
    delta = layer.trainable_tokens_delta["default"]
    assert delta.shape == (3, 4)
    reference = replaced(plain, tokens, delta.data)
    out, expected = model(x), reference(x)
    torch.testing.assert_close(out, expected)

    expected.square().sum().backward()
    out.square().sum().backward()
    grad = reference.weight.grad.T if isinstance(base, Conv1D) else reference.weight.grad
    torch.testing.assert_close(delta.grad, grad[tokens])

    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    if base.__dict__.get("max_norm") is None:  # which makes a layer write to its own weight
        model.merge_adapter()
        torch.testing.assert_close(model(x), out)
        model.unmerge_adapter()
        assert torch.equal(layer.weight, weight)


def test_the_padding_row_gets_no_gradient():
    model = adapted(3, 4, model=Net(nn.Embedding(10, 4, padding_idx=3)))
    model(torch.tensor([[3, 4]])).sum().backward()
    first, second = layer_of(model).trainable_tokens_delta["default"].grad
    assert (first == 0).all() and (second != 0).all()


def test_a_sparse_embedding_trains():
    model = adapted(3, model=Net(nn.Embedding(10, 4, sparse=True)))
    model(torch.tensor([[3, 4]])).sum().backward()
    assert (layer_of(model).trainable_tokens_delta["default"].grad != 0).all()


def test_the_bias_of_a_linear_layer_is_kept():
    model = adapted(3, target_modules=["head"])
    x = torch.arange(10)
    torch.testing.assert_close(model(x), Net.forward(model.unload(), x))


def test_further_arguments_reach_the_base_layer():
    model = adapted(3, model=Net(Shifted(10, 4)))
    layer, x = layer_of(model), torch.arange(10)
    assert torch.equal(layer(x, shift=2.0), layer(x, 2.0))
    torch.testing.assert_close(layer(x, shift=2.0), layer(x) + 1)


def test_no_weight_of_the_size_of_the_table_is_formed():
    sizes = []
    model = adapted(3, 4, model=Net(nn.Embedding(1000, 4)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        model(torch.tensor([[3, 4]])).sum().backward()
    assert max(sizes) < 1000


def test_it_compiles_without_a_break():
    model, x = trained(adapted(3, 4)), torch.arange(10)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


# ------------------------------------------------------------------------------------------------------------ indices


@pytest.mark.parametrize("index", [10, -1])
def test_indices_outside_the_table(index):
    net = Net()
    with pytest.raises(IndexError, match=rf"10 rows.*0 to 9; got \[{index}\] for the adapter 'default'"):
        adapted(1, index, model=net)
    assert type(net.embed) is nn.Embedding


def test_no_indices_change_nothing():
    model, x = adapted(), torch.arange(10)
    assert layer_of(model).trainable_tokens_delta["default"].shape == (0, 4)
    expected = Net.forward(copy.deepcopy(model).unload(), x)
    assert torch.equal(model(x), expected)
    assert torch.equal(layer_of(model).get_merged_weights(["default"]), layer_of(model).weight)
    model.merge_adapter()
    assert torch.equal(model(x), expected)


def test_an_adapter_without_indices_beside_one_with():
    model, x = trained(adapted(1, adapter_name="some"), "some"), torch.arange(10)
    expected = model(x)
    model.add_adapter("none", config())
    model.base_model.set_adapter(["none", "some"])
    assert torch.equal(model(x), expected)


def test_of_an_index_listed_twice_the_last_row_counts():
    model = adapted(1, 1)
    layer = layer_of(model)
    layer.trainable_tokens_delta["default"].data = torch.tensor([[1.0] * 4, [2.0] * 4])
    assert layer(torch.tensor([1])).tolist() == [[2.0] * 4]
    model.merge_adapter()
    assert layer.weight[1].tolist() == [2.0] * 4


def test_indices_as_a_tensor(tmp_path):
    given = TrainableTokensConfig(token_indices=torch.tensor([1, 2]), target_modules=["embed"])
    assert given.token_indices == [1, 2]
    get_peft_model(Net(), given).save_pretrained(tmp_path)
    assert TrainableTokensConfig.from_pretrained(tmp_path).token_indices == [1, 2]


# ------------------------------------------------------------------------------------------ the start


def test_the_start_is_the_rows_that_are_there():
    net, x = Net(), torch.arange(10)
    before = net(x)
    model = adapted(3, 1, model=net)
    assert torch.equal(model(x), before)
    assert trainable(model) == {"base_model.model.embed.trainable_tokens_delta.default"}


def test_a_normal_start():
    net = Net()
    torch.manual_seed(3)
    model = adapted(3, 1, model=net, init_weights=False)
    torch.manual_seed(3)
    assert torch.equal(layer_of(model).trainable_tokens_delta["default"], torch.randn(2, 4))


@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_on_a_half_precision_base(autocast):
    model = get_peft_model(Net().bfloat16(), config(3), autocast_adapter_dtype=autocast)
    layer, expected = layer_of(model), torch.float32 if autocast else torch.bfloat16
    assert (
        layer.trainable_tokens_delta["default"].dtype == layer.trainable_tokens_original["default"].dtype == expected
    )
    assert layer(torch.arange(10)).dtype == layer.get_merged_weights(["default"]).dtype == torch.bfloat16


def test_the_rows_can_be_made_without_storage():
    layer = layer_of(get_peft_model(Net(), config(3), low_cpu_mem_usage=True))
    assert layer.trainable_tokens_delta["default"].is_meta and not layer.trainable_tokens_original["default"].is_meta


# ---------------------------------------------------------------------------------------------------- several adapters


def test_two_adapters_of_different_tokens():
    model, x = trained(adapted(1, 2, adapter_name="one"), "one"), torch.arange(10)
    model.add_adapter("two", config(7))
    trained(model, "two")
    layer = layer_of(model)
    model.base_model.set_adapter(["one", "two"])
    rows = layer(x)
    assert torch.equal(rows[[1, 2]], layer.trainable_tokens_delta["one"])
    assert torch.equal(rows[[7]], layer.trainable_tokens_delta["two"])
    others = [0, 3, 4, 5, 6, 8, 9]
    assert torch.equal(rows[others], layer.weight[others])
    before = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), before)


def test_two_adapters_of_one_token_cannot_be_merged_together():
    model = adapted(1, 2, adapter_name="one")
    model.add_adapter("two", config(2, 3))
    with pytest.raises(ValueError, match="'one' and 'two' both train the row of token 2 in embed"):
        model.merge_adapter(["one", "two"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="token 2"):
        model.merge_adapter(["two"])
    model.unmerge_adapter()
    model.base_model.set_adapter(["one", "one"])
    assert model(torch.arange(10)).shape == (10, 10)


def beside_lora(*indices):
    return LoraConfig(r=2, target_modules=["head"], trainable_token_indices={"embed": list(indices)})


def rivals_in_a_peft_model(make):
    model = get_peft_model(Net(), make(1, 2, 3), "one")
    model.add_adapter("two", make(2, 3, 5))
    return model, model.base_model.set_adapter, model.add_adapter


def rivals_in_a_mixed_model(make):
    model = get_peft_model(Net(), make(1, 2, 3), "one", mixed=True)
    model.add_adapter("two", make(2, 3, 5))
    return model, model.set_adapter, model.add_adapter


def injected_rivals(make):
    model = peft.inject_adapter_in_model(make(2, 3, 5), Net(), "two")

    def add(name, config):
        peft.inject_adapter_in_model(config, model, name)
        functional.set_adapter(model, "one")

    add("one", make(1, 2, 3))
    return model, lambda names: functional.set_adapter(model, names), add


def rivals_on_a_layer(make):
    model, _, add = rivals_in_a_peft_model(make)
    return model, model.base_model.model.embed.set_adapter, add


RIVALS = [
    pytest.param(door, make, id=f"{door.__name__}-{make.__name__}")
    for door in (rivals_in_a_peft_model, rivals_in_a_mixed_model, injected_rivals, rivals_on_a_layer)
    for make in (config, beside_lora)
    if not (door is rivals_in_a_mixed_model and make is config)  # which cannot be mixed
]


@pytest.mark.parametrize("door, make", RIVALS)
def test_two_adapters_of_one_token_cannot_be_active_together(door, make):
    """Refused where they are activated, and nothing changed."""
    model, activate, add = door(make)
    add("three", make(4))
    add("another two", make(5))
    with whole_or_not_at_all(model) as caught:
        activate(["one", "three", "two"])
    (error,) = caught
    assert isinstance(error, ValueError)
    assert all(part in str(error) for part in ("['one', 'two']", "'embed'", "[2, 3]")), error
    model.train()
    assert model(torch.arange(10)).requires_grad
    activate(["one", "one"])
    activate(["one", "three"])
    model.delete_adapter("two") if hasattr(model, "base_model") else functional.delete_adapter(model, "two", "lora_")
    activate(["one", "another two"])


@pytest.mark.parametrize("make", [config, beside_lora], ids=["alone", "beside LoRA"])
def test_an_injection_that_would_activate_two_adapters_of_one_token_is_refused(make):
    model = get_peft_model(Net(), make(1), "one")
    model.add_adapter("two", make(2))
    tuner = model.base_model
    tuner.set_adapter(["one", "two"])
    model.peft_config["three"] = make(1)
    tuner.active_adapter = ["one", "two", "three"]
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"\['one', 'three'\].*\[1\].*'embed'"):
        tuner.inject_adapter(tuner.model, "three")
    del model.peft_config["three"]
    tuner.active_adapter = ["one", "two"]
    assert set(model.state_dict()) == names
    with pytest.raises(ValueError, match="no adapter 'three'"):
        tuner.model.embed.set_adapter("three")
    tuner.set_adapter(["two", "one"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_excludes_each_other_is_known_of_a_duplicate_too(duplicate):
    model = adapted(1, adapter_name="one")
    model.add_adapter("two", config(1))
    with pytest.raises(ValueError, match=r"\['two', 'one'\]"):
        duplicate(model).base_model.set_adapter(["two", "one"])


def test_a_layer_by_itself_knows_what_excludes_each_other():
    layer = TrainableTokensLayer(nn.Embedding(10, 4), "one", token_indices=[1, 2])
    layer.update_layer("two", token_indices=[2])
    layer.set_adapter("one")
    with pytest.raises(ValueError, match=r"\['one', 'two'\].*\[2\]"):
        layer.set_adapter(["one", "two"])
    assert layer.active_adapters == ["one"]


def test_an_adapter_made_while_another_is_merged_starts_from_the_table():
    model = trained(adapted(1, adapter_name="one"), "one")
    original = layer_of(model).weight.clone()
    model.merge_adapter()
    model.add_adapter("two", config(1))
    assert torch.equal(layer_of(model).trainable_tokens_delta["two"], original[[1]])


def test_layers_without_the_active_adapter_are_as_they_were():
    model = adapted(1, adapter_name="one")
    model.add_adapter("two", config(1, target_modules=["head"]))
    model.set_adapter("two")
    layer_of(model).trainable_tokens_delta["one"].data.fill_(9.0)
    torch.testing.assert_close(model(torch.arange(10)), Net.forward(copy.deepcopy(model).unload(), torch.arange(10)))


def test_a_mixed_batch():
    model, x = trained(adapted(1, adapter_name="one"), "one"), torch.ones(3, 2, dtype=torch.long)
    model.add_adapter("two", config(1))
    trained(model, "two")
    rows = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        rows[name] = model(x)[0]
    with model.disable_adapter():
        rows["__base__"] = model(x)[0]
    names = ["two", "__base__", "one"]
    torch.testing.assert_close(model(x, adapter_names=names), torch.stack([rows[name] for name in names]))


def test_deleting():
    model, x = trained(adapted(1, adapter_name="one"), "one"), torch.arange(10)
    layer = layer_of(model)
    model.delete_adapter("one")
    assert (
        not layer.token_indices and not len(layer.trainable_tokens_delta) and not len(layer.trainable_tokens_original)
    )
    assert torch.equal(model(x), Net.forward(copy.deepcopy(model).unload(), x))


def test_safe_merge():
    model = adapted(1)
    layer = layer_of(model)
    layer.trainable_tokens_delta["default"].data[0, 0] = torch.inf
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="embed gives NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


# ------------------------------------------------------------------------------------------------------------ targets


class Nested(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.ModuleDict({"embed_tokens": nn.Embedding(10, 4)}))

    def forward(self, x):
        return sum(child["embed_tokens"](x) for child in self.children())


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_a_model_that_does_not_say_which_its_embedding_is(names):
    model = get_peft_model(Nested(*names), TrainableTokensConfig(token_indices=[1]))
    assert model.base_model.targeted_module_names == [f"{name}.embed_tokens" for name in names]


def test_a_model_without_an_embedding():
    with pytest.raises(peft.NoMatchingPeftModuleError, match="embed_tokens"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), TrainableTokensConfig(token_indices=[1]))


@pytest.mark.parametrize("module", [nn.Conv2d(2, 2, 1), nn.LayerNorm(4), nn.ReLU()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("error", [ValueError, AttributeError])
def test_modules_without_a_table(module, error):
    with pytest.raises(error, match=f"not a {type(module).__name__}"):
        adapted(1, model=Net(module))


@pytest.mark.parametrize("option", ["exclude_modules", "modules_to_save", "layers_to_transform"])
def test_there_are_no_other_options(option):
    with pytest.raises(TypeError, match=option):
        TrainableTokensConfig(**{option: ["x"]})


# ------------------------------------------------------------------------------------------------------- tied models


def llama(tie=True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=tie, **sizes)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=16, **sizes)).eval()


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=16, **sizes)).eval()


class SharedModule(nn.Module):
    """A model whose decoder uses the embedding itself, under another name."""

    _tied_weights_keys = {"decoder.embed.weight": "embed.weight", "head.weight": "embed.weight"}

    class config:
        tie_word_embeddings = True
        model_type = "shared"

        @staticmethod
        def to_dict():
            return {"tie_word_embeddings": True, "model_type": "shared"}

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.decoder = nn.ModuleDict({"embed": self.embed})
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        return self.head(self.embed(input_ids) + self.decoder["embed"](input_ids))


IDS = torch.tensor([[1, 2, 3, 4]])

TIED = {
    "llama": (llama, "model.embed_tokens", ["lm_head"], {"input_ids": IDS}),
    "t5": (
        t5,
        "shared",
        ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "bert": (bert, "bert.embeddings.word_embeddings", ["cls.predictions.decoder"], {"input_ids": IDS}),
    "one module under two names": (SharedModule, "embed", ["decoder.embed", "head"], {"input_ids": IDS}),
}


def out(model, inputs):
    result = model(**inputs)
    return result if torch.is_tensor(result) else result.logits


def tokens(*indices, **options):
    return TrainableTokensConfig(token_indices=list(indices), **options)


@pytest.mark.compat
def test_what_is_tied_uses_the_same_rows(recwarn):
    model = trained(get_peft_model(llama(), tokens(1, 3)))
    embed, head = layer_of(model, "model.embed_tokens"), layer_of(model, "lm_head")
    assert head.tied_adapter is embed and embed.tied_adapter is None
    assert head.trainable_tokens_delta is embed.trainable_tokens_delta
    assert head.trainable_tokens_original is embed.trainable_tokens_original
    assert head.token_indices is embed.token_indices
    hidden = torch.randn(5, 8)
    torch.testing.assert_close(head(hidden), hidden @ embed.get_merged_weights(["default"]).T)
    assert trainable(model) == {"base_model.model.model.embed_tokens.trainable_tokens_delta.default"}
    assert model.base_model.targeted_module_names == ["model.embed_tokens"]
    assert not [warning for warning in recwarn if "tied" in str(warning.message)]


@pytest.mark.compat
@pytest.mark.parametrize("name", TIED)
def test_a_tied_model(name, tmp_path):
    build, embedding, tied, inputs = TIED[name]
    base = build().requires_grad_(False)
    plain = out(base, inputs)
    model = trained(get_peft_model(copy.deepcopy(base), tokens(1, 3)))
    assert model.base_model.model.get_submodule(embedding).tied_adapter is None
    assert all(layer_of(model, other).tied_adapter is layer_of(model, embedding) for other in tied)
    reference = copy.deepcopy(base)
    reference.get_input_embeddings().weight.data[[1, 3]] = layer_of(model, embedding).trainable_tokens_delta["default"]
    expected = out(reference, inputs)
    torch.testing.assert_close(out(model, inputs), expected)

    with model.disable_adapter():
        assert torch.equal(out(model, inputs), plain)
        assert trainable(model) == set()
    assert trainable(model) == {f"base_model.model.{embedding}.trainable_tokens_delta.default"}

    model.save_pretrained(tmp_path)
    keys = {f"base_model.model.{path}.trainable_tokens_delta" for path in [embedding, *tied]}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys
    torch.testing.assert_close(out(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs), expected)

    weight = base.get_input_embeddings().weight
    model.merge_adapter()
    torch.testing.assert_close(out(model, inputs), expected)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model, embedding).weight, weight)
    merged = model.merge_and_unload()
    torch.testing.assert_close(out(merged, inputs), expected)
    assert {name for name, _ in merged.named_modules()} == {name for name, _ in base.named_modules()}
    table = merged.get_input_embeddings().weight
    assert all(merged.get_submodule(other).weight is table for other in tied)


@pytest.mark.compat
@pytest.mark.parametrize("name", TIED)
@pytest.mark.filterwarnings("ignore:The active adapter 'two' was deleted")
def test_a_second_adapter_on_a_tied_model(name):
    build, embedding, tied, inputs = TIED[name]
    model = trained(get_peft_model(build(), tokens(1, 3), "one"), "one")
    before = out(model, inputs)
    model.add_adapter("two", tokens(2))
    trained(model, "two")
    assert not any("base_layer.base_layer" in key for key in model.state_dict())
    assert torch.equal(out(model, inputs), before)
    model.set_adapter("two")
    assert trainable(model) == {f"base_model.model.{embedding}.trainable_tokens_delta.two"}
    assert not torch.allclose(out(model, inputs), before)
    model.delete_adapter("two")
    assert torch.equal(out(model, inputs), before)


@pytest.mark.compat
def test_a_second_file_on_a_tied_model(tmp_path):
    base = llama()
    model = trained(get_peft_model(copy.deepcopy(base), tokens(1, 3)))
    model.save_pretrained(tmp_path)
    other = get_peft_model(base, tokens(2))
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.compat
def test_layers_on_a_common_weight_are_merged_in_any_order():
    model = trained(get_peft_model(llama(), tokens(1, 3)))
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    expected, weight = model(IDS).logits, layers[0].weight.clone()
    for merging in (layers, layers[::-1]):
        for unmerging in (layers, layers[::-1]):
            for layer in merging:
                layer.merge()
                torch.testing.assert_close(model(IDS).logits, expected)
            for layer in unmerging:
                layer.unmerge()
                torch.testing.assert_close(model(IDS).logits, expected)
            assert torch.equal(layers[0].weight, weight)


@pytest.mark.compat
def test_what_the_user_froze_stays_frozen():
    model = get_peft_model(llama(), tokens(1))
    model.base_model.set_requires_grad("default", False)
    with model.disable_adapter():
        pass
    assert trainable(model) == set()


@pytest.mark.compat
def test_listing_both_makes_one_tied_layer(recwarn):
    model = trained(get_peft_model(llama(), tokens(1, 3, target_modules=["embed_tokens", "lm_head"])))
    assert layer_of(model, "lm_head").tied_adapter is layer_of(model, "model.embed_tokens")
    assert sorted(model.base_model.targeted_module_names) == ["lm_head", "model.embed_tokens"]
    assert not [warning for warning in recwarn if "tied" in str(warning.message)]


@pytest.mark.compat
def test_listing_both_on_an_untied_model_makes_two_layers(tmp_path):
    model = get_peft_model(llama(tie=False), tokens(1, 3, target_modules=["embed_tokens", "lm_head"]))
    assert trainable(model) == {
        f"base_model.model.{name}.trainable_tokens_delta.default" for name in ("model.embed_tokens", "lm_head")
    }
    assert layer_of(model, "lm_head").tied_adapter is None


@pytest.mark.compat
def test_listing_the_head_alone_on_a_tied_model():
    with pytest.warns(UserWarning, match=r"\['lm_head'\] are tied.*'model.embed_tokens'"):
        model = trained(get_peft_model(llama(), tokens(1, target_modules=["lm_head"])))
    assert type(layer_of(model, "model.embed_tokens")) is nn.Embedding


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:.*are tied")
@pytest.mark.parametrize("first, second", [(None, ["lm_head"]), (["lm_head"], None)])
def test_adapters_must_agree_on_whether_the_head_shares_rows(first, second):
    model = get_peft_model(llama(), tokens(1, target_modules=first), "one")
    before, names = model(IDS).logits, {name for name, _ in model.named_modules()}
    with pytest.raises(ValueError, match=r"\['one'\] have rows of 'lm_head'"):
        model.add_adapter("two", tokens(2, target_modules=second))
    assert {name for name, _ in model.named_modules()} == names
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.compat
@pytest.mark.parametrize("kept", ["lm_head", "model.embed_tokens"])
def test_a_file_may_have_the_common_rows_once(tmp_path, kept, recwarn):
    base = llama()
    model = trained(get_peft_model(copy.deepcopy(base), tokens(1, 3)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if kept in name}, path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not [warning for warning in recwarn if "lack" in str(warning.message)]


@pytest.mark.compat
def test_an_index_outside_leaves_a_tied_model_as_it_was():
    base = llama()
    with pytest.raises(IndexError):
        get_peft_model(base, tokens(99))
    assert type(base.lm_head) is nn.Linear and type(base.model.embed_tokens) is nn.Embedding
    assert all(parameter.requires_grad for parameter in base.parameters())


# ------------------------------------------------------------------------------------------- beside LoRA, in a wrapper


def lora(indices, **options):
    return LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices, **options)


def wrapper_rows(model, adapter="default"):
    return model.base_model.model.get_input_embeddings().token_adapter.trainable_tokens_delta[adapter]


@pytest.mark.compat
def test_rows_beside_lora():
    base = llama()
    model = get_peft_model(copy.deepcopy(base), lora([1, 3]))
    nn.init.normal_(wrapper_rows(model))
    base.model.embed_tokens.weight.data[[1, 3]] = wrapper_rows(model).data
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    wrapper = model.base_model.model.model.embed_tokens
    torch.testing.assert_close(wrapper.weight, base.model.embed_tokens.weight)
    saved = peft.get_peft_model_state_dict(model)
    assert {name for name in saved if "tokens" in name} == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    }


@pytest.mark.compat
@pytest.mark.parametrize("tie", [True, False])
def test_merging_rows_beside_lora(tie, recwarn):
    base = llama(tie)
    model = get_peft_model(copy.deepcopy(base), lora([1, 3], init_lora_weights=False))
    nn.init.normal_(wrapper_rows(model))
    expected = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, expected)
    assert not [warning for warning in recwarn if "merged" in str(warning.message)]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tie


@pytest.mark.compat
def test_rows_of_several_tables_beside_lora():
    model = get_peft_model(llama(tie=False), lora({"embed_tokens": [1], "lm_head": [2, 3]}))
    assert {name for name in peft.get_peft_model_state_dict(model) if "tokens_delta" in name} == {
        f"base_model.model.{name}.token_adapter.trainable_tokens_delta" for name in ("model.embed_tokens", "lm_head")
    }


@pytest.mark.compat
def test_different_rows_of_tied_tables_beside_lora():
    different = {"embed_tokens": [1], "lm_head": [2]}
    model = get_peft_model(llama(), lora(different))
    assert model.base_model.model.lm_head.token_adapter.tied_adapter is None
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        get_peft_model(llama(), lora(different, ensure_weight_tying=True))
    same = get_peft_model(llama(), lora({"embed_tokens": [1], "lm_head": [1]}))
    assert same.base_model.model.lm_head.token_adapter.tied_adapter is not None


@pytest.mark.compat
@pytest.mark.parametrize(
    "options, error",
    [
        ({"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]}, ValueError),
        ({"trainable_token_indices": {"q_proj": [1]}}, TypeError),
        ({"trainable_token_indices": {"embedding": [1]}}, ValueError),
        ({"trainable_token_indices": [-1]}, IndexError),
        ({"trainable_token_indices": [16]}, IndexError),
        ({"trainable_token_indices": {"norm": [1]}}, ValueError),
    ],
    ids=["saved too", "adapted too", "unknown", "negative", "outside", "no table"],
)
def test_rows_that_cannot_train_beside_lora(options, error):
    base = llama()
    with pytest.raises(error):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], **options))
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:The active adapter 'two' was deleted")
def test_two_adapters_with_rows_beside_lora():
    model = get_peft_model(llama(), lora([1, 3]), "one")
    nn.init.normal_(wrapper_rows(model, "one"))
    before = model(IDS).logits
    model.add_adapter("two", lora([1, 2]))
    nn.init.normal_(wrapper_rows(model, "two"))
    assert torch.equal(model(IDS).logits, before)
    model.set_adapter("two")
    assert not torch.allclose(model(IDS).logits, before)
    assert all(".two" in name for name in trainable(model))
    model.delete_adapter("two")
    assert torch.equal(model(IDS).logits, before)
