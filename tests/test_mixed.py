"""`PeftMixedModel`: adapters of several methods in one model, around each other in the order of injection."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners import loha, lokr, lora, oft
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES, MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(8, 8)
        self.lin1 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


X = torch.linspace(-1, 1, 24).view(3, 8)
CONFIGS = {
    "lora": lambda **kw: LoraConfig(target_modules=["lin0", "lin1"], init_lora_weights=False, **kw),
    "loha": lambda **kw: LoHaConfig(target_modules=["lin0"], init_weights=False, **kw),
    "lokr": lambda **kw: LoKrConfig(target_modules=["lin1"], init_weights=False, **kw),
    "oft": lambda **kw: OFTConfig(target_modules=["lin0", "lin1"], oft_block_size=4, init_weights=False, **kw),
}
LAYERS = {
    "lora": lora.LoraLayer,
    "loha": loha.layer.LoHaLayer,
    "lokr": lokr.layer.LoKrLayer,
    "oft": oft.layer.OFTLayer,
}


def net():
    torch.manual_seed(0)
    return Net().eval()


def mixed(*methods, active=None, **options):
    """A model with one adapter per method, each of its method's name."""
    model = PeftMixedModel(net(), CONFIGS[methods[0]](**options), methods[0])
    for method in methods[1:]:
        model.add_adapter(method, CONFIGS[method]())
    model.set_adapter(list(active or methods))
    return model.eval()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --------------------------------------------------------------------------------------------------------- construction


def test_get_peft_model_makes_one():
    model = get_peft_model(net(), CONFIGS["lora"](), adapter_name="a", mixed=True)
    assert type(model) is PeftMixedModel and type(model.base_model) is MixedModel
    assert not isinstance(model, PeftModel)
    assert model.active_adapter == ["a"] and model.active_adapters == ["a"]
    assert model.peft_config.keys() == {"a"} and model.config == {"model_type": "custom"}
    assert model.modules_to_save is None and not hasattr(model, "get_base_model")


def test_which_methods_can_be_mixed():
    assert {peft_type.value for peft_type in COMPATIBLE_TUNER_TYPES} == {
        *("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA")
    }
    with pytest.raises(ValueError, match="IA3.*LORA"):
        PeftMixedModel(net(), IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    model = mixed("lora")
    with pytest.raises(ValueError, match="IA3"):
        model.add_adapter("ia3", IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    assert model.peft_config.keys() == {"lora"}


def test_a_layer_of_another_method_goes_around_the_one_that_is_there():
    model = mixed("lora", "loha", "oft")
    layer, classes = model.base_model.model.lin0, []
    while hasattr(layer, "base_layer"):
        classes.append(type(layer).__module__.split(".")[2])
        layer = layer.base_layer
    assert classes == ["oft", "loha", "lora"] and type(layer) is nn.Linear


def test_the_same_method_uses_the_layer_again_if_it_is_outermost():
    model = mixed("lora", "lokr")
    lin0, lin1 = model.base_model.model.lin0, model.base_model.model.lin1
    model.add_adapter("second", CONFIGS["lora"](r=2))
    assert model.base_model.model.lin0 is lin0 and set(lin0.lora_A) == {"lora", "second"}
    around = model.base_model.model.lin1
    assert around.base_layer is lin1 and isinstance(lin1, LAYERS["lokr"])
    assert isinstance(around, LAYERS["lora"]) and set(around.lora_A) == {"second"}


def test_what_is_printed(capsys):
    model = mixed("lora", "loha")
    trained, total = model.get_nb_trainable_parameters()
    model.print_trainable_parameters()
    line = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
    assert capsys.readouterr().out == line


# -------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("method", CONFIGS)
def test_one_adapter_gives_what_it_gives_alone(method):
    model = mixed(method)
    single = PeftModel(net(), CONFIGS[method](), method).eval()
    single.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(X), single(X), atol=0, rtol=0)


def test_additive_methods_add_up():
    model = mixed("lora", "loha")
    layers = model.base_model.model.lin0, model.base_model.model.lin0.base_layer
    weight = layers[0].get_base_layer().weight + sum(
        layer.get_delta_weight(name) for layer, name in zip(layers, ("loha", "lora"))
    )
    expected = nn.functional.linear(X, weight, layers[0].get_base_layer().bias)
    torch.testing.assert_close(layers[0](X), expected)


def test_a_rotation_acts_on_what_is_inside_it():
    model = mixed("lora", "oft")
    outer, inner = model.base_model.model.lin0, model.base_model.model.lin0.base_layer
    rotated = outer.rotated(X, "oft")
    torch.testing.assert_close(outer(X), inner(rotated))


@pytest.mark.parametrize(
    "methods", [("lora", "loha"), ("lora", "oft"), ("oft", "lora"), ("loha", "lora", "lokr", "oft")]
)
def test_order_of_activation_does_not_matter(methods):
    model = mixed(*methods)
    output = model(X)
    model.set_adapter(list(reversed(methods)))
    assert torch.equal(model(X), output)


@pytest.mark.parametrize(
    "methods", [("lora", "loha"), ("lora", "oft"), ("oft", "lora"), ("loha", "lora", "lokr", "oft")]
)
def test_merging(methods):
    model = mixed(*methods)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), output, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = model.merge_and_unload()
    assert type(plain.lin0) is nn.Linear and plain.state_dict().keys() == net().state_dict().keys()
    torch.testing.assert_close(plain(X), output, atol=1e-5, rtol=1e-5)


def test_merging_some():
    model = mixed("lora", "oft", "lokr")
    model.set_adapter(["oft", "lokr"])
    output = model(X)
    plain = model.merge_and_unload(adapter_names=["oft", "lokr"])
    torch.testing.assert_close(plain(X), output, atol=1e-5, rtol=1e-5)


def test_unload_gives_the_base_model_back():
    plain = mixed("lora", "oft", "loha").unload()
    assert plain.state_dict().keys() == net().state_dict().keys()
    assert torch.equal(plain(X), net()(X))


@pytest.mark.compat
def test_generate():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).eval()
    options = {"target_modules": ["q_proj"]}
    model = PeftMixedModel(base, LoraConfig(init_lora_weights=False, **options), "a")
    model.add_adapter("b", LoHaConfig(init_weights=False, **options))
    model.set_adapter(["a", "b"])
    ids = torch.tensor([[1, 2, 3]])
    tokens = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert tokens[0, -1] == model(input_ids=tokens[:, :-1]).logits[0, -1].argmax()
    assert model.config is base.config and model.device == base.device


# ---------------------------------------------------------------------------------------------------------- life cycle


def test_a_new_adapter_is_not_active_and_frozen():
    model = PeftMixedModel(net(), CONFIGS["lora"](), "lora").eval()
    output, names = model(X), trainable(model)
    model.add_adapter("loha", CONFIGS["loha"]())
    assert torch.equal(model(X), output)
    assert trainable(model) == {name.replace("lin0.", "lin0.base_layer.") for name in names}
    assert model.active_adapters == ["lora"]


def test_set_adapter():
    model = mixed("lora", "loha")
    model.set_adapter("loha")
    assert model.active_adapter == ["loha"] and all("hada_" in name for name in trainable(model))
    model.set_adapter(["lora", "loha"], inference_mode=True)
    assert trainable(model) == set() and model.active_adapters == ["lora", "loha"]
    with pytest.raises(ValueError, match="'lorra'.*lora"):
        model.set_adapter("lorra")
    assert model.active_adapters == ["lora", "loha"]


def test_delete_adapter():
    model = mixed("lora", "loha", "lokr")
    model.delete_adapter("loha")
    assert model.active_adapters == ["lora", "lokr"] and model.peft_config.keys() == {"lora", "lokr"}
    assert not any("hada_" in name for name in model.state_dict())
    model.delete_adapter(["lora", "lokr"])
    assert model.active_adapters == [] and torch.equal(model(X), net()(X))


@pytest.mark.parametrize("names", ["nope", ["lora", "nope"]])
def test_deleting_an_unknown_adapter_changes_nothing(names):
    model = mixed("lora", "loha")
    with pytest.raises(ValueError, match="nope"):
        model.delete_adapter(names)
    assert model.peft_config.keys() == {"lora", "loha"}


def test_a_merged_adapter_is_not_deleted():
    model = mixed("lora", "loha")
    model.merge_adapter(["lora"])
    with pytest.raises(ValueError, match="lora.*merged"):
        model.delete_adapter(["loha", "lora"])
    assert model.peft_config.keys() == {"lora", "loha"}


def test_disabling():
    model = mixed("lora", "oft")
    output, names = model(X), trainable(model)
    with model.disable_adapter():
        assert torch.equal(model(X), net()(X)) and trainable(model) == set()
        with model.disable_adapter():
            pass
        assert torch.equal(model(X), net()(X))
    assert torch.equal(model(X), output) and trainable(model) == names
    with pytest.raises(RuntimeError), model.disable_adapter():
        raise RuntimeError
    assert torch.equal(model(X), output)


def test_a_failed_addition_leaves_no_trace():
    model = mixed("lora")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError):
        model.add_adapter("loha", LoHaConfig(target_modules=["lin0"], r=0))
    with pytest.raises(ValueError, match="already"):
        model.add_adapter("lora", CONFIGS["loha"]())
    with pytest.raises(ValueError, match="bias='some'"):
        model.add_adapter("biased", LoraConfig(target_modules=["lin0"], bias="some"))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.peft_config.keys() == {"lora"}


def test_copies_of_modules():
    model = PeftMixedModel(net(), CONFIGS["lora"](modules_to_save=["head"]), "lora")
    model.add_adapter("loha", CONFIGS["loha"]())
    assert model.modules_to_save == {"head"}
    model.set_adapter(["lora", "loha"])
    assert {name for name in trainable(model) if "head" in name} == {
        "base_model.model.head.modules_to_save.lora.weight",
        "base_model.model.head.modules_to_save.lora.bias",
    }
    model.set_adapter("loha")
    assert not any("head" in name for name in trainable(model))


def test_training_changes_the_active_adapters_only():
    model = mixed("lora", "loha", "lokr", active=["lora", "lokr"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = trainable(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names and not any("hada_" in name for name in names)


def test_deepcopy():
    model = mixed("lora", "oft")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    twin.set_adapter("oft")
    assert model.active_adapters == ["lora", "oft"]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    """Folders with one adapter each, and what they give alone."""
    outputs = {}
    for method, config in CONFIGS.items():
        model = PeftModel(net(), config()).eval()
        model.save_pretrained(tmp_path / method)
        outputs[method] = model(X).detach()
    return tmp_path, outputs


def test_loading(saved):
    folder, outputs = saved
    model = PeftMixedModel.from_pretrained(net(), folder / "lora", "lora")
    assert type(model) is PeftMixedModel and not model.training and trainable(model) == set()
    torch.testing.assert_close(model(X), outputs["lora"], atol=0, rtol=0)
    for method in ("loha", "oft"):
        result = model.load_adapter(folder / method, method)
        assert list(result.missing_keys) == [] and list(result.unexpected_keys) == []
        torch.testing.assert_close(model(X), outputs["lora"], atol=0, rtol=0)
    for method in ("lora", "loha", "oft"):
        model.set_adapter(method)
        torch.testing.assert_close(model(X), outputs[method], atol=0, rtol=0)
    assert len(trainable(model)) == 2


def test_loading_to_train(saved):
    folder, _ = saved
    model = PeftMixedModel.from_pretrained(net(), folder / "oft", is_trainable=True)
    assert trainable(model) == {f"base_model.model.lin{i}.oft_R.default.weight" for i in range(2)}


def test_names_on_disk_know_nothing_of_other_methods(saved):
    folder, _ = saved
    model = PeftMixedModel.from_pretrained(net(), folder / "lora", "lora")
    expected = {name: value.clone() for name, value in get_peft_model_state_dict(model, adapter_name="lora").items()}
    model.load_adapter(folder / "loha", "loha")
    state = get_peft_model_state_dict(model, adapter_name="lora")
    assert state.keys() == expected.keys()
    # Into the adapter that is inside the other one now.
    result = model.load_adapter(folder / "lora", "lora")
    assert list(result.missing_keys) == [] and list(result.unexpected_keys) == []


def test_a_failed_load_gives_the_model_back(saved):
    folder, _ = saved
    base = net()
    (folder / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError):
        PeftMixedModel.from_pretrained(base, folder / "lora")
    assert base.state_dict().keys() == net().state_dict().keys() and trainable(base) == trainable(net())
    assert type(base.lin0) is nn.Linear


def test_what_a_mixed_model_does_not_have(tmp_path):
    model = mixed("lora", "loha")
    for call in (model.save_pretrained, model.create_or_update_model_card):
        with pytest.raises(NotImplementedError):
            call(tmp_path)
    with pytest.raises(NotImplementedError):
        model.base_model.add_weighted_adapter(["lora", "loha"], [1, 1], "c")
    for status in (get_layer_status, get_model_status):
        with pytest.raises(TypeError):
            status(model)
        with pytest.raises(TypeError):
            getattr(model, status.__name__)()


def test_every_compatible_method_of_the_library_can_be_mixed_in():
    """Methods that register later are tried as soon as they do."""
    there = {PeftType.LORA, PeftType.LOHA, PeftType.LOKR, PeftType.OFT} & set(peft.PEFT_TYPE_TO_CONFIG_MAPPING)
    for peft_type in COMPATIBLE_TUNER_TYPES:
        if peft_type not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
            continue
        there.add(peft_type)
        options = {"oft_block_size": 4} if peft_type == PeftType.OFT else {"r": 2}
        if peft_type == PeftType.ADALORA:
            options = {"init_r": 2, "target_r": 1, "total_step": 4}
        model = mixed("lora")
        model.add_adapter("other", peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](target_modules=["lin0"], **options))
        model.set_adapter(["lora", "other"])
        output = model(X)
        model.set_adapter(["lora", "other"], inference_mode=True)
        torch.testing.assert_close(model.merge_and_unload()(X), output, atol=1e-5, rtol=1e-5)
    assert len(there) >= 4


@pytest.mark.parametrize("methods", itertools.permutations(["lora", "loha", "oft"]), ids="-".join)
def test_layers_around_each_other_are_merged_and_unmerged_in_any_order(methods):
    """As a client does that walks the modules, outermost first, or takes one adapter after the other."""
    for merging, unmerging in itertools.product(itertools.permutations(range(3)), repeat=2):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 8))
        plain = base[0].weight.detach().clone()
        model = base
        for method in methods:
            config = CONFIGS[method]()
            config.target_modules = ["0"]
            if model is base:
                model = get_peft_model(base, config, adapter_name=f"first {method}", mixed=True)
            else:
                model.add_adapter(f"then {method}", config)
        model.set_adapter(list(model.peft_config))
        layers = [module for module in model.eval().modules() if isinstance(module, BaseTunerLayer)]
        expected = model(X)
        for index in merging:
            layers[index].merge()
        assert torch.allclose(model(X), expected, atol=1e-5)
        for index in unmerging:
            layers[index].unmerge()
        assert torch.equal(layers[-1].get_base_layer().weight, plain)
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_mixed_batch_names_one_adapter_for_each_row(count):
    model = get_peft_model(net(), CONFIGS["lora"]()).eval()
    with pytest.raises(ValueError, match=f"one adapter per row, got {count} names for 3 rows"):
        model(X, adapter_names=["default"] * count)
    assert torch.equal(model(X, adapter_names=["default"] * 3), model(X))
