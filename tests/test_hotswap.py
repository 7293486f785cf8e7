"""Hotswap: another LoRA adapter takes the place of one, in place, whole or not at all."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return torch.einsum("bi,eio->bo", x, self.weight)


class Net(nn.Module):
    """Every kind of layer that LoRA has factors of its own form for."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin = nn.Linear(8, 8)
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.experts = Experts()
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.lin(self.emb(ids))
        image = x[..., :4].unsqueeze(-1).expand(-1, -1, -1, 8).movedim(1, -1)[..., :1, :]
        return self.head(self.experts(x.mean(1) + self.conv(image.expand(-1, -1, 5, -1)).mean((2, 3))))


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def net():
    torch.manual_seed(0)
    return Net().eval()


def save_adapter(folder, seed, copies=True, targets=("emb", "lin", "conv"), **options):
    """Saves an adapter with weights of its own and gives back its output."""
    options.setdefault("target_parameters", ["experts.weight"])
    saved = ["head"] if copies else None
    config = LoraConfig(target_modules=list(targets), modules_to_save=saved, init_lora_weights=False, **options)
    model = get_peft_model(net(), config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model(IDS).detach()


@pytest.fixture
def adapters(tmp_path):
    """Folders and outputs of adapters of several ranks and scalings."""
    settings = {
        "a": {"r": 4},
        "b": {"r": 2, "lora_alpha": 5},
        "c": {"r": 6, "lora_alpha": 2, "rank_pattern": {"conv": 4, "emb": 3}},
    }
    outputs = {name: save_adapter(tmp_path / name, seed, **kw) for seed, (name, kw) in enumerate(settings.items())}
    return tmp_path, outputs


def snapshot(model, name="default"):
    layers = [module for module in model.modules() if hasattr(module, "scaling")]
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [dict(layer.scaling) for layer in layers],
        copy.deepcopy(model.peft_config[name]),
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])
    assert after[1:] == before[1:]


# ------------------------------------------------------------------------------------------------------------ swapping


def test_the_output_is_the_new_adapters(adapters):
    folder, outputs = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    for name in "bcab":  # to a smaller rank, to larger ones, and back
        assert hotswap_adapter(model, folder / name, "default") is None
        torch.testing.assert_close(model(IDS), outputs[name])


def test_the_configuration_is_the_new_ones(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "a", is_trainable=True)
    hotswap_adapter(model, folder / "c", "default")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern) == (6, 2, {"conv": 4, "emb": 3})
    assert config.inference_mode is False
    lin, conv = model.base_model.model.lin, model.base_model.model.conv
    assert (lin.r, lin.lora_alpha, lin.scaling) == ({"default": 6}, {"default": 2}, {"default": 2 / 6})
    assert (conv.r, conv.scaling) == ({"default": 4}, {"default": 2 / 4})


def test_flags_and_the_identity_of_parameters_stay(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "b", is_trainable=True)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    hotswap_adapter(model, folder / "a", "default")
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before


def test_other_adapters_are_left_alone(adapters):
    folder, outputs = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    model.load_adapter(folder / "b", "other")
    hotswap_adapter(model, folder / "c", "default")
    torch.testing.assert_close(model(IDS), outputs["c"])
    model.set_adapter("other")
    torch.testing.assert_close(model(IDS), outputs["b"])
    assert model.peft_config["other"].r == 2


def test_what_is_saved_afterwards_is_the_new_adapter(adapters, tmp_path):
    folder, outputs = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    hotswap_adapter(model, folder / "b", "default")  # into factors of a larger rank
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "again")(IDS), outputs["b"])
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("b", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_layers_that_the_new_adapter_lacks_become_the_base(tmp_path):
    save_adapter(tmp_path / "a", 0, target_parameters=None)
    output = save_adapter(tmp_path / "b", 1, targets=["lin"], target_parameters=None)
    model = PeftModel.from_pretrained(net(), tmp_path / "a")
    hotswap_adapter(model, tmp_path / "b", "default")
    torch.testing.assert_close(model(IDS), output)
    conv = model.base_model.model.conv
    assert not conv.lora_A["default"].weight.any() and not conv.lora_B["default"].weight.any()


def test_biases_of_factors_are_swapped(tmp_path):
    options = {"targets": ["lin"], "lora_bias": True, "target_parameters": None}
    save_adapter(tmp_path / "a", 0, **options)
    output = save_adapter(tmp_path / "b", 1, **options)
    model = PeftModel.from_pretrained(net(), tmp_path / "a")
    hotswap_adapter(model, tmp_path / "b", "default")
    torch.testing.assert_close(model(IDS), output)


def test_dora_is_swapped(tmp_path):
    options = {"targets": ["lin", "emb"], "use_dora": True, "target_parameters": None}
    save_adapter(tmp_path / "a", 0, r=8, **options)
    output = save_adapter(tmp_path / "b", 1, r=4, **options)
    model = PeftModel.from_pretrained(net(), tmp_path / "a")
    hotswap_adapter(model, tmp_path / "b", "default")
    torch.testing.assert_close(model(IDS), output)


def test_by_state_dict_with_names_in_memory(adapters):
    folder, outputs = adapters
    donor = PeftModel.from_pretrained(net(), folder / "b")
    state = {name: p for name, p in donor.named_parameters() if ".default" in name}
    model = PeftModel.from_pretrained(net(), folder / "a")
    hotswap_adapter_from_state_dict(model, state, "default", donor.peft_config["default"])
    torch.testing.assert_close(model(IDS), outputs["b"])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_unknown_adapter(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    with pytest.raises(ValueError, match="'defualt'.*default"):
        hotswap_adapter(model, folder / "b", "defualt")


def test_merged_adapter(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "b")
    model.base_model.model.lin.merge()
    with pytest.raises(ValueError, match="merged into .*lin"):
        hotswap_adapter(model, folder / "b", "default")


@pytest.mark.parametrize(
    "field, value",
    [("use_rslora", True), ("lora_dropout", 0.5), ("alpha_pattern", {"lin": 3}), ("use_dora", True)],
)
def test_configurations_that_do_not_go_together(field, value):
    first, second = LoraConfig(), LoraConfig(**{field: value})
    with pytest.raises(ValueError, match=field):
        check_hotswap_configs_compatible(first, second)


def test_configurations_that_go_together():
    check_hotswap_configs_compatible(LoraConfig(), LoraConfig(r=3, lora_alpha=5, rank_pattern={"x": 2}))


@pytest.mark.parametrize("configs", [(LoHaConfig(), LoHaConfig()), (LoraConfig(), LoHaConfig())])
def test_only_lora_is_swapped(configs):
    with pytest.raises(ValueError):
        check_hotswap_configs_compatible(*configs)


def broken(folder, change):
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")


LIN = "base_model.model.lin.lora_A.weight"


@pytest.mark.parametrize(
    "change, error, mention",
    [
        (lambda s: s.update({"base_model.model.lim.lora_A.weight": s.pop(LIN)}), RuntimeError, "lim.lora_A"),
        (lambda s: s.update({LIN: torch.ones(2, 9)}), ValueError, "(2, 9)"),
        (lambda s: s.update({LIN: s[LIN] / 0}), ValueError, "NaN or infinite"),
        (lambda s: s.update({LIN: torch.ones(7, 8)}), ValueError, "ranks"),
        (lambda s: s.pop("base_model.model.head.weight"), ValueError, "head.modules_to_save.default.weight"),
        (lambda s: s.update({"base_model.model.lin.base_layer.bias": torch.ones(8)}), RuntimeError, "base_layer.bias"),
    ],
    ids=["no such layer", "another width", "not finite", "ranks differ", "a copy is missing", "a base weight"],
)
def test_weights_that_do_not_fit_change_nothing(adapters, change, error, mention):
    folder, outputs = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    before = snapshot(model)
    broken(folder / "b", change)
    with pytest.raises(error) as caught:
        hotswap_adapter(model, folder / "b", "default")
    assert mention in str(caught.value)
    assert_unchanged(model, before)
    torch.testing.assert_close(model(IDS), outputs["a"])


def test_a_copy_that_the_model_lacks_is_refused(tmp_path):
    save_adapter(tmp_path / "a", 0, copies=False)
    save_adapter(tmp_path / "b", 1, copies=True)
    model = PeftModel.from_pretrained(net(), tmp_path / "a")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="head"):
        hotswap_adapter(model, tmp_path / "b", "default")
    assert_unchanged(model, before)


def test_a_weight_of_the_model_that_is_not_the_adapters(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    before = snapshot(model)
    state = {"base_model.model.lin.base_layer.weight": torch.zeros(8, 8)}
    with pytest.raises(KeyError, match="base_layer"):
        hotswap_adapter_from_state_dict(model, state, "default", LoraConfig())
    assert_unchanged(model, before)


def test_token_rows_of_other_tokens_are_refused(tmp_path):
    for name, rows in (("a", [1, 2]), ("b", [1, 3])):
        config = LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": rows}, init_lora_weights=False)
        get_peft_model(net(), config).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(net(), tmp_path / "a")
    with pytest.raises(ValueError, match="different tokens"):
        hotswap_adapter(model, tmp_path / "b", "default")


# ------------------------------------------------------------------------------------------------------------ preparing


def test_preparing_changes_no_output(adapters):
    folder, outputs = adapters
    model = PeftModel.from_pretrained(net(), folder / "c")
    assert prepare_model_for_compiled_hotswap(model, target_rank=8) is None
    torch.testing.assert_close(model(IDS), outputs["c"])
    base = model.base_model.model
    assert base.lin.lora_A["default"].weight.shape == (8, 8) and base.lin.lora_A["default"].out_features == 8
    assert base.conv.lora_A["default"].weight.shape == (8, 4, 3, 3)
    assert base.conv.lora_B["default"].weight.shape == (8, 4, 1, 1)
    assert base.emb.lora_embedding_B["default"].shape == (8, 8)
    assert base.experts.lora_A["default"].weight.shape == (24, 8)
    assert torch.is_tensor(base.lin.scaling["default"]) and base.lin.scaling["default"].shape == ()
    assert base.lin.r == {"default": 6}


def test_preparing_twice_is_preparing_once(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    scaling = model.base_model.model.lin.scaling["default"]
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert model.base_model.model.lin.scaling["default"] is scaling


def test_a_prepared_model_saves_the_adapter_without_padding(adapters, tmp_path):
    folder, outputs = adapters
    model = PeftModel.from_pretrained(net(), folder / "c")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    shapes = {name: value.shape for name, value in get_peft_model_state_dict(model).items()}
    assert shapes == {n: v.shape for n, v in load_file(folder / "c" / "adapter_model.safetensors").items()}
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "again")(IDS), outputs["c"])


def test_mixed_batches_of_a_prepared_model(tmp_path):
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, seed, targets=["lin"], copies=False, target_parameters=None, r=2 + 3 * seed)
    model = PeftModel.from_pretrained(net(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    expected = model(IDS, adapter_names=["a", "b"])
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.testing.assert_close(model(IDS, adapter_names=["a", "b"]), expected)


def test_scaling_of_a_prepared_model_stays_a_tensor(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    prepare_model_for_compiled_hotswap(model)
    layer = model.base_model.model.lin
    tensor = layer.scaling["default"]
    layer.set_scale("default", 3)
    assert layer.scaling["default"] is tensor and tensor.item() == 3 * 8 / 4
    layer.scale_layer(0.5)
    assert layer.scaling["default"] is tensor and tensor.item() == 3
    layer.unscale_layer()
    assert layer.scaling["default"] is tensor and tensor.item() == 2


def test_configurations_are_prepared_too(adapters):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    config, other = LoraConfig(r=2, rank_pattern={"x": 1, "y": 3}), LoraConfig(r=3)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=config)
    assert (config.r, config.rank_pattern) == (8, {"x": 8, "y": 8})
    prepare_model_for_compiled_hotswap(model, target_rank=8, config={"other": other})
    assert other.r == 8


@pytest.mark.parametrize("options", [{"target_rank": 3}, {"target_rank": 7}, {"config": LoraConfig()}])
def test_what_cannot_be_prepared_changes_nothing(adapters, options):
    folder, _ = adapters
    model = PeftModel.from_pretrained(net(), folder / "a")
    before = snapshot(model)
    with pytest.raises(ValueError):
        prepare_model_for_compiled_hotswap(model, **options)
    assert_unchanged(model, before)


def test_a_model_without_lora_cannot_be_prepared():
    with pytest.raises(ValueError, match="no LoRA layers"):
        prepare_model_for_compiled_hotswap(net(), target_rank=8)


def test_a_compiled_model_is_to_be_prepared_before(adapters):
    folder, _ = adapters
    model = torch.compile(PeftModel.from_pretrained(net(), folder / "a"), backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.warns(UserWarning, match="compiled"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="warn")
    prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="ignore")
    with pytest.raises(ValueError, match="'error', 'warn' or 'ignore'"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="perhaps")


# ------------------------------------------------------------------------------------------------------------- compiled


class CountingBackend:
    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_again(adapters):
    folder, outputs = adapters
    torch._dynamo.reset()
    model = PeftModel.from_pretrained(net(), folder / "a")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(IDS), outputs["a"])
    graphs = backend.graphs
    for name in "bcab":
        hotswap_adapter(compiled, folder / name, "default")
        torch.testing.assert_close(compiled(IDS), outputs[name])
    assert backend.graphs == graphs


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4,),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=2,
    ).eval()


@pytest.mark.compat
@torch.no_grad()
def test_diffusers_swaps_in_a_compiled_model(tmp_path):
    torch._dynamo.reset()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 3, 8)
    outputs = {}
    for name, rank, alpha in (("a", 4, 4), ("b", 2, 8), ("c", 8, 2)):
        donor = unet()
        targets = ["to_q", "to_k", "conv1"]
        donor.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
        donor.save_lora_adapter(tmp_path / name)
        outputs[name] = donor(*inputs).sample
    options = {"adapter_name": "default_0", "prefix": None, "weight_name": "pytorch_lora_weights.safetensors"}
    model = unet()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(tmp_path / "a", **options)
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(*inputs).sample, outputs["a"])
    graphs = backend.graphs
    for name in "bca":
        compiled.load_lora_adapter(tmp_path / name, hotswap=True, **options)
        torch.testing.assert_close(compiled(*inputs).sample, outputs[name], atol=1e-5, rtol=1e-5)
    assert backend.graphs == graphs
    assert (model.peft_config["default_0"].r, model.peft_config["default_0"].lora_alpha) == (4, 4)
