"""(IA)³: a vector per layer rescales its output, or its input where the layer is feed-forward."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft.tuners.ia3
from peft import IA3Config, IA3Model, PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.ia3.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear


class Net(nn.Module):
    """One layer to adapt, and one that is left alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12)),
    "linear on one row": (lambda: nn.Linear(12, 8), (12,)),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "embedding": (lambda: nn.Embedding(20, 8, padding_idx=1), None),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, stride=2, dilation=2), (2, 6, 9, 9)),
    "conv2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect", bias=False), (2, 6, 5, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(6, 8, 3), (6, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 2, 2)), (2, 6, 5, 4, 4)),
}
SIDES = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "input"])


def case(name):
    build, shape = LAYERS[name]
    x = torch.randint(0, 20, (2, 5)) if shape is None else torch.randn(shape)
    return build(), x


def config(feedforward=False, **options):
    chosen = ["layer"] if feedforward else []
    options = {"target_modules": ["layer"], "feedforward_modules": chosen, "init_ia3_weights": False, **options}
    return IA3Config(**options)


def adapted(layer, adapter_name="default", **options):
    net = layer if isinstance(layer, Net) else Net(layer)
    return IA3Model(net, config(**options), adapter_name).eval()


def add(model, adapter_name, **options):
    model.peft_config[adapter_name] = config(**options)
    model.inject_adapter(model.model, adapter_name)


# ----------------------------------------------------------------------------------------------------- the mathematics


def worked_example(feedforward):
    base = nn.Linear(2, 2)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2)
    model = adapted(base, feedforward=feedforward)
    vector = model.model.layer.ia3_l["default"]
    vector.data = torch.tensor([2.0, 0.5]).view_as(vector)
    return model


@SIDES
def test_worked_example(feedforward):
    model = worked_example(feedforward)
    assert model(torch.ones(2)).tolist() == ([4.0, 9.0] if feedforward else [8.0, 4.0])


def test_merged_worked_example_rescales_the_bias_too():
    model = worked_example(feedforward=False)
    model.merge_adapter()
    assert model.model.layer.weight.tolist() == [[2.0, 4.0], [1.5, 2.0]]
    assert model.model.layer.bias.tolist() == [2.0, 0.5]


def test_merged_input_side_leaves_the_bias_alone():
    model = worked_example(feedforward=True)
    model.merge_adapter()
    assert model.model.layer.weight.tolist() == [[2.0, 1.0], [6.0, 2.0]]
    assert model.model.layer.bias.tolist() == [1.0, 1.0]


@SIDES
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_merged_forward(name, feedforward):
    layer, x = case(name)
    before, base = copy.deepcopy(layer.state_dict()), layer(x)
    model = adapted(layer, feedforward=feedforward)
    output = model(x)
    assert output.shape == base.shape and not torch.allclose(output, base, atol=1e-2)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    after = model.model.layer.base_layer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_zeros_are_unmerged_too():
    model = adapted(nn.Linear(3, 3))
    before = model.model.layer.weight.data.clone()
    model.model.layer.ia3_l["default"].data.zero_()
    model.merge_adapter()
    assert not model.model.layer.weight.any() and not model.model.layer.bias.any()
    model.unmerge_adapter()
    assert torch.equal(model.model.layer.weight.data, before)


def test_safe_merge_refuses_a_bias_that_is_not_finite():
    model = adapted(nn.Linear(3, 3))
    layer = model.model.layer
    layer.bias.data[0], layer.ia3_l["default"].data[0, 0] = 3e38, 100.0
    with pytest.raises(ValueError, match="'default'.*layer.*'bias'"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged


# ----------------------------------------------------------------------------------------------- shapes, start, layers


@pytest.mark.parametrize(
    "name, layer_cls, output_side, input_side",
    [
        ("linear", Linear, (8, 1), (1, 12)),
        ("transformers Conv1D", Linear, (8, 1), (1, 12)),
        ("embedding", Embedding, (8, 1), (1, 20)),
        ("conv1d", Conv1d, (1, 8, 1), (1, 6, 1)),
        ("conv2d", Conv2d, (1, 8, 1, 1), (1, 6, 1, 1)),
        ("conv2d grouped", Conv2d, (1, 8, 1, 1), (1, 6, 1, 1)),
        ("conv3d", Conv3d, (1, 8, 1, 1, 1), (1, 6, 1, 1, 1)),
    ],
)
def test_shapes_and_layer_classes(name, layer_cls, output_side, input_side):
    for feedforward, shape in ((False, output_side), (True, input_side)):
        layer = adapted(case(name)[0], feedforward=feedforward).model.layer
        assert type(layer) is layer_cls and repr(layer).startswith(f"{layer_cls.__name__}(")
        assert {entry.saved: tuple(entry.tensor.shape) for entry in layer.state_entries("default")} == {"ia3_l": shape}
        assert layer.is_feedforward is feedforward
        assert not layer.supports_lora_conversion()


@SIDES
@pytest.mark.parametrize("name", ["linear", "transformers Conv1D", "conv2d"])
def test_start_is_the_base_model(name, feedforward):
    layer, x = case(name)
    base = layer(x)
    model = adapted(layer, feedforward=feedforward, init_ia3_weights=True)
    assert torch.equal(model(x), base)
    assert model.model.layer.ia3_l["default"].eq(1).all()


@pytest.mark.parametrize("init_ia3_weights", [True, False])
def test_start_draws_a_normal_in_any_case(init_ia3_weights):
    net = Net(nn.Linear(12, 8))
    torch.manual_seed(7)
    layer = adapted(net, init_ia3_weights=init_ia3_weights).model.layer
    after = torch.rand(1)
    torch.manual_seed(7)
    drawn = torch.randn(8, 1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(layer.ia3_l["default"].data, torch.ones(8, 1) if init_ia3_weights else drawn)


def test_reset_starts_over():
    layer = adapted(nn.Linear(3, 3)).model.layer
    layer.reset_ia3_parameters("unknown")
    layer.reset_ia3_parameters("default")
    assert layer.ia3_l["default"].eq(1).all()


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(3, 3, 2), nn.Bilinear(2, 2, 2), nn.LayerNorm(4)], ids=repr)
def test_other_modules_are_refused(module):
    with pytest.raises(ValueError, match=f"layer.*{type(module).__name__}.*linear"):
        adapted(module)


def test_storage_order_is_corrected_by_layer():
    wrong = config(fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        model = IA3Model(Net(nn.Linear(3, 2)), wrong, "default")
    assert wrong.fan_in_fan_out is False and model.model.layer.fan_in_fan_out is False
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        layer = adapted(Conv1D(2, 3)).model.layer
    assert layer.fan_in_fan_out is True and layer.is_target_conv_1d_layer is True


def test_backends_that_are_not_there_are_no_attributes():
    with pytest.raises(AttributeError):
        peft.tuners.ia3.NoSuchLayer  # noqa: B018


# ---------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d grouped"])
def test_each_adapter_has_its_own_side(name):
    layer, x = case(name)
    model = adapted(layer, "a", feedforward=False)
    add(model, "b", feedforward=True)
    layer = model.model.layer
    assert layer.feedforward == {"a": False, "b": True}
    assert [layer.ia3_l[n].shape[1] > 1 for n in "ab"] == ([False, True] if name != "conv2d grouped" else [True, True])
    model.set_adapter("b")
    only_b = model(x)
    model.set_adapter(["a", "b"])
    both = model(x)
    scale = layer.vector("a").view(-1, *(1,) * layer._window)
    torch.testing.assert_close(both, only_b * scale)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("b")
    assert layer.feedforward == {"a": False}
    torch.testing.assert_close(model(x), layer.base_layer(x) * scale)


def test_an_adapter_that_does_not_say_is_like_the_first():
    layer = adapted(nn.Linear(3, 5), feedforward=True).model.layer
    layer.update_layer("more", config())
    assert layer.feedforward["more"] is True and layer.ia3_l["more"].shape == (1, 3)


@pytest.mark.parametrize("name", ["linear", "transformers Conv1D", "embedding", "conv2d grouped"])
def test_mixed_batch_calls_the_base_layer_once(name):
    layer, _ = case(name)
    model = adapted(layer, "a", feedforward=False)
    add(model, "b", feedforward=True)
    add(model, "c", feedforward=True)
    shape = LAYERS[name][1]
    x = torch.randint(0, 20, (6, 5)) if shape is None else torch.randn(6, *shape[1:])
    names = ["b", "__base__", "a", "c", "b", "a"]
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    with model.call_inputs(names):
        mixed = model(x)
    assert len(calls) == 1
    for row, adapter in enumerate(names):
        if adapter == "__base__":
            expected = layer(x[row : row + 1])
        else:
            model.set_adapter(adapter)
            expected = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- which is feed-forward


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi = nn.Linear(4, 6)
        self.wo = nn.Linear(6, 4)
        self.two = nn.Linear(4, 4)

    def forward(self, x):
        return self.two(self.wo(torch.tanh(self.wi(x))))


def sides(feedforward_modules, target_modules=("wi", "wo", "two")):
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    model = IA3Model(
        nn.Sequential(Block()), IA3Config(target_modules=targets, feedforward_modules=feedforward_modules), "default"
    )
    layers = [(name, module) for name, module in model.model.named_modules() if isinstance(module, IA3Layer)]
    return {name: module.feedforward["default"] for name, module in layers}


@pytest.mark.parametrize(
    "feedforward_modules, chosen",
    [
        ([], set()),
        (["wi"], {"0.wi"}),
        # An entry of a list counts as text at the end of the name, as adapters in the wild rely on.
        (["wo"], {"0.wo", "0.two"}),
        (r".*\.wo", {"0.wo"}),
        ("wo", set()),
    ],
)
def test_which_modules_are_feedforward(feedforward_modules, chosen):
    assert {name for name, side in sides(feedforward_modules).items() if side} == chosen


def test_feedforward_modules_are_targets():
    with pytest.raises(ValueError, match=r"\['wx'\] are not among \['wi', 'wo'\]"):
        IA3Config(target_modules=["wi", "wo"], feedforward_modules=["wo", "wx"])
    IA3Config(target_modules=".*w.", feedforward_modules=["wx"])


def test_feedforward_modules_must_be_known():
    with pytest.raises(ValueError, match=r"feedforward_modules.*'custom'.*\[\]"):
        IA3Model(Block(), IA3Config(target_modules=["wi"]), "default")


@pytest.mark.compat
def test_defaults_of_a_model_type():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=20)
    )
    given = IA3Config()
    tuner = IA3Model(model, given, "default")
    assert given.target_modules == {"k", "v", "wo"} and given.feedforward_modules == {"wo"}
    found = {
        name.rsplit(".", 1)[1]: module.feedforward["default"]
        for name, module in tuner.model.named_modules()
        if isinstance(module, IA3Layer)
    }
    assert found == {"k": False, "v": False, "wo": True}


def test_a_long_list_of_targets_stays_as_it_is():
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(25)))
    given = IA3Config(target_modules=[str(n) for n in range(25)], feedforward_modules=["3"])
    IA3Model(net, given, "default")
    assert given.target_modules == {str(n) for n in range(25)}


def test_lists_become_sets():
    given = IA3Config(target_modules=["a", "b"], exclude_modules=["c"], feedforward_modules=["a"])
    assert (given.target_modules, given.exclude_modules, given.feedforward_modules) == ({"a", "b"}, {"c"}, {"a"})
    assert given.peft_type == "IA3"


# ------------------------------------------------------------------------------------------------------- weighted sums


def weighted_model(first=None, second=None):
    """Adapters "p" and "q" on a block, with random vectors."""
    first = {"target_modules": ["wi", "wo"], "feedforward_modules": ["wo"], **(first or {})}
    second = {"target_modules": ["wi", "wo"], "feedforward_modules": ["wo"], **(second or {})}
    first, second = (IA3Config(init_ia3_weights=False, **options) for options in (first, second))
    model = get_peft_model(nn.Sequential(Block()), first, adapter_name="p")
    model.add_adapter("q", second)
    return model


def vectors(model, adapter):
    return {
        name: module.ia3_l[adapter].data
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, IA3Layer) and adapter in module.ia3_l
    }


def test_weighted_sum():
    model = weighted_model()
    model.add_weighted_adapter(["p", "q"], [0.5, 1.5], "w")
    p, q, w = (vectors(model, name) for name in "pqw")
    assert w.keys() == {"0.wi", "0.wo"}
    for name in w:
        torch.testing.assert_close(w[name], 0.5 * p[name] + 1.5 * q[name])
    assert model.active_adapters == ["p"]
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith(".w"))


def test_weighted_sum_is_over_the_adapters_that_have_the_module():
    model = weighted_model(second={"target_modules": ["wi"], "feedforward_modules": []})
    model.add_weighted_adapter(["p", "q"], [2.0, 3.0], "w")
    p, q, w = (vectors(model, name) for name in "pqw")
    torch.testing.assert_close(w["0.wi"], 2 * p["0.wi"] + 3 * q["0.wi"])
    torch.testing.assert_close(w["0.wo"], 2 * p["0.wo"])
    config = model.peft_config["w"]
    assert config.target_modules == {"wi", "wo"} and config.feedforward_modules == {"wo"}


def test_weighted_sum_can_be_saved_and_loaded(tmp_path):
    model = weighted_model()
    model.add_weighted_adapter(["p", "q"], [0.5, 0.5], "w")
    model.set_adapter("w")
    x = torch.randn(2, 4)
    expected = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["w"])
    base = model.unload()
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "w")(x), expected)


def test_weighted_sum_of_regular_expressions():
    model = weighted_model(
        {"target_modules": ".*wi", "feedforward_modules": "none"},
        {"target_modules": r".*\.wo", "feedforward_modules": r".*\.wo"},
    )
    model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "w")
    assert model.peft_config["w"].target_modules == r"(.*wi)|(.*\.wo)"
    assert model.peft_config["w"].feedforward_modules == r"(none)|(.*\.wo)"
    assert vectors(model, "w").keys() == {"0.wi", "0.wo"}


def test_weighted_sum_covers_what_only_one_adapter_excludes():
    model = weighted_model({"exclude_modules": ["wi"]})
    model.add_weighted_adapter(["p", "q"], [1.0, 2.0], "w")
    torch.testing.assert_close(vectors(model, "w")["0.wi"], 2 * vectors(model, "q")["0.wi"])


def test_weighted_sum_takes_a_trained_copy_over():
    model = weighted_model(second={"modules_to_save": ["two"]})
    copies = model.base_model.model[0].two.modules_to_save
    copies["q"].weight.data.add_(1)
    model.add_weighted_adapter(["p", "q"], [0.5, 0.5], "w")
    assert torch.equal(copies["w"].weight, copies["q"].weight) and copies["w"].weight is not copies["q"].weight
    assert model.peft_config["w"].modules_to_save == ["two"]


def test_existing_name_is_left_alone():
    model = weighted_model()
    before = vectors(model, "q")["0.wi"].clone()
    model.add_weighted_adapter(["p"], [3.0], "q")
    assert torch.equal(vectors(model, "q")["0.wi"], before)


@pytest.mark.parametrize(
    "first, second, adapters, weights, message",
    [
        ({}, {}, ["p", "Q"], [1.0, 1.0], r"'Q'.*\['p', 'q'\].*Did you mean 'q'"),
        ({}, {}, ["p", "q"], [1.0], "2 adapters.*1 weights"),
        ({}, {}, [], [], "0 adapters"),
        ({}, {"target_modules": ".*w."}, ["p", "q"], [1.0, 1.0], "target_modules.*regular expressions"),
        ({}, {"feedforward_modules": r".*\.wo"}, ["p", "q"], [1.0, 1.0], "feedforward_modules.*regular expressions"),
        ({"modules_to_save": ["two"]}, {"modules_to_save": ["two"]}, ["p", "q"], [1.0, 1.0], r"\['p', 'q'\].*'0.two'"),
        ({}, {"feedforward_modules": []}, ["p", "q"], [1.0, 1.0], "'0.wo'.*input.*'q': 'output'"),
    ],
)
def test_what_cannot_be_added_up(first, second, adapters, weights, message):
    model = weighted_model(first, second)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, "w")
    assert set(model.peft_config) == {"p", "q"}
    assert [name for name, _ in model.named_parameters()] == names


# -------------------------------------------------------------------------------------------------------------- dtypes


@SIDES
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_half_precision_base(name, feedforward):
    layer, x = case(name)
    model = get_peft_model(Net(layer).to(torch.bfloat16), config(feedforward=feedforward))
    layer = model.base_model.model.layer
    assert layer.ia3_l["default"].dtype == torch.float32
    assert model(x.to(torch.bfloat16)).dtype == torch.bfloat16
    layer.merge()
    assert {tensor.dtype for tensor in layer.base_layer.state_dict().values()} == {torch.bfloat16}
