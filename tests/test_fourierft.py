"""FourierFT: ΔW = α·Re(IFFT2(F)) with a sparse trained F, on every kind of layer."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import FourierFTConfig, FourierFTModel
from peft.tuners.fourierft.layer import (
    FourierFTConv1d,
    FourierFTConv2d,
    FourierFTConv3d,
    FourierFTEmbedding,
    FourierFTLayer,
    FourierFTLinear,
)
from peft.tuners.fourierft.spectrum import draw_places, inverse_transform


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
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "embedding": (lambda: nn.Embedding(20, 8, padding_idx=1), None),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=2), (2, 6, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, padding="same", bias=False), (2, 6, 5, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(6, 8, 1), (6, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 8, (3, 2, 2)), (2, 4, 5, 4, 4)),
}


def case(name):
    build, shape = LAYERS[name]
    x = torch.randint(0, 20, (2, 5)) if shape is None else torch.randn(shape)
    return build(), x


def config(**options):
    return FourierFTConfig(**{"target_modules": ["layer"], "n_frequency": 10, "scaling": 20.0, **options})


def adapted(layer, adapter_name="default", **options):
    return FourierFTModel(Net(layer), config(**options), adapter_name).eval()


# ----------------------------------------------------------------------------------------------------- the mathematics


def test_worked_example():
    base = nn.Linear(2, 2, bias=False)
    base.weight.data.zero_()
    model = adapted(base, n_frequency=1, scaling=4.0)
    layer = model.model.layer
    assert layer.indices["default"].tolist() == [[1], [1]]
    layer.fourierft_spectrum["default"].data.fill_(1)
    expected = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    torch.testing.assert_close(model(torch.eye(2)), expected)
    model.merge_adapter()
    torch.testing.assert_close(layer.weight.data, expected)


def test_places_are_drawn_from_the_seed():
    assert draw_places((2, 3), 6, 777).tolist() == [[1, 0, 0, 0, 1, 1], [2, 0, 1, 2, 0, 1]]
    assert draw_places((2, 3), 4, 777).tolist() == [[1, 0, 0, 0], [2, 0, 1, 2]]
    state = torch.get_rng_state()
    places = draw_places((5, 7), 35, 1)
    assert len(set(zip(*places.tolist()))) == 35
    assert torch.equal(torch.get_rng_state(), state)


def test_transform_is_a_sum_of_cosines():
    rows, columns, n = 4, 6, 5
    spectrum, places = torch.randn(n), draw_places((rows, columns), n, 3)
    expected = torch.zeros(rows, columns)
    for s, a, b in zip(spectrum.tolist(), *places.tolist()):
        for p in range(rows):
            for q in range(columns):
                expected[p, q] += s * math.cos(2 * math.pi * (a * p / rows + b * q / columns)) / (rows * columns)
    torch.testing.assert_close(inverse_transform(spectrum, places, (rows, columns)), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_update_is_the_transform_over_one_row_for_each_output(name):
    layer = adapted(case(name)[0]).model.layer
    shape = layer.kind.shape(layer.get_base_layer())
    matrix = inverse_transform(
        layer.fourierft_spectrum["default"], layer.indices["default"], (shape[0], math.prod(shape[1:]))
    )
    torch.testing.assert_close(layer.delta_weight("default"), (20 * matrix).view(shape))


@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_merged_forward(name):
    layer, x = case(name)
    weight, base = copy.deepcopy(layer.weight.data), layer(x)
    model = adapted(layer)
    output = model(x)
    assert not torch.allclose(output, base, atol=1e-2)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(layer.weight.data, weight)


def test_update_of_a_layer_that_stores_its_weight_transposed_is_not_transposed():
    layer, x = case("transformers Conv1D")
    weight = copy.deepcopy(layer.weight.data)
    model = adapted(layer)
    delta = model.model.layer.get_delta_weight("default")
    assert delta.shape == (8, 12)
    torch.testing.assert_close(model(x), layer(x) + x @ delta.T)
    model.merge_adapter()
    torch.testing.assert_close(layer.weight.data, weight + delta.T)


def test_two_adapters_add_up_and_are_independent():
    layer, x = case("linear")
    model = adapted(layer, "a")
    model.peft_config["b"] = config(n_frequency=7, random_loc_seed=5, scaling=30.0)
    model.inject_adapter(model.model, "b")
    a, b = (model.model.layer.get_delta_weight(name) for name in "ab")
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(x), layer(x) + x @ (a + b).T)
    model.delete_adapter("a")
    layer = model.model.layer
    assert [list(getattr(layer, name)) for name in layer.adapter_layer_names + layer.other_param_names] == [["b"]] * 5
    torch.testing.assert_close(layer.get_delta_weight("b"), b)


def test_scale_api():
    model = adapted(nn.Linear(3, 4))
    layer, x = model.model.layer, torch.randn(2, 3)
    delta = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta / 2)
    layer.scale_layer(4)
    torch.testing.assert_close(model(x), layer.base_layer(x) + 2 * x @ delta.T)
    layer.unscale_layer()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    assert layer.fourierft_scaling == {"default": 20.0}


def test_merge_of_infinity_is_refused_by_name():
    model = adapted(nn.Linear(3, 4))
    model.model.layer.fourierft_spectrum["default"].data.fill_(float("inf"))
    before = copy.deepcopy(model.model.layer.weight.data)
    with pytest.raises(ValueError, match="'default' into layer gives NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.model.layer.weight.data, before)


def test_gradient_reaches_the_spectrum_only():
    model = adapted(nn.Linear(3, 4)).train()
    model(torch.randn(2, 3)).sum().backward()
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["model.layer.fourierft_spectrum.default"]


# ----------------------------------------------------------------------------------------------- shapes, start, layers


@pytest.mark.parametrize(
    "name, layer_cls",
    [
        ("linear", FourierFTLinear),
        ("transformers Conv1D", FourierFTLinear),
        ("embedding", FourierFTEmbedding),
        ("conv1d", FourierFTConv1d),
        ("conv2d", FourierFTConv2d),
        ("conv3d", FourierFTConv3d),
    ],
)
def test_tensors_and_classes(name, layer_cls):
    layer = adapted(case(name)[0]).model.layer
    saved = {entry.saved: tuple(entry.tensor.shape) for entry in layer.state_entries("default")}
    assert saved == {"fourierft_spectrum": (10,)}
    assert layer.indices["default"].shape == (2, 10) and layer.indices["default"].dtype == torch.int64
    assert layer.fourierft_n_frequency == {"default": 10} and layer.fourierft_random_loc_seed == {"default": 777}
    assert type(layer) is layer_cls and isinstance(layer, FourierFTLayer)
    assert repr(layer).startswith(f"fourierft.{layer_cls.__name__}(")
    assert layer.supports_lora_conversion()


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(3, 3, 2), nn.LayerNorm(4)], ids=repr)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"layer.*{type(module).__name__}.*linear"):
        adapted(module)


@pytest.mark.parametrize("init_weights", [False, True])
def test_start_draws_one_normal_number_for_each_frequency(init_weights):
    net = Net(nn.Linear(12, 8))
    torch.manual_seed(3)
    layer = FourierFTModel(net, config(init_weights=init_weights), "default").model.layer
    after = torch.rand(1)
    torch.manual_seed(3)
    drawn = torch.empty(10).normal_()
    assert torch.equal(layer.fourierft_spectrum["default"].data, torch.zeros(10) if init_weights else drawn)
    assert torch.equal(torch.rand(1), after)


def test_places_survive_construction_without_storage():
    layer = FourierFTModel(Net(nn.Linear(12, 8)), config(), "default", low_cpu_mem_usage=True).model.layer
    assert layer.fourierft_spectrum["default"].is_meta
    assert torch.equal(layer.indices["default"], draw_places((8, 12), 10, 777))


@pytest.mark.parametrize("n_frequency", [0, -3, 13])
def test_number_of_frequencies_fits_the_weight(n_frequency):
    with pytest.raises(ValueError, match=f"layer: n_frequency.*'default'.*from 1 to 12.*4 x 3.*got {n_frequency}"):
        adapted(nn.Linear(3, 4), n_frequency=n_frequency)
    assert adapted(nn.Linear(3, 4), n_frequency=12).model.layer.indices["default"].shape == (2, 12)


def test_a_seed_is_needed():
    with pytest.raises(RuntimeError, match="layer.*'default' needs an integer as random_loc_seed"):
        adapted(nn.Linear(3, 4), random_loc_seed=None)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.last = nn.Linear(6, 6)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ({}, (10, 10, 10)),
        (None, (10, 10, 10)),
        ({"1": 3, "last": 4}, (10, 3, 4)),
        ({"block.0": 3}, (3, 10, 10)),
        ({"block.0": 3, "0": 5}, (5, 10, 10)),
        ({"0|last": 2}, (2, 10, 2)),
        ({"[01]": 4}, (4, 4, 10)),
    ],
    ids=str,
)
def test_pattern_gives_the_number_by_module(pattern, expected):
    options = config(target_modules=["0", "1", "last"], n_frequency_pattern=pattern)
    model = FourierFTModel(Two(), options, "default").model
    layers = (model.block[0], model.block[1], model.last)
    assert tuple(layer.fourierft_n_frequency["default"] for layer in layers) == expected


@pytest.mark.parametrize("pattern", ["block.*", "^last", ".*last", "l.st", "x"])
def test_pattern_that_no_name_matches_after_a_dot_changes_nothing_and_warns(pattern):
    options = config(target_modules=["0", "1", "last"], n_frequency_pattern={pattern: 3})
    with pytest.warns(RuntimeWarning, match=f"n_frequency_pattern: {re.escape(repr(pattern))} matches none"):
        model = FourierFTModel(Two(), options, "default").model
    layers = (model.block[0], model.block[1], model.last)
    assert [layer.fourierft_n_frequency["default"] for layer in layers] == [10, 10, 10]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": "a.*", "layers_to_transform": [1]}, "layers_to_transform need target_modules"),
        ({"target_modules": "a.*", "layers_pattern": "h"}, "layers_pattern need target_modules"),
        ({"target_modules": ["a"], "layers_pattern": "h"}, "layers_pattern='h'.*set layers_to_transform"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        FourierFTConfig(**options)


@pytest.mark.parametrize("build, stored", [(lambda: nn.Linear(3, 4), False), (lambda: Conv1D(4, 3), True)])
def test_fan_in_fan_out_follows_the_layer(build, stored):
    with pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {stored}"):
        model = adapted(build(), fan_in_fan_out=not stored)
    assert model.peft_config["default"].fan_in_fan_out is stored


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_half_precision_base(name):
    layer, x = case(name)
    model = adapted(layer.bfloat16())
    x, layer = x.bfloat16() if x.is_floating_point() else x, model.model.layer
    assert layer.fourierft_spectrum["default"].dtype == layer.delta_weight("default").dtype == torch.bfloat16
    low, delta = model(x), layer.delta_weight("default")
    layer.fourierft_spectrum["default"] = nn.Parameter(layer.fourierft_spectrum["default"].data.float())
    assert torch.equal(layer.delta_weight("default").bfloat16(), delta)  # computed in float32, rounded once
    assert low.dtype == model(x).dtype == torch.bfloat16
    model.merge_adapter()
    assert layer.weight.dtype == torch.bfloat16
