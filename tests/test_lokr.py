"""LoKr: ΔW = s·(w₁ ⊗ w₂), on every kind of layer. What it shares with LoHa is tested there."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoKrConfig, LoKrModel, get_peft_model
from peft.tuners.lokr.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoKrLayer,
    factorization,
    make_kron,
    make_weight_cp,
)


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
    "linear on one row": (lambda: nn.Linear(12, 8), (12,)),
    "linear on no rows": (lambda: nn.Linear(12, 8), (0, 12)),
    "linear of prime size": (lambda: nn.Linear(7, 13, bias=False), (2, 3, 7)),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "embedding": (lambda: nn.Embedding(20, 8), None),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
    "conv1d pointwise": (lambda: nn.Conv1d(6, 8, 1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, stride=2, dilation=2), (2, 6, 9, 9)),
    "conv2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, padding="same", bias=False), (2, 6, 5, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(6, 8, 3), (6, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 2, 2)), (2, 6, 5, 4, 4)),
}


def case(name):
    build, shape = LAYERS[name]
    x = torch.randint(0, 20, (2, 5)) if shape is None else torch.randn(shape)
    return build(), x


def adapted(layer, adapter_name="default", **options):
    options = {"target_modules": ["layer"], "r": 2, "alpha": 3, "init_weights": False, **options}
    net = layer if isinstance(layer, Net) else Net(layer)
    return LoKrModel(net, LoKrConfig(**options), adapter_name).eval()


def tensors(layer, adapter="default"):
    return {entry.saved: entry.tensor for entry in layer.state_entries(adapter)}


def shapes(layer, adapter="default"):
    return {name.removeprefix("lokr_"): tuple(tensor.shape) for name, tensor in tensors(layer, adapter).items()}


# ----------------------------------------------------------------------------------------------------- splitting sizes


@pytest.mark.parametrize(
    "dimension, factor, expected",
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (360, -1, (18, 20)),
        (1, -1, (1, 1)),
        (360, 7, (6, 60)),
        (360, 16, (15, 24)),
        (250, 16, (10, 25)),
        (12, 5, (3, 4)),
        (12, 8, (3, 4)),
        (16, 3, (2, 8)),
        (7, 2, (1, 7)),
        (4, 8, (2, 2)),
        (6, 12, (2, 3)),
        # A divisor is taken as it is, also where it is the larger part.
        (128, 4, (4, 32)),
        (6, 6, (6, 1)),
        (64, 64, (64, 1)),
        (96, 10, (8, 12)),
        (96, 0, (1, 96)),
        (96, -2, (1, 96)),
    ],
)
def test_factorization(dimension, factor, expected):
    assert factorization(dimension, factor) == expected


@pytest.mark.parametrize("factor", [-1, 2, 3, 7, 16])
def test_factorization_is_one(factor):
    for dimension in range(1, 130):
        m, n = factorization(dimension, factor)
        assert m * n == dimension
        if dimension % factor or factor < 0:
            assert m <= n and (factor < 0 or m <= factor)


# ----------------------------------------------------------------------------------------------------- the mathematics


def test_worked_example():
    base = nn.Linear(4, 4, bias=False)
    base.weight.data = torch.eye(4)
    model = adapted(base, r=2, alpha=1)
    model.model.layer.lokr_w1["default"].data = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    model.model.layer.lokr_w2["default"].data = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert model.model.layer.get_delta_weight("default").tolist() == [
        [0.5, 0.0, 1.0, 0.0],
        [1.5, 2.0, 3.0, 4.0],
        [0.0, 0.0, -0.5, 0.0],
        [0.0, 0.0, -1.5, -2.0],
    ]
    x = torch.tensor([1.0, 2.0, 0.0, 1.0])
    assert model(x).tolist() == [1.5, 11.5, 0.0, -1.0]
    model.merge_adapter()
    assert model(x).tolist() == [1.5, 11.5, 0.0, -1.0]


@pytest.mark.parametrize("window", [(), (3,), (3, 2), (2, 3, 2)])
def test_index_rule(window):
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5, *window)
    result = make_kron(w1, w2, 0.5)
    if len(window) == 1:
        # The arrangement of Conv1d's full w₂: slices of w₁ lie along input channels and window.
        expected = torch.einsum("ij,pqt->piqjt", w1, w2).reshape(4, 10, 9)
    else:
        expected = torch.einsum("ij,pq...->ipjq...", w1, w2).reshape(8, 15, *window)
    torch.testing.assert_close(result, expected * 0.5)


def test_core_between_two_matrices():
    t, a, b = torch.randn(2, 2, 3, 1), torch.randn(2, 4), torch.randn(2, 5)
    torch.testing.assert_close(make_weight_cp(t, a, b), torch.einsum("ijxy,ip,jq->pqxy", t, a, b))


def test_conv1d_with_full_w2_has_the_order_of_existing_adapters():
    layer = adapted(nn.Conv1d(2, 4, 2), r=1, alpha=1).model.layer
    assert shapes(layer) == {"w1": (2, 1), "w2": (2, 2, 2)}
    layer.lokr_w1["default"].data = torch.tensor([[1.0], [10.0]])
    layer.lokr_w2["default"].data = torch.arange(8.0).view(2, 2, 2)
    assert layer.get_delta_weight("default").tolist() == [
        [[0.0, 1.0], [2.0, 3.0]],
        [[0.0, 10.0], [20.0, 30.0]],
        [[4.0, 5.0], [6.0, 7.0]],
        [[40.0, 50.0], [60.0, 70.0]],
    ]


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("name, window", [("conv1d", 3), ("conv2d", (3, 2)), ("conv3d", (3, 2, 2))])
def test_low_rank_convolutions_follow_the_index_rule(name, window, effective):
    layer = adapted(case(name)[0], r=1, use_effective_conv2d=effective).model.layer
    w1 = layer.lokr_w1["default"]
    a, b = layer.lokr_w2_a["default"], layer.lokr_w2_b["default"]
    window = (window,) if isinstance(window, int) else window
    if effective:
        w2 = make_weight_cp(layer.lokr_t2["default"].reshape(1, 1, *window), a, b)
    else:
        w2 = (a @ b).view(len(a), -1, *window)
    expected = torch.einsum("ij,pq...->ipjq...", w1, w2).reshape(layer.weight.shape) * 3
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize("options", [{}, {"use_effective_conv2d": True}, {"decompose_both": True}], ids=str)
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_merged_forward(name, r, options):
    layer, x = case(name)
    weight, base = copy.deepcopy(layer.weight.data), layer(x)
    model = adapted(layer, r=r, alpha=3 * r, **options)
    output = model(x)
    assert output.shape == base.shape
    assert not len(x) or not torch.allclose(output, base, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model.model.layer.weight.data, weight + model.model.layer.get_delta_weight("default"))
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model.model.layer.weight.data, weight)


@pytest.mark.parametrize("factor", [2, 3, 8, 12])
def test_every_split_has_its_forward(factor):
    layer, x = case("linear")
    model = adapted(layer, decompose_factor=factor)
    expected = layer(x) + x @ model.model.layer.get_delta_weight("default").T
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "conv2d grouped"])
def test_training_never_forms_delta_weight_unless_grouped(name, monkeypatch):
    layer, x = case(name)
    model = adapted(layer).train()
    formed = []
    original = LoKrLayer.delta_weight
    monkeypatch.setattr(LoKrLayer, "delta_weight", lambda self, a: formed.append(a) or original(self, a))
    model(x).sum().backward()
    assert bool(formed) == (name == "conv2d grouped")


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_training_has_the_gradient_of_the_formula(name):
    layer, x = case(name)
    model = adapted(layer, r=1, decompose_both=True, use_effective_conv2d=True).train()
    model(x).pow(2).sum().backward()
    found = {name: tensor.grad.clone() for name, tensor in tensors(model.model.layer).items()}
    model.zero_grad()
    weight = layer.weight + model.model.layer.get_delta_weight("default")
    torch.func.functional_call(layer, {"weight": weight}, (x,)).pow(2).sum().backward()
    for name, tensor in tensors(model.model.layer).items():
        torch.testing.assert_close(found[name], tensor.grad, atol=1e-3, rtol=1e-3)


# ----------------------------------------------------------------------------------------------- shapes, start, layers


@pytest.mark.parametrize(
    "layer, options, expected",
    [
        (nn.Linear(60, 48), {}, {"w1": (6, 6), "w2_a": (8, 2), "w2_b": (2, 10)}),
        (nn.Linear(60, 48), {"decompose_factor": 4}, {"w1": (4, 4), "w2_a": (12, 2), "w2_b": (2, 15)}),
        (nn.Linear(60, 48), {"decompose_factor": 15}, {"w1": (6, 15), "w2_a": (8, 2), "w2_b": (2, 4)}),
        (nn.Linear(60, 48), {"r": 5}, {"w1": (6, 6), "w2": (8, 10)}),
        (nn.Linear(60, 48), {"r": 4}, {"w1": (6, 6), "w2_a": (8, 4), "w2_b": (4, 10)}),
        (
            nn.Linear(60, 48),
            {"decompose_both": True},
            {"w1_a": (6, 2), "w1_b": (2, 6), "w2_a": (8, 2), "w2_b": (2, 10)},
        ),
        (
            nn.Linear(60, 48),
            {"decompose_both": True, "r": 3},
            {"w1": (6, 6), "w2_a": (8, 3), "w2_b": (3, 10)},
        ),
        (Conv1D(48, 60), {}, {"w1": (6, 6), "w2_a": (8, 2), "w2_b": (2, 10)}),
        (nn.Embedding(60, 48), {}, {"w1": (6, 6), "w2_a": (8, 2), "w2_b": (2, 10)}),
        (nn.Conv2d(30, 48, (3, 2)), {}, {"w1": (6, 5), "w2_a": (8, 2), "w2_b": (2, 36)}),
        (
            nn.Conv2d(30, 48, (3, 2)),
            {"use_effective_conv2d": True},
            {"w1": (6, 5), "w2_a": (2, 8), "w2_b": (2, 6), "t2": (2, 2, 3, 2)},
        ),
        (nn.Conv2d(30, 48, (3, 2)), {"r": 4}, {"w1": (6, 5), "w2": (8, 6, 3, 2)}),
        (
            nn.Conv2d(30, 48, 1),
            {"use_effective_conv2d": True},
            {"w1": (6, 5), "w2_a": (8, 2), "w2_b": (2, 6)},
        ),
        (nn.Conv2d(4, 8, (3, 2), groups=2), {}, {"w1": (2, 1), "w2": (4, 2, 3, 2)}),
        (nn.Conv1d(30, 48, 3), {}, {"w1": (6, 5), "w2_a": (8, 2), "w2_b": (2, 18)}),
        (
            nn.Conv1d(30, 48, 3),
            {"use_effective_conv2d": True},
            {"w1": (6, 5), "w2_a": (2, 8), "w2_b": (2, 6), "t2": (2, 2, 3, 1)},
        ),
        (nn.Conv1d(30, 48, 3), {"r": 4}, {"w1": (6, 5), "w2": (8, 6, 3)}),
        (nn.Conv3d(30, 48, 2), {"r": 4}, {"w1": (6, 5), "w2": (8, 6, 2, 2, 2)}),
    ],
    ids=str,
)
def test_shapes(layer, options, expected):
    assert shapes(adapted(layer, **options).model.layer) == expected


@pytest.mark.parametrize(
    "name, layer_cls",
    [
        ("linear", Linear),
        ("transformers Conv1D", Linear),
        ("embedding", Embedding),
        ("conv1d", Conv1d),
        ("conv2d", Conv2d),
        ("conv3d", Conv3d),
    ],
)
def test_layer_classes(name, layer_cls):
    layer = adapted(case(name)[0]).model.layer
    assert type(layer) is layer_cls
    assert repr(layer).startswith(f"lokr.{layer_cls.__name__}(")
    assert layer.supports_lora_conversion()


def test_scaling_is_alpha_by_rank_also_for_full_parts():
    layer = adapted(nn.Linear(4, 4), r=8, alpha=2).model.layer
    assert set(shapes(layer)) == {"w1", "w2"} and layer.scaling == {"default": 0.25}


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(3, 3, 2), nn.LayerNorm(4)], ids=repr)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"layer.*{type(module).__name__}.*linear"):
        adapted(module)


ZEROS = {True: {"lokr_w1", "lokr_w1_a"}, "lycoris": {"lokr_w2", "lokr_w2_b"}, False: set()}


@pytest.mark.parametrize("init_weights", ZEROS)
@pytest.mark.parametrize(
    "options", [{"r": 1, "decompose_both": True, "use_effective_conv2d": True}, {"r": 8}], ids=str
)
def test_start_draws_parts_in_order(options, init_weights):
    base, x = case("conv2d")
    net, expected_output = Net(base), base(x)
    torch.manual_seed(7)
    model = adapted(net, init_weights=init_weights, **options)
    after = torch.rand(1)
    torch.manual_seed(7)
    for name in LoKrLayer.adapter_layer_names:
        if name not in tensors(model.model.layer):
            continue
        found = tensors(model.model.layer)[name]
        expected = torch.zeros_like(found)
        if name not in ZEROS[init_weights]:
            bound = math.prod(found.shape[1:]) ** -0.5
            expected.uniform_(-bound, bound)
        torch.testing.assert_close(found.data, expected, atol=1e-6, rtol=0)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(model(x), expected_output) == (init_weights is not False)


def test_an_adapter_trained_from_lycoris_start_moves():
    model, x = adapted(nn.Linear(12, 8), init_weights="lycoris").train(), torch.randn(3, 12)
    model(x).sum().backward()
    moving = {name for name, tensor in tensors(model.model.layer).items() if tensor.grad.any()}
    assert moving == {"lokr_w2"}


def test_two_adapters_are_independent():
    layer, x = case("linear")
    model = adapted(layer, "a")
    model.peft_config["b"] = LoKrConfig(target_modules=["layer"], r=1, decompose_both=True, init_weights=False)
    model.inject_adapter(model.model, "b")
    layer = model.model.layer
    assert set(shapes(layer, "a")) == {"w1", "w2"}
    assert set(shapes(layer, "b")) == {"w1_a", "w1_b", "w2_a", "w2_b"}
    base = layer.base_layer(x)
    only = {}
    for name in "ab":
        model.set_adapter(name)
        only[name] = model(x)
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(x), only["a"] + only["b"] - base)
    model.delete_adapter("a")
    assert layer._available_adapters == {"b"}
    torch.testing.assert_close(model(x), only["b"])


def test_constructor_takes_device_and_dtype_without_effect():
    layer = Linear(nn.Linear(4, 4), "default", LoKrConfig(), "meta", torch.float64, r=2, alpha=2)
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors(layer).values()} == {("cpu", torch.float32)}


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("rescaled", [False, True])
def test_rank_dropout_takes_out_output_features(rescaled):
    model, x = adapted(nn.Linear(3, 64), rank_dropout=0.5, rank_dropout_scale=rescaled), torch.randn(2, 3)
    base, term = model.model.layer.base_layer(x), model(x) - model.model.layer.base_layer(x)
    model.train()
    torch.manual_seed(3)
    output = model(x)
    torch.manual_seed(3)
    torch.rand(1)  # module dropout draws first, also when it is off
    kept = (torch.rand(64) > 0.5).float()
    torch.testing.assert_close(output, base + term * (kept / kept.mean() if rescaled else kept))


@pytest.mark.parametrize("rescaled", [False, True])
def test_everything_dropped_is_the_base_model(rescaled):
    model, x = adapted(nn.Linear(3, 4), rank_dropout=1.0, rank_dropout_scale=rescaled).train(), torch.randn(2, 3)
    assert torch.equal(model(x), model.model.layer.base_layer(x))


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("autocast, expected", [(True, torch.float32), (False, torch.bfloat16)])
def test_half_precision_base(autocast, expected):
    base = Net(nn.Linear(6, 4)).to(torch.bfloat16)
    config = LoKrConfig(target_modules=["layer"], r=2, init_weights=False)
    layer = get_peft_model(base, config, autocast_adapter_dtype=autocast).base_model.model.layer
    assert {tensor.dtype for tensor in tensors(layer).values()} == {expected}
    assert layer.get_delta_weight("default").dtype == expected
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_scaling_is_exact_in_float64():
    layer = adapted(nn.Linear(4, 4).double(), r=3, alpha=1).model.layer
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    assert torch.equal(layer.get_delta_weight("default"), torch.kron(w1, w2) * (1 / 3))


# ------------------------------------------------------------------------------------------------------- configuration


def test_config_defaults():
    config = LoKrConfig()
    assert (config.peft_type, config.r, config.alpha, config.decompose_factor) == ("LOKR", 8, 8, -1)
    assert config.init_weights is True and config.decompose_both is False


@pytest.mark.parametrize("value", ["gaussian", "Lycoris", ""])
def test_unknown_initialiser_is_refused(value):
    with pytest.raises(ValueError, match=rf"'lycoris'.*{value!r}"):
        LoKrConfig(init_weights=value)


def test_layers_pattern_needs_layers():
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoKrConfig(target_modules=["a"], layers_pattern="h")


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="positive.*r=0.*'default'"):
        adapted(nn.Linear(3, 3), r=0)
