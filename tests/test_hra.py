"""HRA: W' = W·H with H a product of Householder reflections, on linear layers and convolutions."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import HRAConfig, HRAModel, LoraConfig, get_peft_model
from peft.tuners.hra.layer import HRAConv1d, HRAConv2d, HRAConv3d, HRALayer, HRALinear
from peft.tuners.hra.reflections import orthogonal_reflection, product_of_reflections, reflect


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
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 2, 12)),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 5)),
    "conv2d oblong": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 6, 5, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2, padding=2, padding_mode="reflect"), (2, 6, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, padding="same", bias=False), (2, 6, 5, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(6, 8, 1), (6, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 8, (3, 2, 2)), (2, 4, 5, 4, 4)),
}


def case(name):
    build, shape = LAYERS[name]
    return build(), torch.randn(shape)


def config(**options):
    return HRAConfig(**{"target_modules": ["layer"], "r": 4, "init_weights": False, **options})


def adapted(layer, adapter_name="default", **options):
    return HRAModel(Net(layer), config(**options), adapter_name).eval()


def with_two(layer):
    model = adapted(layer, "a")
    model.peft_config["b"] = config(r=3, apply_GS=True)
    model.inject_adapter(model.model, "b")
    model.set_adapter(["a", "b"])
    return model


def chain(u):
    """The reflections multiplied one by one, from left to right."""
    H = torch.eye(len(u), dtype=u.dtype)
    for direction in (u / u.norm(dim=0)).T:
        H = H @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(direction, direction))
    return H


# ----------------------------------------------------------------------------------------------------- the mathematics


def worked_example(**options):
    base = nn.Linear(2, 1, bias=False)
    base.weight.data = torch.tensor([[1.0, 2.0]])
    model = adapted(base, r=2, **options)
    model.model.layer.hra_u["default"].data = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    return model


def test_worked_example():
    model = worked_example()
    H = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(model.model.layer.get_delta_weight("default"), H)
    torch.testing.assert_close(model.model.layer.get_delta_weight("default", reverse=True), H.T)
    torch.testing.assert_close(model(torch.eye(2)), torch.tensor([[-2.0], [1.0]]))
    model.merge_adapter()
    torch.testing.assert_close(model.model.layer.weight.data, torch.tensor([[-2.0, 1.0]]))


def test_worked_example_with_orthogonal_directions():
    model = worked_example(apply_GS=True)
    for reverse in (False, True):
        torch.testing.assert_close(model.model.layer.get_delta_weight("default", reverse), -torch.eye(2))
    torch.testing.assert_close(model(torch.eye(2)), torch.tensor([[-1.0], [-2.0]]))


@pytest.mark.parametrize("d, r", [(5, 1), (5, 4), (5, 8), (40, 16)])
def test_compact_form_is_the_product(d, r):
    u = torch.randn(d, r, dtype=torch.float64)
    U, S = product_of_reflections(u)
    H = torch.eye(d, dtype=u.dtype) - U @ S @ U.T
    torch.testing.assert_close(H, chain(u))
    torch.testing.assert_close(H @ H.T, torch.eye(d, dtype=u.dtype))
    x = torch.randn(3, d, dtype=u.dtype)
    torch.testing.assert_close(reflect(x, U, S), x @ H)
    torch.testing.assert_close(reflect(x, U, S.mT), x @ H.T)


@pytest.mark.parametrize("form", [product_of_reflections, orthogonal_reflection])
def test_gradients_of_the_compact_forms(form):
    def H(u):
        U, S = form(u)
        return U @ S @ U.T

    assert torch.autograd.gradcheck(H, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))


def test_gram_schmidt_goes_through_the_directions_in_order():
    u = torch.randn(6, 3, dtype=torch.float64)
    Q, S = orthogonal_reflection(u)
    torch.testing.assert_close(Q.T @ Q, torch.eye(3, dtype=u.dtype))
    torch.testing.assert_close(S, 2 * torch.eye(3, dtype=u.dtype))
    R = Q.T @ u  # u = Q·R with R upper triangular and positive on its diagonal
    torch.testing.assert_close(R, R.triu())
    assert (R.diagonal() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 300])
def test_dependent_directions_reflect_nothing(d, dtype):
    first, second = torch.randn(d, 1, dtype=dtype), torch.randn(d, 1, dtype=dtype)
    u = torch.cat([first, first, second, first + second], dim=1).requires_grad_()
    Q, _ = orthogonal_reflection(u)
    assert (Q != 0).any(dim=0).tolist() == [True, False, True, False]
    (Q * torch.randn_like(Q)).sum().backward()
    assert torch.isfinite(u.grad).all()


def test_more_orthogonal_directions_than_dimensions():
    layer, x = nn.Linear(2, 3), torch.randn(4, 2)
    model = adapted(layer, r=5, apply_GS=True)
    torch.testing.assert_close(model(x), layer(-x))


def test_no_direction_makes_nan():
    model = adapted(nn.Linear(3, 2))
    model.model.layer.hra_u["default"].data[:, 1] = 0
    assert model(torch.ones(3)).isnan().all()


@pytest.mark.parametrize("name", LAYERS)
def test_several_adapters_multiply_in_the_order_of_activation(name):
    layer, x = case(name)
    model = with_two(layer)
    H = {a: model.model.layer.get_delta_weight(a) for a in "ab"}
    flat = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().flatten(1)
    for names in ("ab", "ba"):
        product = flat @ H[names[0]] @ H[names[1]]
        expected = copy.deepcopy(layer)
        expected.weight.data = product.T if isinstance(layer, Conv1D) else product.view_as(layer.weight)
        model.set_adapter(list(names))
        torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"apply_GS": True}, {"r": 3}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_merged_forward(name, options):
    layer, x = case(name)
    weight, base = copy.deepcopy(layer.weight.data), layer(x)
    model = adapted(layer, **options)
    output = model(x)
    assert not torch.allclose(output, base, atol=1e-2)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(layer.weight.data, weight)


@pytest.mark.parametrize("names", [[["a", "b"]], [["a"], ["b"]]], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Merging")
def test_two_adapters_merge_into_what_they_compute(name, names):
    layer, x = case(name)
    weight = copy.deepcopy(layer.weight.data)
    model = with_two(layer)
    output = model(x)
    for group in names:
        model.merge_adapter(group)
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(layer.weight.data, weight)


def test_merge_of_nan_is_refused_by_name():
    model = adapted(nn.Linear(3, 2))
    model.model.layer.hra_u["default"].data.zero_()
    before = copy.deepcopy(model.model.layer.weight.data)
    with pytest.raises(ValueError, match="'default' into layer gives NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.model.layer.weight.data, before)


def test_linear_base_layer_of_any_sort_is_called_with_the_reflected_input(monkeypatch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(12, 8), torch.randn(2, 12)
    model = adapted(layer)
    H = model.model.layer.get_delta_weight("default")
    monkeypatch.setattr(HRALayer, "get_delta_weight", None)  # H is not formed
    torch.testing.assert_close(model(x), layer(x @ H.T), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_wraps_the_layer_of_another_method(name):
    layer, x = case(name)
    inner = get_peft_model(Net(layer), LoraConfig(target_modules=["layer"], init_lora_weights=False, r=2))
    model = adapted(inner.eval().base_model.model.layer)
    output = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_mixed_batch_reflects_each_row_by_its_adapter(name):
    layer, x = case(name)
    x = torch.cat([x, x])[:3]
    model = with_two(layer)
    rows = []
    for i, adapter in enumerate("ab"):
        model.set_adapter(adapter)
        rows.append(model(x)[i])
    with model.call_inputs(["a", "b", "__base__"]):
        torch.testing.assert_close(model(x), torch.stack([*rows, layer(x)[2]]), atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- shapes, start, layers


@pytest.mark.parametrize(
    "name, d, layer_cls",
    [
        ("linear", 12, HRALinear),
        ("transformers Conv1D", 12, HRALinear),
        ("conv1d", 18, HRAConv1d),
        ("conv2d", 54, HRAConv2d),
        ("conv2d oblong", 36, HRAConv2d),
        ("conv2d grouped", 36, HRAConv2d),
        ("conv3d", 48, HRAConv3d),
    ],
)
def test_shapes_and_classes(name, d, layer_cls):
    layer = adapted(case(name)[0]).model.layer
    assert {entry.saved: tuple(entry.tensor.shape) for entry in layer.state_entries("default")} == {"hra_u": (d, 4)}
    assert layer.get_delta_weight("default").shape == (d, d)
    assert type(layer) is layer_cls and isinstance(layer, HRALayer)
    assert repr(layer).startswith(f"hra.{layer_cls.__name__}(")
    assert (layer.hra_r, layer.hra_apply_GS) == ({"default": 4}, {"default": False})
    assert not layer.supports_lora_conversion()


@pytest.mark.parametrize("module", [nn.Embedding(3, 3), nn.ConvTranspose2d(3, 3, 2)], ids=repr)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"layer.*{type(module).__name__}.*linear"):
        adapted(module)


@pytest.mark.parametrize("name", LAYERS)
def test_even_number_starts_as_the_base_model(name):
    layer, x = case(name)
    base = layer(x)
    torch.testing.assert_close(adapted(layer, init_weights=True)(x), base, atol=1e-5, rtol=1e-4)


def test_start_is_drawn_in_pairs():
    net = Net(nn.Linear(12, 8))
    torch.manual_seed(3)
    u = HRAModel(net, config(init_weights=True), "default").model.layer.hra_u["default"]
    torch.manual_seed(3)
    half = torch.empty(12, 2).uniform_(-(2**-0.5), 2**-0.5)
    torch.testing.assert_close(u.data, half[:, [0, 0, 1, 1]])


@pytest.mark.parametrize("r, init_weights", [(4, False), (3, True), (3, False)])
def test_random_start(r, init_weights):
    net = Net(nn.Linear(12, 8))
    torch.manual_seed(3)
    if init_weights:
        with pytest.warns(UserWarning, match="r=3 is odd.*'default' cannot start as the identity"):
            u = HRAModel(net, config(r=r, init_weights=True), "default").model.layer.hra_u["default"]
    else:
        u = HRAModel(net, config(r=r), "default").model.layer.hra_u["default"]
    torch.manual_seed(3)
    torch.testing.assert_close(u.data, torch.empty(12, r).uniform_(-(r**-0.5), r**-0.5))


def test_start_with_orthogonal_directions_is_finite_and_trains():
    with pytest.warns(UserWarning, match="layer: with apply_GS=True.*'default' does not start as the identity"):
        model = adapted(nn.Linear(12, 8), init_weights=True, apply_GS=True).train()
    u, x = model.model.layer.hra_u["default"], torch.randn(3, 12)
    for step in range(2):
        (model(x) ** 2).sum().backward()
        assert torch.isfinite(u.grad).all() and (u.grad != 0).any(dim=0).sum() == (2, 4)[step]
        u.data -= 0.1 * u.grad
        u.grad = None
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("r", [0, -1])
def test_number_of_reflections_is_positive(r):
    with pytest.raises(ValueError, match=f"layer.*'default'.*positive.*r={r}"):
        adapted(nn.Linear(3, 3), r=r)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": "a.*", "layers_to_transform": [1]}, "layers_to_transform=.1. needs target_modules"),
        ({"target_modules": "a.*", "layers_pattern": "h"}, "layers_pattern='h' needs target_modules"),
        ({"target_modules": ["a"], "layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        HRAConfig(**options)


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("apply_GS", [False, True])
def test_half_precision_base(name, apply_GS):
    layer, x = case(name)
    model, x = adapted(layer.bfloat16(), apply_GS=apply_GS), x.bfloat16()
    layer = model.model.layer
    assert layer.hra_u["default"].dtype == torch.bfloat16
    assert layer.get_delta_weight("default").dtype == torch.bfloat16
    assert layer.compact_form("default")[0].dtype == torch.float32
    low = model(x)
    layer.hra_u["default"] = nn.Parameter(layer.hra_u["default"].data.float())
    assert low.dtype == model(x).dtype == torch.bfloat16
    torch.testing.assert_close(low, model(x))
    model.merge_adapter()
    assert layer.weight.dtype == torch.bfloat16
