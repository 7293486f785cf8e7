"""VeRA: ΔW = diag(λ_b)·B·diag(λ_d)·A, on every kind of layer, with A and B shared by all layers of an adapter."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft import PeftModel, VeraConfig, VeraModel, get_peft_model, inject_adapter_in_model
from peft.tuners.vera import Conv1d, Conv2d, Conv3d, Embedding, Linear, VeraLayer


class Net(nn.Module):
    """Two linear layers of different sizes and one that is left alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 10)
        self.other = nn.Linear(10, 3)

    def forward(self, x):
        return self.other(self.second(self.first(x).tanh()).tanh())


def config(**options):
    return VeraConfig(**{"target_modules": ["first", "second"], "r": 3, "init_weights": False, **options})


def adapted(model=None, adapter_name="default", **options):
    return get_peft_model(Net() if model is None else model, config(**options), adapter_name).eval()


def projections(model, adapter="default"):
    return model.base_model.vera_A[adapter], model.base_model.vera_B[adapter]


def x_of(rows=5):
    return torch.randn(rows, 6)


# ----------------------------------------------------------------------------------------------------- the mathematics


def worked_example():
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    base[0].weight.data = torch.eye(2)
    model = adapted(base, target_modules=["0"], r=1)
    layer = model.base_model.model[0]
    model.base_model.vera_A["default"].copy_(torch.tensor([[1.0, 2.0]]))
    model.base_model.vera_B["default"].copy_(torch.tensor([[3.0], [-1.0]]))
    layer.vera_lambda_d["default"].data = torch.tensor([0.5])
    layer.vera_lambda_b["default"].data = torch.tensor([2.0, 4.0])
    return model


def test_worked_example():
    model = worked_example()
    layer = model.base_model.model[0]
    assert layer.get_delta_weight("default").tolist() == [[3.0, 6.0], [-2.0, -4.0]]
    assert model(torch.ones(2)).tolist() == [10.0, -5.0]
    model.merge_adapter()
    assert layer.weight.tolist() == [[4.0, 6.0], [-2.0, -3.0]]


def test_projections_follow_from_the_seed():
    model = adapted(nn.Sequential(nn.Linear(3, 2)), target_modules=["0"], r=2)
    A, B = projections(model)
    expected_A = [[-0.0106, 0.7586, -1.1640], [-1.0408, -0.5447, 0.3792]]
    torch.testing.assert_close(A, torch.tensor(expected_A), atol=5e-5, rtol=0)
    torch.testing.assert_close(B, torch.tensor([[-0.0343, 1.3733], [-0.1537, 0.4583]]), atol=5e-5, rtol=0)


def test_projections_are_as_large_as_the_largest_layers_need():
    A, B = projections(adapted(r=5))
    assert (A.shape, B.shape) == ((5, 6), (10, 5))
    assert A.abs().max() <= math.sqrt(6 / 6) and B.abs().max() <= math.sqrt(6 / 5)


def test_projections_do_not_touch_the_global_random_numbers():
    def drawn(key):
        torch.manual_seed(0)
        adapted(projection_prng_key=key)
        return torch.rand(1)

    assert drawn(0) == drawn(1)


def test_projections_are_drawn_in_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        A64 = projections(adapted())[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert A64.dtype == torch.float64
    assert not torch.allclose(A64.float(), projections(adapted())[0])


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12), Linear),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12), Linear),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 3, 12), Linear),
    "embedding": (lambda: nn.Embedding(20, 8, padding_idx=1), None, Embedding),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9), Conv1d),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1, stride=2, dilation=2), (2, 6, 9, 9), Conv2d),
    "conv2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5), Conv2d),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, padding="same", bias=False), (2, 6, 5, 5), Conv2d),
    "conv2d grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5), Conv2d),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 2, 2)), (2, 6, 5, 4, 4), Conv3d),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_every_kind_of_layer(name):
    build, shape, layer_cls = LAYERS[name]
    base = build()
    x = torch.randint(0, 20, (2, 5)) if shape is None else torch.randn(shape)
    weight, before = copy.deepcopy(base.weight.data), base(x)
    model = adapted(nn.Sequential(base), target_modules=["0"], r=7)
    layer = model.base_model.model[0]
    assert type(layer) is layer_cls and isinstance(layer, VeraLayer)
    rows, *columns = layer.shape
    A, B = projections(model)
    assert A.shape == (7, math.prod(columns)) and B.shape == (rows, 7)
    assert layer.vera_lambda_b["default"].shape == (rows,) and layer.vera_lambda_d["default"].shape == (7,)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-2)
    model.merge_adapter()
    torch.testing.assert_close(model(x), after, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.weight, weight + layer.get_delta_weight("default"))
    model.unmerge_adapter()
    assert torch.equal(layer.weight, weight)
    with model.disable_adapter():
        assert torch.equal(model(x), before)


def test_embedding_scales_its_term_and_leaves_the_projections_alone():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    base = Scaled(20, 8, max_norm=0.1)
    model = adapted(nn.Sequential(base), target_modules=["0"])
    A = projections(model)[0].clone()
    x = torch.arange(20)
    before = base(x)
    torch.testing.assert_close(model(x) - before, 3 * model.base_model.model[0].get_delta_weight("default")[x])
    assert torch.equal(projections(model)[0], A)


def test_dropout_acts_on_the_input_of_A_in_training_only():
    model = adapted(vera_dropout=1.0 - 1e-9)
    x = x_of()
    assert not torch.equal(model(x), Net.forward(model.unload(), x))
    model = adapted(vera_dropout=1.0 - 1e-9).train()
    with model.disable_adapter():
        expected = model(x)
    assert torch.equal(model(x), expected)


def test_scales():
    model = adapted()
    layer = model.base_model.model.first
    delta = layer.get_delta_weight("default")
    layer.set_scale("default", 2)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * delta)
    layer.scale_layer(3)
    torch.testing.assert_close(layer.get_delta_weight("default"), 6 * delta)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), delta)
    assert model.supports_lora_conversion()


# ------------------------------------------------------------------------------------------ the start


def test_the_default_start_changes_nothing():
    model = adapted(init_weights=True, d_initial=0.3)
    x = x_of()
    assert torch.equal(model(x), Net.forward(model.unload(), x))
    layer = adapted(init_weights=True, d_initial=0.3).base_model.model.first
    assert layer.vera_lambda_d["default"].tolist() == pytest.approx([0.3] * 3)
    assert layer.vera_lambda_b["default"].tolist() == [0.0] * 4


@pytest.mark.parametrize("init_weights", [True, False])
def test_lambda_d_is_drawn_in_the_order_of_the_layers(init_weights):
    base = Net()
    torch.manual_seed(5)
    model = adapted(base, init_weights=init_weights)
    drawn_after = torch.rand(1)
    torch.manual_seed(5)
    expected = [torch.randn(3), torch.randn(3)]
    assert torch.equal(torch.rand(1), drawn_after)
    if not init_weights:
        layers = model.base_model.model.first, model.base_model.model.second
        assert all(torch.equal(layer.vera_lambda_d["default"], e) for layer, e in zip(layers, expected))
        assert all((layer.vera_lambda_b["default"] == 1).all() for layer in layers)


def test_what_trains():
    model = adapted()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"base_model.model.{layer}.vera_lambda_{letter}.default" for layer in ("first", "second") for letter in "bd"
    }
    model(x_of()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_layers_hold_the_projections_of_the_tuner():
    model = adapted()
    tuner = model.base_model
    for layer in (tuner.model.first, tuner.model.second):
        assert layer.vera_A is tuner.vera_A and layer.vera_B is tuner.vera_B
    names = {name for name in model.state_dict() if "vera_A" in name}
    assert names == {"base_model.vera_A.default"} | {
        f"base_model.model.{layer}.vera_A.default" for layer in ("first", "second")
    }
    twin = copy.deepcopy(tuner)
    assert twin.model.first.vera_A is twin.vera_A and twin.vera_A is not tuner.vera_A


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_on_a_half_precision_base_are_rounded_to_it(dtype):
    exact = projections(adapted())[0]
    model = adapted(Net().to(dtype))
    assert projections(model)[0].dtype == torch.float32
    assert torch.equal(projections(model)[0], exact.to(dtype).float())
    assert model.base_model.model.first.vera_lambda_b["default"].dtype == torch.float32
    assert model(x_of().to(dtype)).dtype == dtype
    kept = get_peft_model(Net().to(dtype), config(), autocast_adapter_dtype=False)
    assert torch.equal(projections(kept)[0], exact.to(dtype))
    assert kept(x_of().to(dtype)).dtype == dtype
    delta = kept.base_model.model.first.get_delta_weight("default")
    wide = model.base_model.model.first
    wide.vera_lambda_d["default"].data = kept.base_model.model.first.vera_lambda_d["default"].data.float()
    assert torch.equal(delta, wide.get_delta_weight("default").to(dtype))


def test_layers_of_several_dtypes_share_projections():
    base = Net()
    base.second.bfloat16()
    base.second.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    base.other.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    model = get_peft_model(base, config(), autocast_adapter_dtype=False)
    assert model(x_of()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.filterwarnings("ignore:The active adapter 'default' was deleted")
def test_adapters_with_the_same_values_share_storage():
    model = adapted()
    model.add_adapter("again", config())
    assert all(
        buffers["again"] is buffers["default"] for buffers in (model.base_model.vera_A, model.base_model.vera_B)
    )
    model.delete_adapter("default")
    assert list(model.base_model.vera_A) == list(model.base_model.model.first.vera_A) == ["again"]
    assert model(x_of()).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sharing_survives_the_upcast(dtype):
    model = adapted(Net().to(dtype))
    model.add_adapter("again", config())
    assert projections(model, "again")[0] is projections(model)[0]


@pytest.mark.parametrize(
    "options",
    [{"r": 2}, {"r": 8}, {"target_modules": ["first"]}, {"target_modules": ["first", "second", "other"]}],
    ids=["smaller rank", "larger rank", "smaller layers", "larger layers"],
)
def test_an_adapter_of_other_sizes_has_its_own_projections(options):
    alone, x = adapted(**options), x_of()
    model = adapted()
    first = model(x)
    model.add_adapter("other", config(**options))
    assert all(map(torch.equal, projections(model, "other"), projections(alone)))
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, atol=1e-4, rtol=1e-4)


def test_a_layer_uses_the_first_rows_of_larger_projections():
    model = adapted(r=5)
    layer = model.base_model.model.first
    layer.vera_A["small"], layer.vera_B["small"] = projections(model)
    layer.update_layer("small", layer.vera_A, layer.vera_B, 2, config(r=2))
    A, B = layer.projections("small")
    assert torch.equal(A, projections(model)[0][:2]) and torch.equal(B, projections(model)[1][:4, :2])


def test_a_layer_refuses_projections_that_are_too_small():
    model = adapted(target_modules=["first"])
    layer = Net().second
    with pytest.raises(ValueError, match=r"vera_B.*'default'.*\(4, 3\).*\(10, 3\)"):
        Linear(layer, model.base_model.vera_A, model.base_model.vera_B, "default", config(), r=3)


def test_adding_after_all_were_deleted_starts_anew():
    model = adapted()
    A = projections(model)[0]
    model.delete_adapter("default")
    assert len(model.base_model.vera_A) == 0
    model.add_adapter("new", config(save_projection=True))
    assert torch.equal(projections(model, "new")[0], A)


@pytest.mark.parametrize("option", [{"projection_prng_key": 1}, {"save_projection": False}])
@pytest.mark.filterwarnings("ignore:With save_projection=False")
def test_adapters_of_a_model_agree_on_where_projections_come_from(option):
    model = adapted()
    with pytest.raises(ValueError, match=f"{next(iter(option))}: the adapter 'default'"):
        model.add_adapter("other", config(**option))
    assert list(model.peft_config) == list(model.base_model.vera_A) == ["default"]


@pytest.mark.parametrize("r", [0, -1])
def test_rank_must_be_positive(r):
    with pytest.raises(ValueError, match=f"positive, got r={r}"):
        adapted(r=r)


def test_targets_that_cannot_be_adapted():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(TypeError, match=r"cannot adapt.*LayerNorm"):
        adapted(net, target_modules=["0", "1"])
    assert isinstance(net[0], nn.Linear)
    with pytest.raises(ValueError, match=r"none of the targets \['1'\]"):
        adapted(net, target_modules=["1"])


def test_a_failed_second_adapter_leaves_no_projections():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model = adapted(net, target_modules=["0"])
    x = torch.randn(3, 2)
    before = model(x)
    with pytest.raises(TypeError):
        model.add_adapter("other", config(target_modules=["0", "1"], r=4))
    assert list(model.base_model.vera_A) == list(model.base_model.vera_B) == ["default"]
    assert torch.equal(model(x), before)


def test_injection_without_a_peft_model_is_refused():
    with pytest.raises(ValueError, match="VeraModel keeps state"):
        inject_adapter_in_model(config(), Net())


def test_a_tuner_on_a_model_with_vera_layers_takes_over_their_projections():
    model = VeraModel(Net(), config(), "first").model
    with pytest.warns(UserWarning, match="carries adapters already"):
        second = VeraModel(model, config(r=2), "second")
    assert second.vera_A is model.first.vera_A
    assert set(second.vera_A) == {"first", "second"}


# ------------------------------------------------------------------------------------------ the files


def saved(model, folder, adapter="default"):
    model.save_pretrained(folder)
    return folder if adapter == "default" else folder / adapter


KEYS = {f"base_model.model.{layer}.vera_lambda_{letter}" for layer in ("first", "second") for letter in "bd"}


def test_the_file_has_vectors_and_projections(tmp_path):
    model = adapted()
    state = load_file(saved(model, tmp_path) / "adapter_model.safetensors")
    assert set(state) == KEYS | {"base_model.vera_A", "base_model.vera_B"}
    base, x = model.unload(), x_of()
    expected = adapted(copy.deepcopy(base))
    peft.set_peft_model_state_dict(expected, state)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), expected(x))


@pytest.mark.filterwarnings("ignore:With save_projection=False")
def test_without_projections_the_file_has_the_vectors_alone(tmp_path):
    base, x = Net(), x_of()
    model = adapted(copy.deepcopy(base), save_projection=False, projection_prng_key=7)
    assert not any("vera_A" in name for name in model.state_dict())
    assert set(load_file(saved(model, tmp_path) / "adapter_model.safetensors")) == KEYS
    with pytest.warns(UserWarning, match="has no projections.*projection_prng_key=7"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:With save_projection=False")
def test_projections_in_a_file_that_should_have_none_are_ignored(tmp_path):
    base, x = Net(), x_of()
    model = adapted(copy.deepcopy(base), save_projection=False)
    saved(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    A, B = projections(model)
    save_file({**load_file(path), "base_model.vera_A": A + 1, "base_model.vera_B": B + 1}, path)
    with pytest.warns(UserWarning, match="has projections, which are ignored"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("lacking", ["base_model.vera_A", "base_model.vera_B"])
def test_a_file_that_lacks_promised_projections_is_refused(tmp_path, lacking):
    path = saved(adapted(), tmp_path) / "adapter_model.safetensors"
    state = load_file(path)
    del state[lacking]
    save_file(state, path)
    net = Net()
    with pytest.raises(ValueError, match=f"lacks .*{lacking}"):
        PeftModel.from_pretrained(net, tmp_path)
    assert type(net.first) is nn.Linear
    model = adapted(net)
    with pytest.raises(ValueError, match=f"lacks .*{lacking}"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == list(model.base_model.vera_A) == ["default"]


@pytest.mark.filterwarnings("ignore:With save_projection=False")
def test_the_configuration_decides_what_is_saved(tmp_path):
    model = adapted(save_projection=False)
    model.peft_config["default"].save_projection = True
    with pytest.raises(ValueError, match="made with save_projection=False"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    model = adapted()
    model.peft_config["default"].save_projection = False
    assert set(load_file(saved(model, tmp_path) / "adapter_model.safetensors")) == KEYS


def test_a_state_dict_without_the_projections_cannot_be_saved():
    model = adapted()
    state = {name: value for name, value in model.state_dict().items() if "base_model.vera_B" not in name}
    with pytest.raises(ValueError, match="lacks .*base_model.vera_B"):
        peft.get_peft_model_state_dict(model, state_dict=state)


def test_loading_leaves_the_projections_of_other_adapters_alone(tmp_path):
    base, x = Net(), x_of()
    trained = adapted(copy.deepcopy(base))
    for projection in projections(trained):
        projection.mul_(2)
    saved(trained, tmp_path)
    model = adapted(copy.deepcopy(base))
    before = model(x)
    model.load_adapter(tmp_path, "loaded")
    assert torch.equal(model(x), before)
    model.set_adapter("loaded")
    assert torch.equal(model(x), trained(x))
    assert torch.equal(projections(model, "loaded")[0], 2 * projections(model)[0])


def test_loading_equal_projections_keeps_them_shared(tmp_path):
    model = adapted()
    model.load_adapter(saved(model, tmp_path), "loaded")
    assert projections(model, "loaded")[0] is projections(model)[0]


@pytest.mark.parametrize("options", [{"r": 2}, {"target_modules": ["first"]}], ids=["rank", "layers"])
def test_a_smaller_file_is_loaded_beside_a_larger_adapter(tmp_path, options):
    base, x = Net(), x_of()
    small = adapted(copy.deepcopy(base), **options)
    saved(small, tmp_path)
    model = adapted(copy.deepcopy(base), r=4)
    model.load_adapter(tmp_path, "small")
    model.set_adapter("small")
    assert torch.equal(model(x), small(x))


def test_larger_projections_in_a_file_are_cut_to_what_is_used(tmp_path):
    # The release saved a second adapter with the projections of the first.
    base, x = Net(), x_of()
    model = adapted(copy.deepcopy(base), r=2, target_modules=["first"])
    path = saved(model, tmp_path) / "adapter_model.safetensors"
    state = load_file(path)
    A, B = nn.functional.pad(state["base_model.vera_A"], (0, 4, 0, 1)), torch.randn(12, 3)
    B[:4, :2] = state["base_model.vera_B"]
    save_file({**state, "base_model.vera_A": A, "base_model.vera_B": B}, path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), model(x))


def test_smaller_projections_in_a_file_are_refused(tmp_path):
    path = saved(adapted(), tmp_path) / "adapter_model.safetensors"
    state = load_file(path)
    save_file({**state, "base_model.vera_A": state["base_model.vera_A"][:, :5].contiguous()}, path)
    model = adapted()
    A = projections(model)[0].clone()
    with pytest.raises(RuntimeError, match=r"base_model.vera_A: expected \(3, 6\), found \(3, 5\)"):
        model.load_adapter(tmp_path, "other")
    assert torch.equal(projections(model)[0], A)


def test_low_memory_loading_has_real_projections(tmp_path):
    base, x = Net(), x_of()
    model = adapted(copy.deepcopy(base))
    saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(loaded(x), model(x))
    bare = get_peft_model(Net(), config(), low_cpu_mem_usage=True)
    assert bare.base_model.model.first.vera_lambda_b["default"].is_meta
    assert not any(projection.is_meta for projection in projections(bare))


def test_biases_are_saved_too(tmp_path):
    model = adapted(bias="vera_only")
    assert model.base_model.model.first.bias.requires_grad and not model.base_model.model.other.bias.requires_grad
    state = load_file(saved(model, tmp_path) / "adapter_model.safetensors")
    assert {name for name in state if "bias" in name} == {
        f"base_model.model.{layer}.base_layer.bias" for layer in ("first", "second")
    }
    with pytest.raises(NotImplementedError, match="bias='some'"):
        adapted(bias="some")


# ------------------------------------------------------------------------------------------ the configuration


def test_configuration():
    assert VeraConfig(target_modules=["a", "a"]).target_modules == {"a"}
    with pytest.raises(ValueError, match="layers_pattern='h'"):
        VeraConfig(layers_pattern="h")
    assert VeraConfig(layers_pattern="h", layers_to_transform=0).layers_to_transform == 0  # the first layer, not none
    with pytest.warns(UserWarning, match="save_projection=False"):
        VeraConfig(save_projection=False)


def test_fan_in_fan_out_is_corrected_for_the_layer():
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model = adapted(nn.Sequential(Conv1D(4, 6)), target_modules=["0"])
    assert model.peft_config["default"].fan_in_fan_out is True
    layer = model.base_model.model[0]
    assert layer.fan_in_fan_out and layer.is_target_conv_1d_layer
    assert layer.get_delta_weight("default").shape == (6, 4)


def test_a_saved_configuration_is_read_back(tmp_path):
    saved(adapted(r=3, projection_prng_key=11, d_initial=0.5), tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["projection_prng_key"], stored["save_projection"], stored["d_initial"]) == (11, True, 0.5)
    assert VeraConfig.from_pretrained(tmp_path).r == 3


def test_repr_names_the_method():
    assert repr(adapted().base_model.model.first).startswith("vera.Linear(")
