"""OFT: W' = W·Tᵀ with a block-diagonal rotation T of the input, on every kind of layer."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, OFTConfig, OFTModel, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.oft.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    MultiplicativeDropoutLayer,
    OFTLayer,
    OFTRotationModule,
)
from peft.tuners.oft.rotation import cayley, cayley_neumann, rotate, skew


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
    "linear on four axes": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 2, 12)),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "embedding": (lambda: nn.Embedding(20, 8, padding_idx=1), None),
    "conv1d": (lambda: nn.Conv1d(6, 8, 4, padding=1, padding_mode="circular"), (2, 6, 9)),
    "conv1d pointwise": (lambda: nn.Conv1d(8, 6, 1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 5)),
    "conv2d pointwise": (lambda: nn.Conv2d(8, 6, 1, stride=2, padding=1, padding_mode="reflect"), (2, 8, 5, 5)),
    "conv2d pointwise grouped": (lambda: nn.Conv2d(8, 6, 1, groups=2), (2, 8, 5, 5)),
    "conv2d oblong": (lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2)), (2, 6, 5, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2, padding=2, padding_mode="reflect"), (2, 6, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, padding="same", bias=False), (2, 6, 5, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(6, 8, 3), (6, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 8, (3, 2, 2)), (2, 4, 5, 4, 4)),
    "conv3d pointwise": (lambda: nn.Conv3d(4, 8, 1), (2, 4, 3, 2, 2)),
}


def case(name):
    build, shape = LAYERS[name]
    x = torch.randint(0, 20, (2, 5)) if shape is None else torch.randn(shape)
    return build(), x


def config(**options):
    options = {"target_modules": ["layer"], "oft_block_size": 4, "init_weights": False, **options}
    if options.get("r"):
        options["oft_block_size"] = 0
    return OFTConfig(**options)


def adapted(layer, adapter_name="default", **options):
    return OFTModel(Net(layer), config(**options), adapter_name).eval()


def with_two(layer, **options):
    model = adapted(layer, "a", **options)
    model.peft_config["b"] = config(**{**options, "oft_block_size": 2})
    model.inject_adapter(model.model, "b")
    model.set_adapter(["a", "b"])
    return model


def rotation(layer, adapter="default"):
    return layer.rotations[adapter]


def shapes(layer, adapter="default"):
    return {entry.saved: tuple(entry.tensor.shape) for entry in layer.state_entries(adapter)}


# ----------------------------------------------------------------------------------------------------- the mathematics


def worked_example(**options):
    base = nn.Linear(2, 1)
    base.weight.data, base.bias.data = torch.tensor([[1.0, 3.0]]), torch.tensor([0.5])
    model = adapted(base, oft_block_size=2, **options)
    rotation(model.model.layer).weight.data = torch.tensor([[0.5]])
    return model


@pytest.mark.parametrize(
    "series, T, output, merged",
    [
        (True, [[0.5625, 0.75], [-0.75, 0.5625]], 5.1875, [[2.8125, 0.9375]]),
        (False, [[0.6, -0.8], [0.8, 0.6]], 3.9, [[-1.8, 2.6]]),
    ],
    ids=["series", "exact"],
)
def test_worked_example(series, T, output, merged):
    model = worked_example(use_cayley_neumann=series)
    torch.testing.assert_close(model.model.layer.get_delta_weight("default"), torch.tensor(T))
    torch.testing.assert_close(model(torch.tensor([1.0, 2.0])), torch.tensor([output]))
    model.merge_adapter()
    torch.testing.assert_close(model.model.layer.weight.data, torch.tensor(merged))
    torch.testing.assert_close(model(torch.tensor([1.0, 2.0])), torch.tensor([output]))


def skew_of(w, size):
    return skew(torch.tensor([w]), size, *torch.triu_indices(size, size, 1))


def test_skew_matrix_is_filled_row_by_row():
    found = skew_of([1.0, 2, 3, 4, 5, 6], 4)
    assert found.tolist() == [[[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]]


def test_series_of_a_block_of_three():
    found = cayley_neumann(skew_of([0.3, -0.2, 0.1], 3), 5)[0, :2]
    expected = torch.tensor([[0.7582, 0.5532, -0.2882], [-0.4788, 0.8140, 0.2836]])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "terms, coefficients",
    [
        (0, [1]),
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 2, 1]),
        (4, [1, 2, 2, 1]),
        (5, [1, 2, 2, 2, 1]),
        (7, [1, 2, 2, 2, 2, 2, 1]),
    ],
)
def test_terms_of_the_series(terms, coefficients):
    Q = skew_of([0.3, -0.2, 0.1], 3)
    expected = sum(c * torch.linalg.matrix_power(Q, k) for k, c in enumerate(coefficients))
    torch.testing.assert_close(cayley_neumann(Q, terms), expected)


def test_series_approximates_the_transpose_of_the_exact_rotation():
    Q = skew_of([0.03, -0.02, 0.01], 3)
    exact = cayley(Q)
    torch.testing.assert_close(exact @ exact.mT, torch.eye(3)[None])
    torch.testing.assert_close(cayley_neumann(Q, 8), exact.mT, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_rotating_is_multiplying_by_the_block_diagonal_matrix(shared):
    R, x = torch.randn(1 if shared else 3, 2, 2), torch.randn(4, 5, 6)
    torch.testing.assert_close(rotate(x, R), x @ torch.block_diag(*R.expand(3, 2, 2)))


def test_several_adapters_rotate_in_the_order_of_activation():
    layer, x = case("linear")
    model = with_two(layer)
    T_a, T_b = (model.model.layer.get_delta_weight(name) for name in "ab")
    assert not torch.allclose(T_a @ T_b, T_b @ T_a, atol=1e-3)
    torch.testing.assert_close(model(x), layer(x @ T_a @ T_b))
    model.set_adapter(["b", "a"])
    torch.testing.assert_close(model(x), layer(x @ T_b @ T_a))


def test_embedding_rotates_the_rows_of_the_table():
    layer, ids = case("embedding")
    model = with_two(layer)
    T_a, T_b = (model.model.layer.get_delta_weight(name) for name in "ab")
    torch.testing.assert_close(model(ids), (layer.weight @ T_a @ T_b)[ids])


def test_convolution_rotates_its_weight():
    layer, x = case("conv2d dilated")
    model = adapted(layer)
    expected = copy.deepcopy(layer)
    expected.weight.data = (layer.weight.flatten(1) @ model.model.layer.get_delta_weight("default").T).view_as(
        layer.weight
    )
    torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-4)


def test_groups_have_parts_of_the_rotation():
    layer, x = case("conv2d grouped")
    model = adapted(layer)
    T = model.model.layer.get_delta_weight("default")
    assert T.shape == (72, 72) and not T[:36, 36:].any()
    outputs = []
    for group in range(2):
        single = nn.Conv2d(4, 3, 3)
        rows, part = slice(3 * group, 3 * group + 3), slice(36 * group, 36 * group + 36)
        single.weight.data = (layer.weight[rows].flatten(1) @ T[part, part].T).view(3, 4, 3, 3)
        single.bias.data = layer.bias[rows]
        outputs.append(single(x[:, 4 * group : 4 * group + 4]))
    torch.testing.assert_close(model(x), torch.cat(outputs, dim=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"block_share": True}, {"r": 2}, {"use_cayley_neumann": False}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_merged_forward(name, options):
    layer, x = case(name)
    weight, base = copy.deepcopy(layer.weight.data), layer(x)
    model = adapted(layer, **options)
    output = model(x)
    assert not torch.allclose(output, base, atol=1e-3)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(layer.weight.data, weight)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "one on top of the other"])
@pytest.mark.parametrize("name", LAYERS)
def test_two_adapters_merge_into_what_they_compute(name, apart):
    layer, x = case(name)
    weight = copy.deepcopy(layer.weight.data)
    model = with_two(layer)
    output = model(x)
    with pytest.warns(UserWarning, match="on top of") if apart else nullcontext():
        for names in (["a"], ["b"]) if apart else (["a", "b"],):
            model.merge_adapter(names)
    assert model.model.layer.merged_adapters == ["a", "b"]
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(layer.weight.data, weight)


def test_failed_merge_on_top_keeps_what_is_merged():
    layer, x = case("linear")
    model = with_two(layer)
    rotation(model.model.layer, "b").weight.data.fill_(float("inf"))
    model.merge_adapter(["a"])
    before = copy.deepcopy(layer.weight.data)
    with pytest.raises(ValueError, match="'b'.*NaN or infinite"):
        model.model.layer.merge(safe_merge=True)
    assert torch.equal(layer.weight.data, before)
    assert model.model.layer.merged_adapters == ["a"]


def test_base_layer_of_any_sort_is_called_with_the_rotated_input():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(12, 8), torch.randn(2, 12)
    model = adapted(layer)
    torch.testing.assert_close(model(x), layer(x @ model.model.layer.get_delta_weight("default")))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d pointwise", "embedding"])
def test_wraps_the_layer_of_another_method(name):
    layer, x = case(name)
    inner = get_peft_model(Net(layer), LoraConfig(target_modules=["layer"], init_lora_weights=False, r=2))
    model = adapted(inner.eval().base_model.model.layer)
    output = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), output, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- shapes, start, layers


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("linear", {}, (3, 6)),
        ("linear", {"block_share": True}, (1, 6)),
        ("linear", {"r": 2}, (2, 15)),
        ("transformers Conv1D", {}, (3, 6)),
        ("embedding", {}, (2, 6)),
        ("conv1d", {}, (6, 6)),
        ("conv2d", {"oft_block_size": 6}, (9, 15)),
        ("conv2d oblong", {}, (9, 6)),
        ("conv2d grouped", {}, (18, 6)),
        ("conv2d grouped", {"r": 4}, (4, 153)),
        ("conv3d", {}, (12, 6)),
    ],
)
def test_shapes(name, options, expected):
    layer = adapted(case(name)[0], **options).model.layer
    assert shapes(layer) == {f"{'oft_embedding_R' if name == 'embedding' else 'oft_R'}.weight": expected}
    blocks = layer.r["default"] * layer.oft_block_size["default"]
    assert layer.get_delta_weight("default").shape == (blocks, blocks)


@pytest.mark.parametrize(
    "options, blocks, size, warned",
    [
        ({"oft_block_size": 3}, 2, 3, False),
        ({"oft_block_size": 4}, 2, 3, True),
        ({"oft_block_size": 5}, 1, 6, True),
        ({"oft_block_size": 32}, 1, 6, True),
        ({"r": 2}, 2, 3, False),
        ({"r": 4}, 3, 2, True),
        ({"r": 8}, 6, 1, True),
    ],
)
def test_blocks_that_do_not_fit_are_adjusted(options, blocks, size, warned):
    with pytest.warns(UserWarning, match=f"layer: .*does not divide 6.*{blocks} blocks") if warned else nullcontext():
        model = adapted(nn.Linear(6, 2), **options)
    layer = model.model.layer
    assert (layer.r, layer.oft_block_size) == ({"default": blocks}, {"default": size})
    assert shapes(layer) == {"oft_R.weight": (blocks, size * (size - 1) // 2)}
    asked = {"r": 0, "oft_block_size": 0, **options}
    assert {name: getattr(model.peft_config["default"], name) for name in asked} == asked
    assert model(torch.ones(6)).shape == (2,)


def test_blocks_stay_within_groups():
    with pytest.warns(UserWarning, match="oft_block_size=8 does not divide 36, its size in each of 2 groups"):
        layer = adapted(nn.Conv2d(8, 6, 3, groups=2), oft_block_size=8).model.layer
    assert (layer.r, layer.oft_block_size) == ({"default": 8}, {"default": 9})
    with pytest.warns(UserWarning, match="r=3 does not divide 36, its size in each of 2 groups"):
        layer = adapted(nn.Conv2d(8, 6, 3, groups=2), r=3).model.layer
    assert (layer.r, layer.oft_block_size) == ({"default": 2}, {"default": 36})


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
    assert type(layer) is layer_cls and isinstance(layer, OFTLayer)
    assert repr(layer).startswith(f"oft.{layer_cls.__name__}(")
    assert not layer.supports_lora_conversion()


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(3, 3, 2), nn.MultiheadAttention(4, 2)], ids=repr)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=f"layer.*{type(module).__name__}.*linear"):
        adapted(module)


@pytest.mark.parametrize("name", LAYERS)
def test_start_is_the_base_model(name):
    layer, x = case(name)
    base = layer(x)
    state = torch.get_rng_state()
    model = adapted(layer, init_weights=True)
    assert not rotation(model.model.layer).weight.any()
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=1e-6)
    net = Net(layer)
    torch.set_rng_state(state)
    OFTModel(net, config(init_weights=True), "default")
    assert torch.equal(torch.get_rng_state(), state)


def test_random_start_is_one_draw_for_each_layer():
    base = nn.Linear(12, 8)
    net = Net(base)
    torch.manual_seed(3)
    found = rotation(OFTModel(net, config(), "default").model.layer).weight
    torch.manual_seed(3)
    assert torch.equal(found.data, torch.empty(3, 6).normal_(0, 0.1))


def test_index_buffers_are_not_saved_and_never_on_meta():
    layer = OFTModel(Net(nn.Linear(12, 8)), config(), "default", low_cpu_mem_usage=True).model.layer
    module = rotation(layer)
    assert module.weight.is_meta and not module.rows.is_meta
    assert (module.rows.tolist(), module.cols.tolist()) == ([0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3])
    assert list(module.state_dict()) == ["weight"]


# ---------------------------------------------------------------------------------------------------- COFT and dropout


def test_coft_puts_the_parameters_back_within_the_radius():
    module = OFTRotationModule(2, 1, 2, 4, coft=True, eps=0.2)
    module.weight.data = torch.tensor([[0.5], [0.001]])
    module(torch.ones(4))
    torch.testing.assert_close(module.weight.data, torch.tensor([[0.1], [0.001]]))
    kept = module.weight.data.clone()
    module.get_weight()
    torch.testing.assert_close(module.weight.data, kept)


def test_coft_trains():
    model = adapted(nn.Linear(4, 3), coft=True, eps=0.01).train()
    weight = rotation(model.model.layer).weight
    (model(torch.randn(2, 4)) + model(torch.randn(2, 4))).sum().backward()
    assert weight.grad.any() and weight.norm() * 2**0.5 <= 0.01 + 1e-6


def test_dropout_replaces_rotations_by_identities():
    dropout, R = MultiplicativeDropoutLayer(0.5), torch.randn(64, 3, 3)
    found = dropout(R)
    dropped = (found == torch.eye(3)).all(dim=(1, 2))
    assert 16 < dropped.sum() < 48
    assert torch.equal(found[~dropped], R[~dropped])
    assert torch.equal(dropout.eval()(R), R)
    assert torch.equal(MultiplicativeDropoutLayer(0.0)(R), R)


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_acts_in_training_only(shared):
    layer, x = nn.Linear(64, 8), torch.randn(2, 64)
    model = adapted(layer, module_dropout=0.5, oft_block_size=2, block_share=shared)
    output = model(x)
    model.train()
    assert not torch.allclose(model(x), output)
    model.merge_adapter()
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    rotation(model.model.layer).weight.data.zero_()
    torch.testing.assert_close(model(x), layer(x))


# ---------------------------------------------------------------------------------------- adapters of earlier versions


OLD = {"peft_version": "0.21.2"}


def scrambled(layer, x, T):
    """The forward of versions before 0.22, step by step."""
    B, C, H, W = x.shape
    k = layer.kernel_size[0]
    Z = F.unfold(x, k).transpose(1, 2) @ T
    L = Z.shape[1]
    Z = Z.reshape(B, L, C, k, k).permute(0, 2, 1, 3, 4).reshape(B, C * k * k, L)
    return layer(F.fold(Z, (H, W), k))


def test_old_convolutions_compute_what_they_were_trained_with():
    layer, x = case("conv2d")
    model = adapted(layer, **OLD)
    T = model.model.layer.get_delta_weight("default")
    torch.testing.assert_close(model(x), scrambled(layer, x, T), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(x[0]), scrambled(layer, x, T)[0], atol=1e-4, rtol=1e-4)
    weight = copy.deepcopy(layer.weight.data)
    with pytest.warns(UserWarning, match="layer.*default.*before 0.22.*another output"):
        model.merge_adapter()
    torch.testing.assert_close(layer.weight.data.flatten(1), weight.flatten(1) @ T.T)


def test_old_and_new_adapters_live_on_one_convolution():
    layer, x = case("conv2d")
    model = adapted(layer, "old", **OLD)
    model.peft_config["new"] = config()
    model.inject_adapter(model.model, "new")
    T = model.model.layer.get_delta_weight("old")
    model.set_adapter(["old", "new"])
    output = model(x)
    model.delete_adapter("new")
    torch.testing.assert_close(model(x), scrambled(layer, x, T), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(output, model(x), atol=1e-3)


FOLDED = {"conv2d", "conv2d same", "conv2d unbatched", "conv2d grouped", "conv2d depthwise"}


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in FOLDED])
def test_old_adapters_elsewhere_compute_the_same_as_new_ones(name):
    layer, x = case(name)
    old, new = (adapted(copy.deepcopy(layer), **options) for options in (OLD, {}))
    rotation(old.model.layer).load_state_dict(rotation(new.model.layer).state_dict())
    torch.testing.assert_close(old(x), new(x), atol=1e-5, rtol=1e-4)


def test_old_blocks_across_groups_cannot_be_merged():
    layer, x = nn.Conv2d(6, 4, 1, groups=2), torch.randn(1, 6, 3, 3)
    model = adapted(layer, oft_block_size=2, **OLD)
    T = model.model.layer.get_delta_weight("default")
    torch.testing.assert_close(model(x), layer(torch.einsum("bchw,cd->bdhw", x, T)))
    with pytest.raises(RuntimeError, match="2 groups of size 3.*'default' have size 2.*such as 1"):
        model.merge_adapter()


def test_old_adapters_have_no_dropout():
    model, x = adapted(nn.Linear(64, 8), module_dropout=0.9, **OLD), torch.randn(2, 64)
    assert torch.equal(model(x), model.train()(x))


def test_the_version_goes_with_the_file(tmp_path):
    layer, x = case("conv2d")
    model = get_peft_model(Net(layer), config(**OLD)).eval()
    output = model(x)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == "0.21.2"
    again = PeftModel.from_pretrained(Net(copy.deepcopy(layer)), tmp_path)
    torch.testing.assert_close(again(x), output)


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("options", [{"r": 0, "oft_block_size": 0}, {"r": 2}, {"r": -2, "oft_block_size": 0}])
def test_exactly_one_of_number_and_size_is_given(options):
    with pytest.raises(ValueError, match="Exactly one of r .*oft_block_size"):
        OFTConfig(**options)


def test_layers_pattern_needs_layers():
    with pytest.raises(ValueError, match="layers_pattern='h' needs layers_to_transform"):
        OFTConfig(layers_pattern="h")


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_init_weights_is_true_or_false(value):
    with pytest.raises(ValueError, match=f"layer: init_weights of the adapter 'default'.*{value!r}"):
        adapted(nn.Linear(4, 4), init_weights=value)


def stored(tmp_path, **changes):
    OFTConfig(target_modules=["layer"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return tmp_path


def test_files_of_the_former_method_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no oft_block_size"):
        OFTConfig.from_pretrained(stored(tmp_path, oft_block_size=...))
    model = get_peft_model(Net(nn.Linear(4, 4)), config())
    with pytest.raises(ValueError, match=r"'default'.*expected names with 'oft_R', found '.*oft_r\.weight'"):
        set_peft_model_state_dict(model, {"base_model.model.layer.oft_r.weight": torch.ones(1, 6)})


@pytest.mark.parametrize(
    "version, old, warned",
    [
        ("0.17.1", True, True),
        ("0.18.0.dev0@abc", True, True),
        (..., True, True),
        ("0.21.2", True, False),
        ("0.22.0", False, False),
    ],
)
def test_version_of_a_file(tmp_path, version, old, warned):
    folder = stored(tmp_path, peft_version=version)
    with pytest.warns(UserWarning, match="use_cayley_neumann") if warned else nullcontext():
        found = OFTConfig.from_pretrained(folder)
    assert found.keeps_old_arithmetic is old


def test_new_configuration_is_not_old():
    assert not OFTConfig().keeps_old_arithmetic


def test_gptq_models_cannot_be_merged():
    model = adapted(nn.Linear(4, 4))
    model.model.quantization_method = "gptq"
    with pytest.raises(ValueError, match="GPTQ"):
        model.merge_and_unload()


# -------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "conv2d pointwise"])
def test_output_has_the_dtype_of_the_base_layer(name):
    layer, x = case(name)
    x = x.bfloat16() if x.is_floating_point() else x
    model = adapted(layer.bfloat16())
    layer = model.model.layer
    assert rotation(layer).weight.dtype == torch.bfloat16
    assert model(x).dtype == torch.bfloat16
    rotation(layer).float()
    assert model(x).dtype == torch.bfloat16
    model.merge_adapter()
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("series", [True, False])
def test_rotation_is_computed_in_float32_at_least(series):
    module = OFTRotationModule(2, 6, 4, 8, use_cayley_neumann=series)
    nn.init.normal_(module.weight, std=0.1)
    half = copy.deepcopy(module).bfloat16()
    module.weight.data = half.weight.data.float()
    assert torch.equal(half.get_weight(), module.get_weight().bfloat16())
    assert copy.deepcopy(module).double().get_weight().dtype == torch.float64


def test_mixed_batch_rotates_each_row_by_its_adapter():
    for name in ("linear", "embedding", "conv2d", "conv2d pointwise"):
        layer, x = case(name)
        x = torch.cat([x, x])[:3]
        model = with_two(layer)
        rows = []
        for i, adapter in enumerate("ab"):
            model.set_adapter(adapter)
            rows.append(model(x)[i])
        with model.call_inputs(["a", "b", "__base__"]):
            torch.testing.assert_close(model(x), torch.stack([*rows, layer(x)[2]]), atol=1e-5, rtol=1e-4)
