"""LoRA itself: what it computes, what its options mean on each kind of layer, and what it refuses."""

import json
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import (
    LoraConfig,
    LoraModel,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import EvaConfig, LoftQConfig
from peft.tuners.lora.layer import Conv1d, Conv2d, Linear, LoraLayer
from peft.tuners.lora.variant import LoraVariant
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from peft.utils.warning import PeftWarning


class Net(nn.Module):
    """A base of one layer, so that tests say what they adapt."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Experts(nn.Module):
    """Two experts as one parameter, (experts, out, in)."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*(shape or (2, 4, 3))))
        self.other = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.weight + self.other, x)


def adapted(layer, **options):
    return get_peft_model(Net(layer), LoraConfig(**{"target_modules": ["layer"], "r": 2, **options}))


def layer_of(model):
    return model.base_model.model.layer


# ------------------------------------------------------------------------------------------------------------- what it does


def test_the_output_gains_the_scaled_product():
    model = adapted(nn.Linear(2, 3), r=1, lora_alpha=4)
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
    x = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    added = torch.tensor([[12.0, 0.0, -12.0], [24.0, 0.0, -24.0]])  # s = 4, A·x = 3 and 6
    torch.testing.assert_close(model(x), layer.base_layer(x) + added)
    assert torch.equal(layer.get_delta_weight("default"), torch.tensor([[4.0, 8.0], [0.0, 0.0], [-4.0, -8.0]]))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4.0), (True, 8.0)])
def test_scaling(rslora, scaling):
    layer = layer_of(adapted(nn.Linear(8, 8), r=4, lora_alpha=16, use_rslora=rslora))
    assert layer.scaling == {"default": scaling}
    layer.set_scale("default", 0.5)
    assert layer.scaling == {"default": scaling / 2}
    layer.scale_layer(3)
    layer.scale_layer(2)
    assert layer.scaling == {"default": scaling * 3}
    layer.unscale_layer(2)
    assert layer.scaling == {"default": scaling * 1.5}
    layer.unscale_layer()
    assert layer.scaling == {"default": scaling}
    layer.set_scale("unknown", 3.0)
    assert layer.scaling == {"default": scaling}


def test_the_first_pattern_that_fits_wins_and_fits_whole_components():
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "ba": nn.Linear(4, 4), "n": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    config = LoraConfig(
        r=1, target_modules=["a", "ba"], rank_pattern={"^a": 2, "a": 3, "n.a": 4}, alpha_pattern={"ba": 5, "a": 6}
    )
    LoraModel(base, config, "default")
    ranks = {name: module.r["default"] for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    assert ranks == {"a": 2, "ba": 1, "n.a": 3}
    alphas = {name: m.lora_alpha["default"] for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    assert alphas == {"a": 6, "ba": 5, "n.a": 6}


SHAPES = {
    "linear": (lambda: nn.Linear(6, 4), {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}),
    "transformers' Conv1D": (lambda: Conv1D(4, 6), {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}),
    "embedding": (lambda: nn.Embedding(9, 5), {"lora_embedding_A": (2, 9), "lora_embedding_B": (5, 2)}),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), {"lora_A.weight": (2, 6, 3), "lora_B.weight": (4, 2, 1)}),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 2)), {"lora_A.weight": (2, 6, 3, 2), "lora_B.weight": (4, 2, 1, 1)}),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), {"lora_A.weight": (2, 6, 3, 3), "lora_B.weight": (4, 1, 1, 1)}),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), {"lora_A.weight": (2, 6, 2, 2, 2), "lora_B.weight": (4, 2, 1, 1, 1)}),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.filterwarnings("ignore:.*groups")
def test_what_is_saved(kind, tmp_path):
    from safetensors.torch import load_file

    make, expected = SHAPES[kind]
    adapted(make()).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {
        name.removeprefix("base_model.model.layer."): tuple(value.shape) for name, value in saved.items()
    } == expected


def test_the_default_start_is_uniform_and_zero():
    layer = layer_of(adapted(nn.Linear(100, 50), r=40))
    A, B = layer.factors("default")
    assert A.abs().max() <= 1 / math.sqrt(100) and abs(A.std() - 0.1 / math.sqrt(3)) < 2e-3
    assert not B.any()


# --------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_parameters": "weight"}, TypeError, "must be a list of names"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, ValueError, "use_dora and megatron_config exclude"),
        (
            {"lora_bias": True, "init_lora_weights": "pissa"},
            ValueError,
            "lora_bias needs init_lora_weights True or False",
        ),
        ({"lora_bias": True, "use_dora": True}, ValueError, "DoRA has no bias term"),
        ({"init_lora_weights": "loftq"}, ValueError, "needs loftq_config"),
        ({"eva_config": 3}, TypeError, "eva_config must be a EvaConfig or a dictionary, got int"),
        ({"eva_config": {"rho": 0.5}}, ValueError, "eva_config: rho must be at least 1, got 0.5"),
        (
            {"target_modules": "a|b", "layers_to_transform": [1]},
            ValueError,
            "layers_to_transform needs target_modules",
        ),
        ({"layers_pattern": "h"}, ValueError, "needs layers_to_transform"),
    ],
)
def test_options_that_do_not_go_together(options, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"), [({"rho": 0.5}, "rho must be at least 1"), ({"tau": 1.5}, "tau must be between 0 and 1")]
)
def test_options_of_eva(options, message):
    with pytest.raises(ValueError, match=message):
        EvaConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loftq_config": LoftQConfig()}, "loftq_config is of no use with init_lora_weights=True"),
        ({"eva_config": EvaConfig()}, "eva_config is of no use with init_lora_weights=True"),
    ],
)
def test_options_without_effect(options, message):
    with pytest.warns(UserWarning, match=message):
        LoraConfig(**options)


def test_loftq_needs_scipy(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs scipy"):
        LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig())


def test_a_rank_is_positive():
    with pytest.raises(ValueError, match="layer must be positive, got r=0"):
        adapted(nn.Linear(4, 4), r=0)


def test_a_bias_where_the_layer_has_none():
    with pytest.warns(PeftWarning, match="layer has no bias, so the adapter 'default' with lora_bias=True"):
        model = adapted(nn.Linear(4, 4, bias=False), lora_bias=True)
    before = layer_of(model).base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="layer has no bias to merge the lora_bias of the adapter 'default' into"):
        model.merge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, before)
    with pytest.raises(ValueError, match="lora_bias is not supported on an Embedding"):
        adapted(nn.Embedding(4, 4), lora_bias=True)


@pytest.mark.filterwarnings("ignore:.*groups")
def test_convolutions():
    with pytest.raises(ValueError, match="has 3 groups, so its rank must be a multiple of 3, got r=4; nearest is 3"):
        adapted(nn.Conv2d(6, 6, 3, groups=3), r=4)
    with pytest.raises(ValueError, match="Conv1d adapts convolutions over 1 dimensions, got a Conv2d; use Conv2d"):
        Conv1d(nn.Conv2d(4, 4, 3), "default", LoraConfig(), r=2)
    assert Conv2d(nn.Conv2d(4, 4, 3), "default", LoraConfig(), r=2).r == {"default": 2}


def test_attention():
    model = adapted(nn.MultiheadAttention(8, 2))
    attention = layer_of(model)
    x = torch.randn(3, 1, 8)
    attention.base_layer.out_proj.set_adapter([])
    with pytest.raises(ValueError, match=r"has the active adapters \['default'\], but its out_proj \[\]"):
        attention(x, x, x)
    broken = nn.MultiheadAttention(8, 2)
    broken.out_proj = nn.Identity()
    with pytest.raises(TypeError, match="out_proj must be a Linear, got Identity"):
        adapted(broken)


class TestParameters:
    def model(self, layer=None, **options):
        return adapted(layer or Experts(), **{"target_modules": [], "target_parameters": ["layer.weight"], **options})

    def test_experts_are_packed_expert_by_expert_in_A_and_rank_by_rank_in_B(self):
        model = self.model(r=2, lora_alpha=2)
        wrapper = layer_of(model)
        A, B = wrapper.factors("default")
        assert (tuple(A.shape), tuple(B.shape)) == ((4, 3), (4, 4))
        with torch.no_grad():
            B.normal_()
        delta = torch.stack([B.view(4, 2, 2)[:, :, e] @ A.view(2, 2, 3)[e] for e in range(2)])
        torch.testing.assert_close(wrapper.get_delta_weight("default"), delta)
        x = torch.randn(5, 3)
        experts = wrapper.get_base_layer()
        torch.testing.assert_close(model(x), torch.einsum("eoi,bi->beo", experts.weight + delta + experts.other, x))

    @pytest.mark.parametrize("before", [[], ["outer"], ["inner"], ["inner", "outer"], ["outer", "inner"]], ids=str)
    def test_two_parameters_of_a_module_are_unloaded(self, before):
        model = self.model(target_parameters=["layer.weight", "layer.other"], init_lora_weights=False)
        wrappers = {"outer": layer_of(model), "inner": layer_of(model).base_layer}
        x = torch.randn(5, 3)
        expected = model(x)
        for name in before:
            wrappers[name].merge()
        torch.testing.assert_close(model(x), expected)
        plain = model.merge_and_unload()
        assert type(plain.layer) is Experts
        torch.testing.assert_close(plain(x), expected)

    @pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"lora_bias": True}, {"fan_in_fan_out": True}])
    def test_options_of_layers(self, option):
        name = next(iter(option))
        with pytest.raises(ValueError, match=f"{name}=.* is not supported on a bare parameter, which layer.weight is"):
            self.model(**option)

    def test_shapes(self):
        with pytest.raises(ValueError, match="The parameter 'weight' has 4 dimensions; 2 and 3 can be adapted"):
            self.model(Experts(2, 2, 4, 3))

    def test_codes(self):
        experts = Experts()
        experts.weight = nn.Parameter(experts.weight.detach().to(torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"layer.weight of the adapter 'default' is quantised \(in torch.int8\)"):
            self.model(experts)

    def test_mixed_batches(self):
        model = self.model().eval()
        with pytest.raises(ValueError, match="layer is adapted by target_parameters, which does not support mixed"):
            model(torch.randn(1, 3), adapter_names=["default"])

    def test_other_parameters_for_another_adapter(self):
        model = self.model()
        config = LoraConfig(r=2, target_modules=[], target_parameters=["layer.other"])
        with pytest.raises(ValueError, match="must have the same target_parameters, got .*other.* beside .*weight"):
            model.add_adapter("second", config)
        config.target_parameters = [
            "layer.weight"
        ]  # told apart by the configuration; and, if that lies, by the layers
        model.add_adapter("second", config)
        lying = LoraConfig(r=2, target_modules=[], target_parameters=["layer.weight", "weight"])
        with pytest.raises(ValueError, match="same target_parameters"):
            model.add_adapter("third", lying)
        tuner, layer = model.base_model, layer_of(model)
        with pytest.raises(ValueError, match=r"\['default', 'second'\] adapt other parameters of 'layer'.*'other'"):
            tuner._create_and_replace(config, "third", layer, "layer", tuner.model, "layer", parameter_name="other")


@pytest.mark.compat
def test_tied_factors():
    layer = Conv2d(nn.Conv2d(4, 4, 3), "default", LoraConfig(), r=2)
    with pytest.raises(ValueError, match="Conv2d cannot share its factors with a tied embedding; only a Linear can"):
        layer.update_layer("tied", 2, 2, LoraConfig(), tied_adapter={"lora_A": torch.zeros(2, 4)})

    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    base = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    tuner = LoraModel(base, LoraConfig(target_modules=["q_proj"]), "default")
    with pytest.raises(ValueError, match="needs the input embedding to be adapted as well"):
        tuner._tied_factors("default")


@pytest.mark.compat
def test_state_space_models():
    from transformers import MambaConfig, MambaForCausalLM

    base = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9, state_size=4))
    with pytest.raises(ValueError, match="out_proj' of a mamba model cannot be adapted"):
        get_peft_model(base, LoraConfig(target_modules=["out_proj"]))


def test_models_quantised_by_gptq():
    for wrap in (get_peft_model, PeftMixedModel):
        base = Net(nn.Linear(4, 4))
        model = wrap(base, LoraConfig(target_modules=["layer"]))
        base.quantization_method = "gptq"
        with pytest.raises(ValueError, match="cannot be merged into a GPTQ-quantised model"):
            model.merge_and_unload()
        assert isinstance(base.layer, LoraLayer)


@pytest.mark.parametrize("key", [("use_dora", "kasa_config"), ("unknown",)])
def test_a_table_of_variants_that_cannot_be(key):
    class Odd(Linear):
        @property
        def lora_variants(self):
            return {key: LoraVariant}

    with pytest.raises(ValueError, match="must be a sorted tuple of known variants: alora_invocation_tokens"):
        Odd(nn.Linear(4, 4), "default", LoraConfig(use_dora=True), r=2)


def test_two_variants_at_once():
    from peft import KasaConfig

    with pytest.raises(ValueError, match="layer does not support kasa_config with use_dora"):
        adapted(nn.Linear(4, 4), use_dora=True, kasa_config=KasaConfig())


def test_a_scaling_that_is_no_number():
    model = adapted(nn.Linear(4, 4))
    dict.__setitem__(layer_of(model).scaling, "default", "big")
    with pytest.raises(TypeError, match="adapter 'default' in layer must be a float or a tensor, found str"):
        prepare_model_for_compiled_hotswap(model)
    state = {
        f"base_model.model.layer.lora_{factor}.default.weight": torch.zeros(*shape)
        for factor, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    with pytest.raises(TypeError, match="The scaling of layer must be a number or a tensor, found str"):
        hotswap_adapter_from_state_dict(model, state, "default", config=model.peft_config["default"])


class Pair(nn.Module):
    """Three layers with biases; the last is a head."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.two(self.one(x)))


def trained_biases(model):
    names = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    return {name for name in names if name.endswith("bias")}


IN_PLACE = {"all": {"one.base_layer.bias", "two.base_layer.bias", "head.bias"}, "lora_only": {"one.base_layer.bias"}}


@pytest.mark.parametrize("biased", ["first", "second"])
@pytest.mark.parametrize("bias", IN_PLACE)
def test_one_adapter_that_trains_biases_beside_one_that_does_not(bias, biased, tmp_path):
    other = "second" if biased == "first" else "first"
    configs = {biased: LoraConfig(target_modules=["one"], bias=bias), other: LoraConfig(target_modules=["two"])}
    model = get_peft_model(Pair(), configs["first"], "first")
    model.add_adapter("second", configs["second"])
    assert trained_biases(model) == (IN_PLACE[bias] if biased == "first" else set())
    for active, expected in ((biased, IN_PLACE[bias]), (other, set()), (biased, IN_PLACE[bias])):
        model.set_adapter(active)
        assert trained_biases(model) == expected
    with model.disable_adapter():
        assert trained_biases(model) == set()
    assert trained_biases(model) == IN_PLACE[bias]
    keys = {name: set(get_peft_model_state_dict(model, adapter_name=name)) for name in configs}
    assert {key.removeprefix("base_model.model.") for key in keys[biased] if key.endswith("bias")} == IN_PLACE[bias]
    assert not any(key.endswith("bias") for key in keys[other])
    with pytest.raises(ValueError, match=f"one adapter that trains biases.*'{biased}', 'third'.*got bias='all'"):
        model.add_adapter("third", LoraConfig(target_modules=["one"], bias="all"))
    assert list(model.peft_config) == ["first", "second"] and trained_biases(model) == IN_PLACE[bias]


def test_the_bias_of_an_original_does_not_train_beside_its_copy():
    config = LoraConfig(target_modules=["one"], bias="all", modules_to_save=["head"])
    model = get_peft_model(Pair(), config)
    expected = {"one.base_layer.bias", "two.bias", "head.modules_to_save.default.bias"}
    assert trained_biases(model) == expected
    model.add_adapter("other", LoraConfig(target_modules=["two"], modules_to_save=["head"]))
    model.set_adapter("other")
    assert trained_biases(model) == {"head.modules_to_save.other.bias"}
    model.set_adapter("default")
    assert trained_biases(model) == (expected - {"two.bias"}) | {"two.base_layer.bias"}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.filterwarnings("ignore:.*groups")
def test_an_adapter_to_be_loaded_has_no_storage(kind):
    model = get_peft_model(Net(SHAPES[kind][0]()), LoraConfig(target_modules=["layer"], r=2), low_cpu_mem_usage=True)
    devices = {name: p.device.type for name, p in model.named_parameters()}
    assert {device for name, device in devices.items() if "lora_" in name} == {"meta"}
    assert {device for name, device in devices.items() if "lora_" not in name} == {"cpu"}


def test_names_in_memory_are_taken_too(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = get_peft_model(
        Pair(), LoraConfig(target_modules=["one"], modules_to_save=["head"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    state = {name: value.detach() for name, value in model.state_dict().items() if ".default." in name}
    assert {name.rsplit(".", 3)[1] for name in state} == {"lora_A", "lora_B", "modules_to_save"}
    expected = get_peft_model_state_dict(model)
    save_file(state, tmp_path / "adapter_model.safetensors")
    other = get_peft_model(Pair(), model.peft_config["default"])
    found = set_peft_model_state_dict(other, state)
    assert not [key for key in found.missing_keys if "default" in key] and not found.unexpected_keys
    for again in (other, PeftModel.from_pretrained(Pair(), tmp_path)):
        loaded = get_peft_model_state_dict(again)
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_model_without_embeddings_has_none_to_save():
    model = get_peft_model(Pair(), LoraConfig(target_modules=["one"]))
    with pytest.warns(UserWarning, match="the model has no get_input_embeddings"):
        state = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert set(state) == {f"base_model.model.one.lora_{name}.weight" for name in "AB"}


@pytest.mark.filterwarnings("ignore:The model carries adapters already")
def test_a_model_around_a_model_without_embeddings():
    inner = get_peft_model(Pair(), LoraConfig(target_modules=["one"]), "inner")
    outer = get_peft_model(inner, LoraConfig(target_modules=["two"]), "outer")
    trained = {name for name, parameter in outer.named_parameters() if parameter.requires_grad and "lora_" in name}
    assert trained == {f"base_model.model.base_model.model.two.lora_{name}.outer.weight" for name in "AB"}


def test_one_name_of_a_module_to_save_needs_no_list(tmp_path):
    model = get_peft_model(Pair(), LoraConfig(target_modules=["one"], modules_to_save="head"))
    assert model.peft_config["default"].modules_to_save == ["head"] and model.modules_to_save == {"head"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    copied = {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    assert copied == {f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")}


def tied_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9, tie_word_embeddings=True))


ADAPTED = {f"model.embed_tokens.{name}" for name in ("base_layer", "lora_embedding_A", "lora_embedding_B")}


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore:An embedding layer is adapted", "ignore:.*are tied")
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ADAPTED),
        ({"modules_to_save": ["lm_head"]}, ADAPTED | {"lm_head"}),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, {"model.embed_tokens", "lm_head"}),
    ],
    ids=["adapted", "copied head", "tied copies"],
)
def test_a_file_with_embeddings_holds_no_original_of_a_copy(options, expected):
    model = get_peft_model(tied_llama(), LoraConfig(target_modules=r".*embed_tokens|.*q_proj", r=2, **options))
    names = {key.removeprefix("base_model.model.").removesuffix(".weight") for key in get_peft_model_state_dict(model)}
    assert {name for name in names if "q_proj" not in name} == expected


@pytest.mark.compat
@pytest.mark.parametrize("given", [["lm_head"], ["embed_tokens"], ["model.embed_tokens"], ["embed_tokens", "lm_head"]])
def test_copies_that_stay_tied_are_written_as_copies_of_the_embedding(given, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=given, ensure_weight_tying=True)
    model = get_peft_model(tied_llama(), config)
    expected = [name for name in given if name == "embed_tokens"] + ["model.embed_tokens"]
    assert config.modules_to_save == expected
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == expected
    copies = {name for name, _ in model.named_parameters() if "modules_to_save" in name}
    assert copies == {"base_model.model.model.embed_tokens.modules_to_save.default.weight"}


def test_an_adapter_reloads(tmp_path):
    torch.manual_seed(0)
    model = adapted(nn.Linear(4, 4), init_lora_weights=False, lora_bias=True, use_rslora=True).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(nn.Linear(4, 4)), tmp_path)
    x = torch.randn(3, 4)
    again.base_model.model.layer.base_layer.load_state_dict(layer_of(model).base_layer.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.compat
@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_round_the_norms_of_dora(training):
    config = LoraConfig(target_modules=["0"], r=2, use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 4)), config).train(training)
    layer = model.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"]
    given = layer.base_layer.weight, layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    expected = magnitude.norm(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(magnitude.norm(*given), expected)
        model(torch.ones(2, 8)).float().sum().backward()
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(trained) == 3 and all(parameter.grad.abs().sum() > 0 for parameter in trained)
