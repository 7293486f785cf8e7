"""The life of an adapter through `PeftModel` and through injection, from the one table of steps in `life`."""

import copy

import life
import pytest
import torch
from life import InjectDoor, PeftModelDoor
from torch import nn

import peft
from peft import LoraConfig
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
