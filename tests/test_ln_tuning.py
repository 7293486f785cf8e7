"""LN tuning: the adapter is a copy of a module, used instead of it; for modules of any type."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import LNTuningConfig, LNTuningModel, PeftModel, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer


class RMSNorm(nn.Module):
    """A normalisation layer of a model's own, as most language models have one."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, hidden, scale=1.0):
        return scale * self.weight * hidden / hidden.square().mean(-1, keepdim=True).sqrt()


class Net(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6) if norm is None else norm
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.first(x)))


def config(**options):
    return LNTuningConfig(**{"target_modules": ["norm"], **options})


def adapted(model=None, adapter_name="default", **options):
    return get_peft_model(Net() if model is None else model, config(**options), adapter_name).eval()


def tuned(model, adapter="default", to=2.0):
    """Give an adapter's copy values of its own."""
    for parameter in layer_of(model).ln_tuning_layers[adapter].parameters():
        parameter.data.fill_(to)
    return model


def layer_of(model):
    return model.base_model.model.norm


def x_of(rows=5):
    return torch.randn(rows, 4)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------------- one adapter


def test_a_new_copy_changes_nothing_and_trains_alone():
    base, x = Net(), x_of()
    before = base(x)
    model = adapted(base)
    assert isinstance(layer_of(model), LNTuningLayer)
    assert torch.equal(model(x), before)
    prefix = "base_model.model.norm.ln_tuning_layers.default"
    assert trainable(model) == {f"{prefix}.weight", f"{prefix}.bias"}
    copied, original = layer_of(model).ln_tuning_layers["default"], layer_of(model).base_layer
    assert copied.weight.data_ptr() != original.weight.data_ptr()


def test_the_copy_is_used_instead_of_the_module():
    model = tuned(adapted(Net(nn.LayerNorm(6, elementwise_affine=True))))
    x = x_of()
    net = model.base_model.model
    normal = nn.functional.layer_norm(net.first(x), (6,))
    torch.testing.assert_close(model(x), net.head(2 * normal + 2))
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net.head(normal))


MODULES = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "a norm of the model's own": lambda: RMSNorm(6),
    "Linear": lambda: nn.Linear(6, 6),
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "a container": lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Tanh())),
}


@pytest.mark.parametrize("name", MODULES)
def test_any_module(name, tmp_path):
    base, x = Net(MODULES[name]()), x_of()
    plain = copy.deepcopy(base).eval()
    model = tuned(adapted(copy.deepcopy(base)))
    after = model(x)
    assert not torch.allclose(after, plain(x))
    model.merge_adapter()
    assert torch.equal(model(x), after)
    model.unmerge_adapter()
    assert torch.equal(model(x), after)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), after)
    assert trainable(loaded) == set()
    merged = model.merge_and_unload()
    assert type(merged.norm) is type(plain.norm) and torch.equal(merged(x), after)
    assert set(merged.state_dict()) == set(plain.state_dict())
    assert {n for n, p in merged.named_parameters() if p.requires_grad} == {
        n for n, _ in merged.named_parameters() if n.startswith("norm.")
    }


def test_further_arguments_reach_the_copy():
    model = tuned(adapted(Net(RMSNorm(6))))
    layer, hidden = layer_of(model), torch.ones(2, 6)
    assert layer(hidden, scale=3.0).tolist() == [[6.0] * 6] * 2
    assert layer(hidden, 3.0).tolist() == [[6.0] * 6] * 2


def test_the_buffers_of_a_copy_are_its_own():
    base = Net(nn.BatchNorm1d(6))
    model = adapted(base).train()
    model(x_of(8))
    layer = layer_of(model)
    assert layer.ln_tuning_layers["default"].num_batches_tracked == 1
    assert layer.base_layer.num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_copy_keeps_the_dtype_of_the_module(dtype, autocast):
    model = get_peft_model(Net().to(dtype), config(), autocast_adapter_dtype=autocast)
    assert layer_of(model).ln_tuning_layers["default"].weight.dtype == dtype


def test_low_memory_loading_has_no_effect_on_copies():
    model = get_peft_model(Net(), config(), low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_one_step_changes_the_copy_alone():
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(x_of()).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable(model)


# ---------------------------------------------------------------------------------------------------- several adapters


def two_adapters():
    model = tuned(adapted(adapter_name="a"), "a", 2.0)
    model.add_adapter("b", config())
    return tuned(model, "b", 3.0)


def test_a_second_copy_starts_from_the_module_and_is_frozen():
    model = tuned(adapted(adapter_name="a"), "a")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged before a new copy is made"):
        model.add_adapter("b", config())
    assert layer_of(model).ln_tuning_layers["b"].weight.tolist() == [1.0] * 6
    assert all(".a." in name for name in trainable(model))
    model.set_adapter("b")
    assert all(".b." in name for name in trainable(model))


def test_two_copies_cannot_be_active_together():
    model = two_adapters()
    x = x_of()
    before = model(x)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] cannot be active together.*'norm'"):
        model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"] and torch.equal(model(x), before)


def test_adapters_of_different_modules_can_be_active_together():
    base = Net(nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6)))
    model = get_peft_model(base, LNTuningConfig(target_modules=["norm.0"]), "a")
    model.add_adapter("b", LNTuningConfig(target_modules=["norm.1"]))
    x = x_of()
    model.set_adapter("b")  # layers that do not hold the active adapter are as they were
    model.base_model.model.norm[1].ln_tuning_layers["b"].weight.data.fill_(3.0)
    only_b = model(x)
    model.base_model.set_adapter(["a", "b"])
    assert torch.equal(model(x), only_b)
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), only_b)


def test_a_mixed_batch():
    model, x = two_adapters(), x_of(3)
    expected = []
    for name in ("a", "b"):
        model.set_adapter(name)
        expected.append(model(x))
    with model.disable_adapter():
        plain = model(x)
    mixed = model(x, adapter_names=["b", "__base__", "a"])
    torch.testing.assert_close(mixed, torch.stack([expected[1][0], plain[1], expected[0][2]]))


def test_merging_another_adapter_takes_out_the_first():
    model = two_adapters()
    layer = layer_of(model)
    model.merge_adapter()
    assert layer.merged_adapters == ["a"] and layer.base_layer.weight.tolist() == [2.0] * 6
    with pytest.warns(UserWarning, match=r"\['a'\] are unmerged before \['b'\]"):
        model.merge_adapter(["b"])
    assert layer.merged_adapters == ["b"] and layer.base_layer.weight.tolist() == [3.0] * 6
    model.unmerge_adapter()
    assert layer.base_layer.weight.tolist() == [1.0] * 6


def test_merge_takes_the_names_first():
    model = two_adapters()
    layer = layer_of(model)
    layer.merge(["b"])
    assert layer.merged_adapters == ["b"]
    layer.unmerge()
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        layer.merge(["a", "b"])
    layer.ln_tuning_layers["a"].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="'norm'|norm.*'a'.*NaN"):
        layer.merge(safe_merge=True)
    assert not layer.merged and layer.base_layer.weight.tolist() == [1.0] * 6


def test_disabling_takes_a_merged_copy_out():
    model = tuned(adapted())
    x = x_of()
    model.merge_adapter()
    merged = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), merged)
    assert torch.equal(model(x), merged)


def test_unloading_for_good():
    x = x_of()
    model = two_adapters()
    with pytest.raises(ValueError, match=r"\['a', 'b'\] cannot be active together"):
        model.merge_and_unload(adapter_names=["a", "b"])
    assert isinstance(layer_of(model), LNTuningLayer)
    with pytest.raises(TypeError, match="must be a list"):
        model.merge_and_unload(adapter_names="a")
    model.set_adapter("b")
    expected = model(x)
    model.set_adapter("a")
    merged = model.merge_and_unload(adapter_names=["b"])
    assert type(merged.norm) is nn.LayerNorm and torch.equal(merged(x), expected)
    assert type(two_adapters().unload().norm) is nn.LayerNorm


def test_deleting():
    model = two_adapters()
    model.delete_adapter("b")
    assert set(layer_of(model).ln_tuning_layers) == {"a"}
    model.delete_adapter("a")
    assert len(layer_of(model).ln_tuning_layers) == 0
    assert model(x_of()).shape == (5, 3)


# ------------------------------------------------------------------------------------------- modules saved beside it


def test_modules_to_save_are_unwrapped_with_the_rest():
    model = adapted(modules_to_save=["head"])
    merged = model.merge_and_unload()
    assert type(merged.norm) is nn.LayerNorm and type(merged.head) is nn.Linear


# ------------------------------------------------------------------------------------------ the files


def test_the_file(tmp_path):
    tuned(adapted()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: value.tolist() for name, value in state.items()} == {
        "base_model.model.norm.ln_tuning_layers.weight": [2.0] * 6,
        "base_model.model.norm.ln_tuning_layers.bias": [2.0] * 6,
    }


def test_saving_while_merged_writes_the_adapter(tmp_path):
    model = tuned(adapted())
    model.merge_adapter()
    state = peft.get_peft_model_state_dict(model)
    assert {tuple(value.tolist()) for value in state.values()} == {(2.0,) * 6}


INSIDE = "base_model.model.norm.ln_tuning_layers"


def test_tensors_inside_a_container_are_saved_with_the_name_of_the_adapter(tmp_path):
    # As the release writes them, which strips the name only where it is the last part but one.
    model = tuned(adapted(Net(nn.Sequential(nn.LayerNorm(6))), "mine"), "mine")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert set(state) == {f"{INSIDE}.mine.0.weight", f"{INSIDE}.mine.0.bias"}


@pytest.mark.parametrize("written", ["mine.", "other.", ""], ids=["same name", "another name", "no name"])
def test_a_container_is_loaded_whatever_the_adapter_was_called(tmp_path, written):
    base = Net(nn.Sequential(nn.LayerNorm(6)))
    model = tuned(adapted(copy.deepcopy(base), "mine"), "mine")
    model.save_pretrained(tmp_path)
    path = tmp_path / "mine" / "adapter_model.safetensors"
    save_file({name.replace("mine.", written): value for name, value in load_file(path).items()}, path)
    loaded = adapted(base, "first")
    result = loaded.load_adapter(tmp_path / "mine", "mine")
    assert result.missing_keys == result.unexpected_keys == []
    loaded.set_adapter("mine")
    x = x_of()
    assert torch.equal(loaded(x), model(x))


# ------------------------------------------------------------------------------------------ the configuration


def test_configuration_keeps_its_lists(tmp_path):
    given = LNTuningConfig(target_modules=["b", "a"], exclude_modules=["c"])
    assert given.target_modules == ["b", "a"] and given.exclude_modules == ["c"]
    given.save_pretrained(tmp_path)
    assert LNTuningConfig.from_pretrained(tmp_path).target_modules == ["b", "a"]


def test_excluded_modules():
    model = get_peft_model(
        Net(nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6))),
        LNTuningConfig(target_modules=r"norm\.\d", exclude_modules=["norm.1"]),
    )
    assert model.base_model.targeted_module_names == ["norm.0"]


@pytest.mark.compat
def test_default_targets():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)), LNTuningConfig())
    assert model.base_model.targeted_module_names == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.norm",
    ]
    with pytest.raises(ValueError, match="'custom'"):
        LNTuningModel(Net(), LNTuningConfig(), "default")


def test_repr_names_the_method():
    assert repr(layer_of(adapted())).startswith("ln_tuning.LNTuningLayer(")
