"""What holds for every method, as one would write it down, on layers of any size.

x is a batch, f the model with an adapter, f₀ the base model; names of methods come from the registry.
"""

import copy
import warnings
from dataclasses import dataclass

import fuzzing
import matrix
import torch
from fuzzing import fuzzed
from hypothesis import strategies as st
from torch import nn

import peft
from peft.engine.layer import AdditiveLayer
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

OF_ACTIVATIONS = ("POLY",)
"""Methods without a merged weight."""
NEED = {"OFT": {"oft_block_size": 2}, "FOURIERFT": {"n_frequency": 3, "scaling": 20.0}}


def on_linear_layers(entry):
    return {"linear"} & entry.model_cls.layer_classes.keys() and entry.config_cls is not peft.AdaLoraConfig


METHODS = sorted(name for name, entry in fuzzing.layer_methods().items() if on_linear_layers(entry))
MERGEABLE = sorted(set(METHODS) - set(OF_ACTIVATIONS))
ADDITIVE = sorted(
    name
    for name in MERGEABLE
    if issubclass(fuzzing.layer_methods()[name].model_cls.layer_classes["linear"], AdditiveLayer)
)
"""Methods with W' = W + s ΔW."""


class Pair(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, sizes, bias):
        super().__init__()
        wide, middle, narrow = sizes
        self.lin0, self.lin1 = nn.Linear(wide, middle, bias=bias), nn.Linear(middle, narrow, bias=bias)

    def forward(self, x, **kwargs):
        return self.lin1(torch.tanh(self.lin0(x)))


@dataclass(frozen=True)
class Shape:
    """Sizes of the layers and of a batch."""

    sizes: tuple
    bias: bool
    batch: tuple
    seed: int

    def base(self):
        torch.manual_seed(self.seed)
        return Pair(self.sizes, self.bias).eval()

    def x(self):
        return torch.randn(*self.batch, self.sizes[0], generator=torch.Generator().manual_seed(self.seed))


sizes = st.tuples(*[st.integers(2, 6).map(lambda half: 2 * half)] * 3)  # which r = 2 and blocks of 2 divide
shapes = st.builds(
    Shape, sizes, st.booleans(), st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple), st.integers(0, 99)
)
methods = st.sampled_from(METHODS)


def config(method):
    options = {**matrix.OPTIONS.get(method, {}), **NEED.get(method, {})}
    return fuzzing.layer_methods()[method].config_cls(target_modules=["lin0", "lin1"], **options)


def adapted(method, shape, *names):
    """A model with adapters that were moved away from their starts, each in its own way; the first is active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(shape.base(), config(method), adapter_name=names[0]).eval()
        for name in names[1:]:
            model.add_adapter(name, config(method))
    with torch.no_grad():
        for name in names:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            for key, parameter in sorted(model.named_parameters()):
                if f".{name}" in key and "base_layer" not in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def of(model, x):
    return model(x, **({"task_ids": torch.zeros(len(x), dtype=torch.long)} if is_poly(model) else {}))


def is_poly(model):
    return any(config.peft_type == "POLY" for config in getattr(model, "peft_config", {}).values())


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


# ------------------------------------------------------------------------------------------------------ one adapter


@fuzzed(20, method=methods, shape=shapes)
def test_an_adapter_says_something_and_disabled_nothing(method, shape):
    """f ≠ f₀; disabled, f = f₀ bit for bit."""
    model, x = adapted(method, shape, "a"), shape.x()
    assert not torch.equal(of(model, x), of(shape.base(), x))
    with model.disable_adapter():
        assert torch.equal(of(model, x), of(shape.base(), x))
    assert torch.equal(of(model.unload(), x), of(shape.base(), x))


@fuzzed(20, method=st.sampled_from(MERGEABLE), shape=shapes, safe=st.booleans())
def test_merged_it_is_the_same_and_unmerged_the_base(method, shape, safe):
    """merge(f) = f; unmerge(merge(f)) has the base's weights bit for bit."""
    model, x = adapted(method, shape, "a"), shape.x()
    expected, before = of(model, x), copy.deepcopy(model.state_dict())
    model.merge_adapter(safe_merge=safe)
    assert_close(of(model, x), expected)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(of(model, x), expected)
    assert_close(of(model.merge_and_unload(), x), expected)


@fuzzed(20, method=methods, shape=shapes)
def test_saved_and_loaded_it_is_the_same_and_so_is_its_file(method, shape, tmp_path):
    """load(save(f)) = f bit for bit, and save(load(save(f))) = save(f) byte for byte."""
    model, x = adapted(method, shape, "default"), shape.x()
    model.save_pretrained(tmp_path / "once")
    loaded = peft.PeftModel.from_pretrained(shape.base(), tmp_path / "once")
    assert torch.equal(of(loaded, x), of(model, x))
    loaded.save_pretrained(tmp_path / "twice")
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


@fuzzed(20, method=methods, shape=shapes)
def test_a_wider_dtype_and_back_changes_nothing(method, shape):
    """f in float64 is f to float32's rounding, and back in float32 it is f bit for bit."""
    model, x = adapted(method, shape, "a"), shape.x()
    expected = of(model, x)
    wide = of(model.to(torch.float64), x.double())
    assert wide.dtype == torch.float64
    assert_close(wide.float(), expected)
    assert torch.equal(of(model.to(torch.float32), x), expected)


@fuzzed(25, method=st.sampled_from(ADDITIVE), shape=shapes, scale=st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0]))
def test_an_additive_adapter_is_linear_in_its_scale(method, shape, scale):
    """With c s for s in one layer, f - f₀ is c times as large; with 0 it is nothing."""
    model, layer_input = adapted(method, shape, "a"), shape.x()
    layer = model.base_model.model.lin0
    with torch.no_grad():
        base = layer.base_layer(layer_input)
        update = layer(layer_input) - base
        layer.set_scale("a", scale)
        assert_close(layer(layer_input) - base, scale * update)
        layer.set_scale("a", 1.0)
        layer.scale_layer(scale)
        assert_close(layer(layer_input) - base, scale * update)
        layer.unscale_layer()
        assert_close(layer(layer_input) - base, update)


# ----------------------------------------------------------------------------------------------------- two adapters


@fuzzed(25, method=methods, shape=shapes)
def test_the_order_in_which_adapters_came_is_of_no_account(method, shape):
    """f_a and f_b are the same whichever was added first."""
    one, other, x = adapted(method, shape, "a", "b"), adapted(method, shape, "b", "a"), shape.x()
    found = []
    for name in ("a", "b"):  # what was drawn at their starts depends on the order
        values = peft.get_peft_model_state_dict(one, adapter_name=name)
        peft.set_peft_model_state_dict(other, values, adapter_name=name)
    for name in ("a", "b"):
        one.set_adapter(name)
        other.set_adapter(name)
        found.append(of(one, x))
        assert torch.equal(found[-1], of(other, x))
    assert not torch.equal(*found)


@fuzzed(25, method=st.sampled_from(ADDITIVE), shape=shapes)
def test_additive_adapters_add_up_in_any_order(method, shape):
    """In one layer, (f_ab - f₀) = (f_a - f₀) + (f_b - f₀) = (f_ba - f₀), merged too, one after the other or at once."""
    model, x = adapted(method, shape, "a", "b"), shape.x()
    layer = model.base_model.model.lin0
    with torch.no_grad():
        base, updates = layer.base_layer(x), []
        for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
            model.base_model.set_adapter(names)
            updates.append(layer(x) - base)
        a, b, both, other = updates
        assert_close(both, a + b)
        assert_close(other, a + b)
        for names in (["a", "b"], ["b", "a"]):
            for parts in ([names], [names[:1], names[1:]]):
                for part in parts:
                    model.merge_adapter(part)
                assert_close(layer(x) - base, a + b)
                model.unmerge_adapter()


def test_methods_are_sorted_by_what_they_declare():
    assert {"LORA", "LOHA", "LOKR", "VERA", "FOURIERFT"} <= set(ADDITIVE) < set(MERGEABLE) < set(METHODS)
    assert {"OFT", "HRA", "IA3"} <= set(MERGEABLE) - set(ADDITIVE)
