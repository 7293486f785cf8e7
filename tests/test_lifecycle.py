"""The life of an adapter through `PeftModel` and through injection, from the one table of steps in `life`."""

import copy

import life
import pytest
import torch
from fuzzing import whole_or_not_at_all
from life import InjectDoor, PeftModelDoor
from torch import nn

import peft
from peft import LoraConfig
from peft.engine.checkpoint import set_base_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

pytestmark = pytest.mark.compat


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.lin1 = nn.Linear(10, 10)
        self.head = nn.Linear(10, 4)
        self.xhead = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.tanh(self.norm(self.lin0(x)))
        x = torch.tanh(self.lin1(x))
        return self.head(x) + self.xhead(x)


def net():
    torch.manual_seed(0)
    return Net()


def inputs(dtype):
    return {"x": torch.linspace(-1, 1, 18, dtype=torch.float32).view(3, 6).to(dtype)}


LACKS = {InjectDoor: {"unload_after_merging", "unload"}}
"""Injection has no call to take adapters out again; the client that injected does that."""

CASES = [
    pytest.param(door, name, frozen, dtype, id=f"{door.__name__}-{name}-{'frozen' if frozen else 'trainable'}-{dtype}")
    for door in (PeftModelDoor, InjectDoor)
    for name in life.STEPS
    if name not in LACKS.get(door, ())
    for frozen in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("door_cls, name, frozen, dtype", CASES)
def test_step(door_cls, name, frozen, dtype, tmp_path):
    door = door_cls(net, inputs, ["lin0", "lin1"], ["head"], frozen=frozen, dtype=dtype)
    life.run(name, door, tmp_path)


@pytest.fixture
def model():
    return peft.get_peft_model(net(), config(), adapter_name="a")


def config(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["lin0"], "modules_to_save": ["head"], **options})


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def move(model, adapter, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


X = inputs(torch.float32)["x"]


class TestPeftModelOnly:
    def test_the_tuner_lists_the_active_adapter_from_the_start(self, model):
        assert model.base_model.active_adapter == ["a"]
        assert model.active_adapter == "a"

    @pytest.mark.parametrize("name", ["get_input_embeddings", "get_output_embeddings"])
    def test_a_getter_of_a_layer_is_there_exactly_if_the_base_model_has_it(self, name):
        assert not hasattr(peft.get_peft_model(net(), config()), name)
        base = Table()
        wrapped = peft.get_peft_model(base, LoraConfig(target_modules=["lin"], r=2))
        assert getattr(wrapped, name)() is getattr(base, name)()

    def test_a_model_without_embeddings_is_wrapped_again(self, model):
        with pytest.warns(UserWarning, match="adapter layers already"):
            assert isinstance(peft.get_peft_model(model, config()), peft.PeftModel)

    def test_set_adapter_for_inference(self, model):
        model.add_adapter("b", config())
        model.set_adapter("b", inference_mode=True)
        assert trainable(model) == set()
        assert model.active_adapters == ["b"]
        model.set_adapter("b")
        assert len(trainable(model)) == 4

    def test_disable_adapter_is_undone_after_an_exception(self, model):
        move(model, "a")
        output, names = model(X), trainable(model)
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert torch.equal(model(X), output)
        assert trainable(model) == names

    def test_disable_adapter_nests(self, model):
        base = net()(X)
        move(model, "a")
        output = model(X)
        with model.disable_adapter():
            with model.disable_adapter():
                assert torch.equal(model(X), base)
            assert torch.equal(model(X), base)
            assert trainable(model) == set()
        assert torch.equal(model(X), output)

    def test_disable_adapter_keeps_a_merged_model_merged(self, model):
        base = net()(X)
        move(model, "a")
        model.merge_adapter()
        output = model(X)
        with model.disable_adapter():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), output)
        assert model.get_model_status().merged_adapters == ["a"]

    def test_loaded_for_inference_stays_frozen_after_disabling(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "a")
        with loaded.disable_adapter():
            pass
        assert trainable(loaded) == set()

    @pytest.mark.parametrize("is_trainable", [False, True])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_load_beside_others(self, model, tmp_path, is_trainable, low_cpu_mem_usage):
        move(model, "a")
        expected = model(X)
        model.save_pretrained(tmp_path)
        other = peft.get_peft_model(net(), config(), adapter_name="first")
        first = other(X)
        other.load_adapter(tmp_path / "a", "a", is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not any(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])
        assert torch.equal(other(X), first)
        own = {"base_model.model.lin0.lora_A.{}.weight", "base_model.model.lin0.lora_B.{}.weight"}
        own |= {"base_model.model.head.modules_to_save.{}.weight", "base_model.model.head.modules_to_save.{}.bias"}
        names = {name.format("first") for name in own} | (
            {name.format("a") for name in own} if is_trainable else set()
        )
        assert trainable(other) == names
        other.set_adapter("a")
        assert torch.equal(other(X), expected)

    def test_gradient_checkpointing_changes_nothing(self):
        from torch.utils.checkpoint import checkpoint

        gradients = []
        for use_reentrant in (None, False, True):
            model = peft.get_peft_model(net(), config(), adapter_name="a")
            move(model, "a")
            x = X.clone().requires_grad_(True)
            output = model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant)
            output.square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        for other in gradients[1:]:
            assert all(torch.equal(gradients[0][name], other[name]) for name in gradients[0])


class TestMatching:
    def test_a_name_matches_at_a_dot(self, model):
        wrapped = {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
        assert wrapped == {"base_model.model.head"}

    def test_repeated_entries_are_one(self):
        model = peft.get_peft_model(net(), config(modules_to_save=["head", "head"]))
        assert len([m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]) == 1

    def test_never_inside_one_another(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin0 = nn.Linear(6, 6)
                self.block = nn.Sequential()
                self.block.add_module("dense", nn.Linear(6, 6))

            def forward(self, x):
                return self.block(self.lin0(x))

        model = peft.get_peft_model(Outer(), config(modules_to_save=["block", "dense"]))
        wrapped = {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
        assert wrapped == {"base_model.model.block"}

    def test_an_entry_that_names_nothing_warns_with_the_nearest(self):
        with pytest.warns(UserWarning, match=r"'haed'.*\bhead\b"):
            peft.get_peft_model(net(), config(modules_to_save=["head", "haed"]))

    def test_a_target_that_is_saved_or_excluded_is_no_misspelling(self, recwarn):
        options = {"target_modules": "all-linear", "exclude_modules": ["lin1"], "modules_to_save": ["head"]}
        model = peft.get_peft_model(net(), config(**options))
        assert model.targeted_module_names == ["lin0", "xhead"]
        assert [str(warning.message) for warning in recwarn if "match no module" in str(warning.message)] == []

    @pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict])
    def test_a_container_is_refused_and_nothing_changed(self, container):
        base = net()
        base.box = container()
        before = {name: p.requires_grad for name, p in base.named_parameters()}
        with pytest.raises(TypeError, match=container.__name__):
            peft.get_peft_model(base, config(modules_to_save=["box"]))
        assert {name: p.requires_grad for name, p in base.named_parameters()} == before
        assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
        assert not hasattr(base, "peft_config")


class Shared(nn.Module):
    """One linear layer under two names, called three times."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(self.lin0(x))))))


def test_a_shared_module_has_one_copy_used_everywhere():
    torch.manual_seed(0)
    base = Shared()
    plain = copy.deepcopy(base)
    model = peft.get_peft_model(base, config(modules_to_save=["first"]))
    assert model.base_model.model.first is model.base_model.model.second
    assert len([m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]) == 1
    for network in (model, plain):
        network(X).square().mean().backward()
    duplicate = model.base_model.model.first.modules_to_save["default"]
    assert torch.equal(duplicate.weight.grad, plain.first.weight.grad)
    plain_again = model.merge_and_unload()
    assert plain_again.first is plain_again.second is duplicate


class First(nn.Module):
    """A model whose first adapter-holding module is the copied one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.lin0 = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin0(torch.tanh(self.embed(x)))


def test_a_wrapper_answers_as_the_first_tuner_layer():
    model = First()
    peft.inject_adapter_in_model(config(modules_to_save=["embed"]), model, "a")
    peft.inject_adapter_in_model(config(modules_to_save=None), model, "b")
    wrapper, layer = model.embed, model.lin0
    assert isinstance(wrapper, ModulesToSaveWrapper) and isinstance(wrapper, BaseTunerLayer)
    assert wrapper.active_adapter == layer.active_adapter == ["b"]
    assert len(wrapper.r) == len(layer.r) == 2
    assert wrapper.base_layer is wrapper.original_module is wrapper.get_base_layer()
    assert not any(hasattr(wrapper, name) for name in ("lora_A", "lora_B"))
    layer.set_adapter("a")
    wrapper.set_adapter("a")
    assert wrapper.weight is wrapper.modules_to_save["a"].weight
    assert wrapper.in_features == 6
    wrapper.enable_adapters(False)
    assert wrapper.weight is wrapper.original_module.weight


def test_attributes_of_a_half_built_wrapper_do_not_recurse():
    wrapper = ModulesToSaveWrapper.__new__(ModulesToSaveWrapper)
    for name in ("original_module", "weight", "anything", "base_layer"):
        assert not hasattr(wrapper, name)


@pytest.mark.parametrize("fullgraph", [True])
def test_compiled(fullgraph):
    model = peft.get_peft_model(net(), config())
    move(model, "default")
    expected = model(X)
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    assert torch.equal(compiled(X), expected)


class Tied(nn.Module):
    """An embedding and a head of one weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.lin0 = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.lin0(self.embed(x))))


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"], ["embed", "lin0"]])
def test_merging_into_a_tied_weight_leaves_the_other_side_alone(targets):
    torch.manual_seed(0)
    x = torch.tensor([[0, 3, 6]])
    model = peft.get_peft_model(Tied(), LoraConfig(r=2, target_modules=targets))
    move(model, "default")
    output = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model.get_parameter("base_model.model.embed." + ("base_layer.weight" if "embed" in targets else "weight"))
    model.merge_adapter()
    assert torch.allclose(model(x), output, atol=1e-5)
    model.unmerge_adapter()
    life.assert_weights_equal(before, model.state_dict())
    base = model.get_base_model()
    sides = [getattr(module, "base_layer", module).weight for module in (base.embed, base.head)]
    assert sides[0] is sides[1] is weight
    assert torch.allclose(model.merge_and_unload()(x), output, atol=1e-5)


def test_merge_and_unload_is_whole_or_not_at_all():
    """A convolution with groups has no merged LoRA weight; the layers before it stay adapted then."""
    base = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 3, padding=1, groups=2))
    with pytest.warns(UserWarning, match="groups"):
        model = peft.get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
    move(model, "default")
    x = torch.randn(1, 4, 5)
    output, names = model(x), set(model.state_dict())
    with pytest.raises(NotImplementedError, match="groups"):
        model.merge_and_unload()
    assert set(model.state_dict()) == names
    assert torch.equal(model(x), output)


class Twins(nn.Module):
    """Two linear layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.lin.weight

    def forward(self, x):
        return self.twin(torch.tanh(self.lin(x)))


@pytest.mark.parametrize("targets", [["twin"], ["lin"], ["lin", "twin"]], ids="+".join)
@pytest.mark.parametrize("method", ["lora", "loha"])
def test_an_adapter_added_while_another_is_merged_knows_which_weights_are_shared(method, targets):
    torch.manual_seed(0)
    base = Twins()
    weight = base.lin.weight
    kept = weight.detach().clone()
    first = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    model = peft.get_peft_model(base, first, adapter_name="a", mixed=method != "lora")
    model.merge_adapter()
    if method == "lora":
        model.add_adapter("b", LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    else:
        model.add_adapter("b", peft.LoHaConfig(r=2, target_modules=targets, init_weights=False))
    with pytest.warns(UserWarning, match="unmerged"):
        model.set_adapter("b")
    expected = model(X)
    model.merge_adapter()
    assert torch.allclose(model(X), expected, atol=1e-6)
    assert torch.equal(weight, kept)
    model.unmerge_adapter()
    assert all(getattr(model.base_model.model, name).get_base_layer().weight is weight for name in targets)
    assert torch.equal(weight, kept)


# ----------------------------------------------------------------------------------------- loading into what is merged


class Table(nn.Module):
    """A table and two linear layers with biases."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 6)
        self.lin = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(torch.tanh(self.lin(self.embed_tokens(ids))))


ROW_IDS = torch.arange(8).view(2, 4)
LOADED = {
    "lora": config(target_modules=["lin"], modules_to_save=None),
    "dora": config(target_modules=["lin"], modules_to_save=None, use_dora=True),
    "table": config(target_modules=["embed_tokens", "lin"], modules_to_save=None),
    "copy": config(target_modules=["lin"]),
    "rows beside": config(target_modules=["lin"], trainable_token_indices={"embed_tokens": [1, 3]}),
    "rows alone": peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"]),
    "biases": config(target_modules=["lin"], modules_to_save=None, bias="all", lora_bias=True),
    "ia3": peft.IA3Config(target_modules=["lin"], feedforward_modules=[]),
    "loha": peft.LoHaConfig(r=2, target_modules=["lin"]),
}


def of_table(name, seed, adapter="a", **options):
    torch.manual_seed(0)
    model = peft.get_peft_model(Table(), copy.deepcopy(LOADED[name]), adapter_name=adapter, **options).eval()
    move_all(model, seed)
    return model


def move_all(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def by_load_adapter(model, other, folder):
    other.save_pretrained(folder)
    model.load_adapter(folder / "a", "a")


def by_state_dict(model, other, folder):
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other, adapter_name="a"), adapter_name="a")


def into_the_injected(model, other, folder):
    state = peft.get_peft_model_state_dict(other.base_model.model, adapter_name="a")
    peft.set_peft_model_state_dict(model.base_model.model, state, adapter_name="a")


def by_assigning(model, other, folder):
    state = peft.get_peft_model_state_dict(other, adapter_name="a")
    peft.set_peft_model_state_dict(model, state, adapter_name="a", low_cpu_mem_usage=True)


WAYS = [by_load_adapter, by_state_dict, into_the_injected, by_assigning]


def base_values(model):
    """What is no adapter's."""
    state = model.state_dict().items()
    return {name: value.clone() for name, value in state if not any(f".{own}." in f"{name}." for own in "ab")}


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:An embedding layer is adapted")
def test_loading_into_a_merged_adapter_merges_the_new_weights(way, name, tmp_path):
    """The output is the new adapter's at once, as if it had been loaded before merging, and unmerging is exact."""
    model, other, expected = of_table(name, 1), of_table(name, 2), of_table(name, 1)
    way(expected, other, tmp_path)
    base, flags = base_values(expected), trainable(expected)
    expected.merge_adapter()
    model.merge_adapter()
    way(model, other, tmp_path)
    assert model.get_model_status().merged_adapters == ["a"]
    assert torch.equal(model(ROW_IDS), expected(ROW_IDS))
    torch.testing.assert_close(model(ROW_IDS), other(ROW_IDS))
    model.unmerge_adapter()
    assert torch.equal(model(ROW_IDS), other(ROW_IDS))
    life.assert_weights_equal(base, base_values(model))
    assert trainable(model) == flags


@pytest.mark.parametrize("way", [by_load_adapter, by_state_dict])
def test_loading_beside_another_adapter_that_is_merged(way, tmp_path):
    """Whether it is the one that is merged, one of two, or not merged at all."""
    for merged in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        model = of_table("rows beside", 1)
        model.add_adapter("b", config(target_modules=["lin"], modules_to_save=None))
        model.set_adapter("b")
        move_all(model, 3)
        base, expected = base_values(model), copy.deepcopy(model)
        other = of_table("rows beside", 2)
        model.merge_adapter(merged)
        way(model, other, tmp_path)
        way(expected, other, tmp_path)
        expected.merge_adapter(merged)
        assert torch.equal(model(ROW_IDS), expected(ROW_IDS))
        assert model.base_model.model.lin.merged_adapters == merged
        model.unmerge_adapter()
        life.assert_weights_equal(base_values(model), base)


@pytest.mark.parametrize("kind", ["shape", "nan", "dtype"])
@pytest.mark.parametrize("name", ["copy", "rows beside"])
def test_what_cannot_be_loaded_leaves_a_merged_adapter_merged(name, kind):
    model = of_table(name, 1)
    state = peft.get_peft_model_state_dict(of_table(name, 2), adapter_name="a")
    key = "base_model.model.lin.lora_A.weight"
    bad = {"shape": state[key][:1], "nan": state[key] * torch.nan, "dtype": state[key].to(torch.int32)}
    model.merge_adapter()
    with whole_or_not_at_all(model) as caught:
        peft.set_peft_model_state_dict(model, state | {key: bad[kind]}, adapter_name="a")
    assert "Nothing was loaded" in str(caught[0])


def test_loading_while_merged_and_disabled():
    model, other = of_table("copy", 1), of_table("copy", 2)
    model.merge_adapter()
    with model.disable_adapter():
        by_state_dict(model, other, None)
        assert torch.equal(model(ROW_IDS), Table.forward(of_table("copy", 1).unload(), ROW_IDS))
    torch.testing.assert_close(model(ROW_IDS), other(ROW_IDS))
    assert model.base_model.model.lin.merged_adapters == ["a"]


@pytest.mark.parametrize("name", ["table", "biases"])
@pytest.mark.filterwarnings("ignore:An embedding layer is adapted")
def test_a_file_saved_while_merged_has_nothing_merged_into_the_base_weights_in_it(name, tmp_path):
    model = of_table(name, 1)
    with torch.no_grad():
        model.base_model.model.embed_tokens.weight.add_(1)
    expected, output = peft.get_peft_model_state_dict(model, adapter_name="a"), model(ROW_IDS)
    assert any(key.endswith("base_layer.weight" if name == "table" else "base_layer.bias") for key in expected)
    model.merge_adapter()
    merged = model(ROW_IDS)
    model.save_pretrained(tmp_path)
    assert torch.equal(model(ROW_IDS), merged)
    life.assert_weights_equal(peft.get_peft_model_state_dict(model, adapter_name="a"), expected)
    torch.manual_seed(0)
    assert torch.equal(peft.PeftModel.from_pretrained(Table(), tmp_path / "a")(ROW_IDS), output) or name == "biases"


def test_weights_of_the_base_model_are_loaded_below_what_is_merged():
    model = of_table("copy", 1)
    torch.manual_seed(5)
    new = Table()
    expected = of_table("copy", 1)
    for each in (model, expected):
        if each is model:
            each.merge_adapter()
        set_base_model_state_dict(each, new.state_dict())
    assert torch.allclose(model(ROW_IDS), expected(ROW_IDS), atol=1e-6)
    life.assert_weights_equal(model.unload().state_dict(), new.state_dict())


# ------------------------------------------------------------------------------------- layers around layers, and biases


@pytest.mark.parametrize("enable_each", [False, True], ids=["by the model", "by each layer"])
def test_disabling_what_is_merged_into_layers_around_each_other_is_undone_exactly(enable_each):
    """What was merged first, the inner layer, is merged first again: unmerging goes the other way."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Table(), config(target_modules=["lin"]), adapter_name="a", mixed=True).eval()
    model.add_adapter("b", peft.LoHaConfig(r=2, target_modules=["lin"]))
    model.set_adapter(["a", "b"])
    move_all(model, 3)
    before, output = {name: value.clone() for name, value in model.state_dict().items()}, model(ROW_IDS)
    model.base_model.merge_adapter()
    merged = model(ROW_IDS)
    if enable_each:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for enabled in (False, True):
            for layer in layers:
                layer.enable_adapters(enabled)
    else:
        with model.disable_adapter():
            life.assert_weights_equal(before, model.state_dict())
    assert torch.equal(model(ROW_IDS), merged)
    model.base_model.unmerge_adapter()
    life.assert_weights_equal(before, model.state_dict())
    assert torch.equal(model(ROW_IDS), output)


class Biased(nn.Module):
    """Two linear layers, of which one is adapted, and a norm."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.lin(x)))


BASE_BIASES = {"all": ["lin.base_layer.bias", "norm.bias", "head.bias"], "lora_only": ["lin.base_layer.bias"]}


@pytest.fixture(params=BASE_BIASES)
def biased(request):
    model = peft.get_peft_model(Biased(), config(target_modules=["lin"], modules_to_save=None, bias=request.param))
    return model, {f"base_model.model.{name}" for name in BASE_BIASES[request.param]}


@pytest.mark.filterwarnings("ignore:The adapter 'default' trains biases in place")
class TestBiases:
    def test_which_train(self, biased):
        model, names = biased
        assert {name for name in trainable(model) if "lora_" not in name} == names

    def test_what_was_frozen_by_hand_stays_so_when_enabled_again(self, biased):
        model, names = biased
        for name in sorted(names):
            model.get_parameter(name).requires_grad_(False)
            before = trainable(model)
            with model.disable_adapter():
                assert trainable(model) == set()
                model.base_model.disable_adapter_layers()  # twice is once
            assert trainable(model) == before
        model.set_adapter("default")
        assert names <= trainable(model)

    def test_for_inference_they_stay_frozen_when_enabled_again(self, biased):
        model, _ = biased
        model.set_adapter("default", inference_mode=True)
        with model.disable_adapter():
            pass
        assert trainable(model) == set()

    def test_activated_while_disabled_they_train_when_enabled(self, biased):
        model, names = biased
        model.base_model.disable_adapter_layers()
        model.base_model.set_adapter("default")
        assert trainable(model) == set()
        model.base_model.enable_adapter_layers()
        assert {name for name in trainable(model) if "lora_" not in name} == names

    def test_none_train_when_their_adapter_is_deleted(self, biased):
        model, _ = biased
        model.delete_adapter("default")
        assert trainable(model) == set()
