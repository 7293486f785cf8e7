"""LoHa: ΔW = s·(A₁·B₁) ⊙ (A₂·B₂), on every kind of layer; and what it shares with LoKr: scaling, dropout, patterns."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoHaConfig, LoHaModel, get_peft_model
from peft.tuners.loha.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    HadamardProduct,
    HadaWeight,
    HadaWeightCP,
    Linear,
    LoHaLayer,
    make_weight,
    make_weight_cp,
)
from peft.tuners.lycoris_utils import LycorisConfig, LycorisLayer, LycorisTuner


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
    return LoHaModel(net, LoHaConfig(**options), adapter_name).eval()


def tensors(layer, adapter="default"):
    return {entry.saved: entry.tensor for entry in layer.state_entries(adapter)}


def shapes(layer, adapter="default"):
    return {name: tuple(tensor.shape) for name, tensor in tensors(layer, adapter).items()}


# ----------------------------------------------------------------------------------------------------- the mathematics


def worked_example():
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.eye(2)
    model = adapted(base, r=1, alpha=2)
    values = {
        "hada_w1_a": [[1.0], [2.0]],
        "hada_w1_b": [[3.0, -1.0]],
        "hada_w2_a": [[1.0], [0.5]],
        "hada_w2_b": [[2.0, 4.0]],
    }
    for name, value in values.items():
        getattr(model.model.layer, name)["default"].data = torch.tensor(value)
    return model


def test_worked_example():
    model = worked_example()
    assert model.model.layer.get_delta_weight("default").tolist() == [[12.0, -8.0], [12.0, -8.0]]
    assert model(torch.tensor([1.0, 2.0])).tolist() == [-3.0, -2.0]


def test_merged_worked_example():
    model = worked_example()
    model.merge_adapter()
    assert model.model.layer.weight.tolist() == [[13.0, -8.0], [12.0, -7.0]]


def test_effective_form_is_its_sum_over_ranks():
    layer = adapted(nn.Conv2d(4, 6, (3, 2)), use_effective_conv2d=True).model.layer
    expected = torch.ones(6, 4, 3, 2) * layer.scaling["default"]
    for n in (1, 2):
        t, a, b = (getattr(layer, f"hada_{part}")["default"] for part in (f"t{n}", f"w{n}_a", f"w{n}_b"))
        expected = expected * torch.einsum("ijxy,io,jc->ocxy", t, a, b)
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "effective"])
@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_merged_forward(name, r, effective):
    # Small and large ranks go different ways: by the factors, and by ΔW.
    layer, x = case(name)
    weight, base = copy.deepcopy(layer.weight.data), layer(x)
    model = adapted(layer, r=r, use_effective_conv2d=effective)
    output = model(x)
    assert not torch.allclose(output, base, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model.model.layer.weight.data, weight + model.model.layer.get_delta_weight("default"))
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model.model.layer.weight.data, weight)


def test_scaling_is_exact_in_float64():
    layer = adapted(nn.Linear(5, 4).double(), r=3, alpha=1).model.layer
    assert layer.scaling["default"] == 1 / 3
    p1, q1, p2, q2 = layer.factors("default")
    assert torch.equal(layer.get_delta_weight("default"), (p1 @ q1) * (p2 @ q2) * (1 / 3))


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "conv2d grouped"])
def test_small_rank_never_forms_delta_weight_in_training_unless_grouped(name, monkeypatch):
    layer, x = case(name)
    model = adapted(layer, r=1)
    formed = []
    original = LoHaLayer.delta_weight
    monkeypatch.setattr(LoHaLayer, "delta_weight", lambda self, a: formed.append(a) or original(self, a))
    model.train()
    model(x).sum().backward()
    assert bool(formed) == (name == "conv2d grouped")


# ----------------------------------------------------------------------------------------------- shapes, start, layers


@pytest.mark.parametrize(
    "name, effective, expected",
    [
        ("linear", False, {"a": (8, 2), "b": (2, 12)}),
        ("linear", True, {"a": (8, 2), "b": (2, 12)}),
        ("transformers Conv1D", False, {"a": (8, 2), "b": (2, 12)}),
        ("embedding", False, {"a": (8, 2), "b": (2, 20)}),
        ("conv1d", False, {"a": (8, 2), "b": (2, 18)}),
        ("conv1d", True, {"a": (2, 8), "b": (2, 6), "t": (2, 2, 3, 1)}),
        ("conv1d pointwise", True, {"a": (8, 2), "b": (2, 6)}),
        ("conv2d", False, {"a": (8, 2), "b": (2, 36)}),
        ("conv2d", True, {"a": (2, 8), "b": (2, 6), "t": (2, 2, 3, 2)}),
        ("conv2d grouped", False, {"a": (8, 2), "b": (2, 27)}),
        ("conv2d grouped", True, {"a": (2, 8), "b": (2, 3), "t": (2, 2, 3, 3)}),
        ("conv3d", True, {"a": (2, 8), "b": (2, 6), "t": (2, 2, 3, 2, 2)}),
    ],
)
def test_shapes(name, effective, expected):
    layer = adapted(case(name)[0], use_effective_conv2d=effective).model.layer
    wanted = {f"hada_w{n}_{part}": expected[part] for n in (1, 2) for part in "ab"}
    if "t" in expected:
        wanted |= {"hada_t1": expected["t"], "hada_t2": expected["t"]}
    assert shapes(layer) == wanted


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
    assert isinstance(layer, LoHaLayer) and isinstance(layer, LycorisLayer)
    assert repr(layer).startswith(f"loha.{layer_cls.__name__}(")
    assert layer.supports_lora_conversion()
    assert layer._available_adapters == {"default"}


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(3, 3, 2), nn.Bilinear(2, 2, 2), nn.LayerNorm(4)], ids=repr)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"layer.*{type(module).__name__}.*linear"):
        adapted(module)


@pytest.mark.parametrize("effective", [False, True])
def test_start_is_the_base_model(effective):
    layer, x = case("conv2d")
    base = layer(x)
    model = adapted(layer, init_weights=True, use_effective_conv2d=effective)
    assert torch.equal(model(x), base)
    assert {name for name, tensor in tensors(model.model.layer).items() if not tensor.any()} == {"hada_w2_b"}


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("effective", [False, True])
def test_start_draws_factors_in_order(effective, init_weights):
    base = Net(nn.Conv2d(6, 8, 3))
    torch.manual_seed(7)
    layer = adapted(base, use_effective_conv2d=effective, init_weights=init_weights).model.layer
    after = torch.rand(1)
    torch.manual_seed(7)
    for name in LoHaLayer.adapter_layer_names:
        if name not in tensors(layer):
            continue
        found = tensors(layer)[name]
        expected = torch.zeros_like(found)
        if not (init_weights and name == "hada_w2_b"):
            bound = found[0].numel() ** -0.5
            expected.uniform_(-bound, bound)
        torch.testing.assert_close(found.data, expected, atol=1e-6, rtol=0)
    assert torch.equal(after, torch.rand(1))


def test_two_adapters_are_independent():
    layer, x = case("conv2d")
    model = adapted(layer, "a", use_effective_conv2d=True)
    model.peft_config["b"] = LoHaConfig(target_modules=["layer"], r=3, init_weights=False)
    model.inject_adapter(model.model, "b")
    layer = model.model.layer
    assert shapes(layer, "a")["hada_t1"] == (2, 2, 3, 2) and "hada_t1" not in shapes(layer, "b")
    assert layer.r == {"a": 2, "b": 3}
    base = layer.base_layer(x)
    only = {}
    for name in "ab":
        model.set_adapter(name)
        only[name] = model(x)
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(model(x), only["a"] + only["b"] - base)
    model.delete_adapter("a")
    assert layer._available_adapters == {"b"} and list(layer.scaling) == ["b"]
    torch.testing.assert_close(model(x), only["b"])


def test_adapter_made_anew_forgets_its_old_factors():
    model = adapted(nn.Conv2d(6, 8, 3), use_effective_conv2d=True)
    model.model.layer.update_layer("default", 1, 1, config=LoHaConfig(use_effective_conv2d=False))
    assert set(shapes(model.model.layer)) == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def test_wraps_the_layer_of_another_method():
    from peft import LoraConfig

    x = torch.randn(3, 12)
    inner = get_peft_model(Net(nn.Linear(12, 8)), LoraConfig(target_modules=["layer"], init_lora_weights=False))
    inner = inner.eval().base_model.model
    before = inner(x)
    outer = adapted(inner.layer)
    delta = outer.model.layer.get_delta_weight("default")
    torch.testing.assert_close(outer(x), before + x @ delta.T)


# ------------------------------------------------------------------------------------------------ scaling and patterns


def test_scale_api():
    model = adapted(nn.Linear(3, 3), r=2, alpha=5)
    layer = model.model.layer
    assert layer.scaling == {"default": 2.5}
    layer.set_scale("default", 3)
    assert layer.scaling == {"default": 7.5}
    layer.set_scale("default", 3)
    assert layer.scaling == {"default": 7.5}
    layer.set_scale("unknown", 9)
    layer.scale_layer(1)
    layer.scale_layer(2)
    assert layer.scaling == {"default": 15.0}
    layer.unscale_layer(4)
    assert layer.scaling == {"default": 3.75}
    layer.unscale_layer()
    assert layer.scaling == {"default": 2.5}


def test_scale_scales_the_term():
    model, x = adapted(nn.Linear(3, 3)), torch.randn(2, 3)
    base, term = model.model.layer.base_layer(x), model(x) - model.model.layer.base_layer(x)
    model.model.layer.set_scale("default", 0.5)
    torch.testing.assert_close(model(x), base + term / 2)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.block(x))


def test_patterns_give_rank_and_alpha_by_module():
    config = LoHaConfig(
        target_modules=["0", "1", "last"],
        r=2,
        alpha=4,
        rank_pattern={"^last": 1, "block.1": 3},
        alpha_pattern={"1": 6},
    )
    model = LoHaModel(Two(), config, "default").model
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in loha_layers(model)}
    assert found == {"block.0": (2, 2.0), "block.1": (3, 2.0), "last": (1, 4.0)}


def loha_layers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoHaLayer)]


def test_no_pattern_is_an_empty_one():
    config = LoHaConfig(target_modules=["last"], rank_pattern=None, alpha_pattern=None)
    assert LoHaModel(Two(), config, "default").model.last.r == {"default": 8}


# ------------------------------------------------------------------------------------------------------------- dropout


def test_rank_dropout_takes_out_output_features_and_scales_up_the_rest():
    model, x = adapted(nn.Linear(3, 64), rank_dropout=0.5), torch.randn(2, 3)
    layer = model.model.layer
    base, term = layer.base_layer(x), model(x) - layer.base_layer(x)
    model.train()
    torch.manual_seed(3)
    output = model(x)
    torch.manual_seed(3)
    torch.rand(1)  # module dropout draws first, also when it is off
    kept = (torch.rand(64) > 0.5).float()
    torch.testing.assert_close(output, base + term * kept / kept.mean())


@pytest.mark.parametrize("name", ["conv2d", "transformers Conv1D"])
def test_rank_dropout_follows_the_output_channels(name):
    layer, x = case(name)
    model = adapted(layer, rank_dropout=0.5).train()
    torch.manual_seed(0)
    output = model(x) - layer(x)
    torch.manual_seed(0)
    torch.rand(1)
    delta = model.model.layer.get_delta_weight("default", apply_rank_dropout=True)
    torch.testing.assert_close(output, model.model.layer.kind.apply(layer, x, delta), atol=1e-5, rtol=1e-4)
    model.eval()
    whole = model.model.layer.get_delta_weight("default")
    assert torch.equal(model.model.layer.get_delta_weight("default", apply_rank_dropout=True), whole)


def test_everything_dropped_is_the_base_model():
    model, x = adapted(nn.Linear(3, 4), rank_dropout=1.0).train(), torch.randn(2, 3)
    assert torch.equal(model(x), model.model.layer.base_layer(x))


def test_module_dropout_leaves_the_adapter_out_as_a_whole():
    model, x = adapted(nn.Linear(3, 4), module_dropout=0.5), torch.randn(2, 3)
    base, full = model.model.layer.base_layer(x), model(x)
    model.train()
    for seed in range(6):
        torch.manual_seed(seed)
        contributes = torch.rand(1) > 0.5
        torch.manual_seed(seed)
        assert torch.equal(model(x), full if contributes else base)


def test_one_number_is_drawn_in_training_whatever_the_setting():
    model, x = adapted(nn.Linear(3, 4)).train(), torch.randn(2, 3)
    torch.manual_seed(0)
    model(x)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(1)
    assert torch.equal(after, torch.rand(1))


def test_nothing_is_dropped_or_drawn_in_evaluation():
    model, x = adapted(nn.Linear(3, 4), rank_dropout=0.9, module_dropout=0.9), torch.randn(2, 3)
    state = torch.get_rng_state()
    first = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    model.merge_adapter()
    torch.testing.assert_close(model(x), first)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_the_function_that_forms_the_weight_has_its_gradient():
    factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 2), (2, 5), (4, 2), (2, 5))]
    assert torch.autograd.gradcheck(lambda *f: HadaWeight.apply(*f, 1.5), factors)
    w1a, w1b, w2a, w2b = factors
    assert torch.equal(make_weight(w1a, w1b, w2a, w2b, 1.5), (w1a @ w1b) * (w2a @ w2b) * 1.5)


@pytest.mark.parametrize("window", [(3, 2), (3, 1)])
def test_the_function_that_forms_the_effective_weight_has_its_gradient(window):
    sizes = [(2, 2, *window), (2, 4), (2, 5)] * 2
    factors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *f: HadaWeightCP.apply(*f, 1.5), factors)
    assert make_weight_cp(*factors, torch.tensor(1.5)).shape == (4, 5, *window)


def test_a_scale_gets_no_gradient():
    scale = torch.tensor(2.0, requires_grad=True)
    factors = [torch.randn(s, requires_grad=True) for s in ((4, 2), (2, 5), (4, 2), (2, 5))]
    make_weight(*factors, scale).sum().backward()
    assert scale.grad is None and all(factor.grad is not None for factor in factors)


@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("effective", [False, True])
def test_training_has_the_gradient_of_the_formula(effective, r):
    layer, x = case("conv2d")
    model = adapted(layer, r=r, use_effective_conv2d=effective).train()
    model(x).pow(2).sum().backward()
    found = {name: tensor.grad.clone() for name, tensor in tensors(model.model.layer).items()}
    model.zero_grad()
    delta = model.model.layer.get_delta_weight("default")
    layer._conv_forward(x, layer.weight + delta, layer.bias).pow(2).sum().backward()
    for name, tensor in tensors(model.model.layer).items():
        torch.testing.assert_close(found[name], tensor.grad, atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("autocast, expected", [(True, torch.float32), (False, torch.bfloat16)])
def test_half_precision_base(autocast, expected):
    base = Net(nn.Linear(6, 5)).to(torch.bfloat16)
    config = LoHaConfig(target_modules=["layer"], r=2, init_weights=False)
    layer = get_peft_model(base, config, autocast_adapter_dtype=autocast).base_model.model.layer
    assert {tensor.dtype for tensor in tensors(layer).values()} == {expected}
    assert layer.get_delta_weight("default").dtype == expected
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.merge()
    assert layer.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- configuration


def test_config_defaults():
    config = LoHaConfig()
    assert isinstance(config, LycorisConfig) and issubclass(LoHaModel, LycorisTuner)
    assert (config.peft_type, config.r, config.alpha, config.rank_pattern) == ("LOHA", 8, 8, {})


def test_lists_become_sets():
    config = LoHaConfig(target_modules=["a", "b"], exclude_modules=["c"])
    assert config.target_modules == {"a", "b"} and config.exclude_modules == {"c"}


def test_layers_pattern_needs_layers():
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoHaConfig(target_modules=["a"], layers_pattern="h")
    LoHaConfig(target_modules=".*a", layers_to_transform=[0])


@pytest.mark.parametrize("r", [0, -1])
def test_rank_must_be_positive(r):
    net = Net(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"positive.*r={r}.*'default'"):
        LoHaModel(net, LoHaConfig(target_modules=["layer"], r=r), "default")
    assert type(net.layer) is nn.Linear


def test_safe_merge_refuses_what_is_not_finite():
    model = adapted(nn.Linear(3, 3))
    before = model.model.layer.weight.data.clone()
    model.model.layer.hada_w1_a["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'default'.*layer.*'weight'"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.model.layer.weight.data, before) and not model.model.layer.merged


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 10), lambda: nn.Conv2d(4, 20, 3, padding=1)])
def test_a_product_that_is_formed_is_not_kept_for_the_backward_pass(make):
    layer = adapted(make(), r=6, init_weights=False).model.layer
    formed = layer.get_base_layer().weight.numel()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer.delta_weight("default")
    assert max(tensor.numel() for tensor in kept) < formed


def test_gradients_of_a_product_that_is_formed_are_those_of_the_formula_and_have_gradients_themselves():
    torch.manual_seed(0)
    layer = adapted(nn.Linear(5, 4).double(), r=3, alpha=2, init_weights=False).model.layer
    factors = [
        container["default"] for container in (layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b)
    ]
    weights = torch.randn(4, 5, dtype=torch.float64)
    w1a, w1b, w2a, w2b = factors
    formula = (w1a @ w1b) * (w2a @ w2b) * (2 / 3)
    expected = torch.autograd.grad((formula * weights).sum(), factors)
    found = torch.autograd.grad((layer.delta_weight("default") * weights).sum(), factors)
    assert all(map(torch.equal, found, expected))
    assert torch.autograd.gradgradcheck(lambda *given: HadamardProduct.apply(*given, 1.5), factors)
