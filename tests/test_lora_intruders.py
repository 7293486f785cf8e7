"""Intruder dimensions: singular vectors that LoRA brought into a weight, scaled down in a copy of the adapter."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import IA3Config, LoraConfig, MontecloraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.intruders import balanced, mitigated, reduce_intruder_dimension


class Net(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(9, 7) if layer is None else layer
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "linear": lambda: nn.Linear(9, 7),
    "wide linear": lambda: nn.Linear(30, 7),
    "tall linear": lambda: nn.Linear(7, 30),
    "conv1d_transformers": lambda: Conv1D(7, 9),
    "embedding": lambda: nn.Embedding(20, 7),
    "conv1d": lambda: nn.Conv1d(3, 7, 3),
    "conv2d": lambda: nn.Conv2d(3, 7, (3, 2)),
    "conv3d": lambda: nn.Conv3d(3, 7, 2),
}
EVERYTHING = {"threshold_epsilon": 1.1}
"""Every singular vector counts as an intruder."""


def adapted(layer=None, strength=2.0, **options):
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["layer"], "init_lora_weights": False, **options}
    model = get_peft_model(Net(layer), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=strength)
    return model


def layer_of(model):
    return model.base_model.model.layer


def reduce(model, **options):
    lines = []
    reduce_intruder_dimension(model, **{"logging_sink": lines.append, **options})
    return lines


def matrix(layer, tensor):
    return (tensor.T if layer.fan_in_fan_out else tensor).flatten(1).detach()


def expected_update(W, delta, rank, top_k=10, threshold=0.5, remainder=0.75):
    """By the dense matrices."""
    U, S, Vh = torch.linalg.svd(W + delta, full_matrices=False)
    known = torch.linalg.svd(W, full_matrices=False).U
    update, count = delta.clone(), 0
    for i in range(min(top_k, len(S))):
        if (U[:, i] @ known).abs().max() < threshold:
            update += (remainder - 1) * S[i] * torch.outer(U[:, i], Vh[i])
            count += 1
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank], count


# -------------------------------------------------------------------------------------------------------- the mathematics


def test_worked_example():
    # W keeps to the axes. ΔW brings in the diagonal between two of them, with a singular value of 8.
    W, diagonal = torch.diag(torch.tensor([1.0, 1.0, 3.0])), torch.tensor([1.0, 1.0, 0.0]) / 2**0.5
    A, B = diagonal.view(1, 3), 7 * diagonal.view(3, 1)  # W adds 1
    new_A, new_B, intruders = mitigated(W, A, B, rank=1, top_k=1, threshold=0.8, remainder=0.5)
    assert intruders == 1
    torch.testing.assert_close(new_B @ new_A, (7 - 0.5 * 8) * torch.outer(diagonal, diagonal))
    torch.testing.assert_close(new_A.norm(), new_B.norm())


def test_without_intruders_the_factors_stay():
    W, A, B = torch.eye(3), torch.randn(1, 3), torch.randn(3, 1)
    assert mitigated(W, A, B, rank=1, top_k=3, threshold=0.0, remainder=0.5)[:2] == (A, B)


@pytest.mark.parametrize("rank", [2, 3, 5, 9])
def test_balanced_factors(rank):
    A, B = torch.randn(5, 7), torch.randn(4, 5)
    new_A, new_B = balanced(A, B, rank)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    assert (new_A.shape, new_B.shape) == ((rank, 7), (4, rank))
    torch.testing.assert_close(new_B @ new_A, (U[:, :rank] * S[:rank]) @ Vh[:rank])
    torch.testing.assert_close((new_A @ new_A.T).diagonal()[:4], S[:rank])
    torch.testing.assert_close((new_B.T @ new_B).diagonal()[:4], S[:rank])


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"mitigation_lambda": 0.0}, EVERYTHING], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name, options):
    options = {"threshold_epsilon": 0.75, **options}
    model = adapted(LAYERS[name]())
    layer = layer_of(model)
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    W, delta = matrix(layer, layer.weight), matrix(layer, layer.get_delta_weight("default"))
    lines = reduce(model, **options)
    expected, count = expected_update(
        W, delta, 2, options.get("top_k", 10), options["threshold_epsilon"], options.get("mitigation_lambda", 0.75)
    )
    found = matrix(layer, layer.get_delta_weight("intruder_reduced"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert lines[0] == f"base_model.model.layer: {count or 'no'} intruder dimensions"
    assert lines[1:] == ["The adapter 'intruder_reduced' is active now."]
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_stacked_experts():
    class Experts(nn.Module):
        def __init__(self, is_transposed):
            super().__init__()
            self.is_transposed = is_transposed
            self.weight = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x):
            return torch.einsum("bi,eoi->ebo", x, self.weight)

    for is_transposed in (False, True):
        model = adapted(Experts(is_transposed), target_modules=[], target_parameters=["layer.weight"])
        layer = layer_of(model)
        W, delta = layer.get_base_weight(), layer.get_delta_weight("default").detach()
        reduce(model, threshold_epsilon=0.75)
        found = layer.get_delta_weight("intruder_reduced")
        for expert in range(3):
            matrices = (W[expert].T, delta[expert].T) if is_transposed else (W[expert], delta[expert])
            expected, count = expected_update(*matrices, 2, threshold=0.75)
            expected = expected.T if is_transposed else expected
            torch.testing.assert_close(found[expert], expected, rtol=1e-4, atol=1e-4)


def test_attention():
    model = adapted(nn.MultiheadAttention(8, 2))
    layer = layer_of(model)
    W, delta = layer.get_base_weight().clone(), layer.get_delta_weight("default").detach()
    lines = reduce(model, threshold_epsilon=0.75)
    assert len(lines) == 3 and "out_proj" in lines[1]
    expected, _ = expected_update(W, delta, 2, threshold=0.75)
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), expected, rtol=1e-4, atol=1e-4)


def test_all_of_a_weak_adapter_stays():
    model = adapted(strength=0.01)
    assert reduce(model)[0] == "base_model.model.layer: no intruder dimensions"
    old, new = (get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "intruder_reduced"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_a_rank_above_the_size_of_the_layer():
    model = adapted(nn.Linear(9, 3), r=5)
    reduce(model, mitigation_lambda=0.0, **EVERYTHING)  # nothing of W + ΔW is left
    layer = layer_of(model)
    assert layer.lora_A["intruder_reduced"].weight.shape == (5, 9)
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), -layer.weight)


def test_the_scaling_is_what_the_configuration_gives():
    model = adapted(use_rslora=True)
    layer = layer_of(model)
    delta, W = layer.get_delta_weight("default").detach(), layer.weight.detach()
    layer.set_scale("default", 10)
    reduce(model, threshold_epsilon=0.75)
    expected, _ = expected_update(W, delta, 2, threshold=0.75)
    torch.testing.assert_close(layer.get_delta_weight("intruder_reduced"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    model = get_peft_model(
        Net().bfloat16(),
        LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False),
        autocast_adapter_dtype=autocast,
    )
    reduce(model, **EVERYTHING)
    weights = layer_of(model).lora_A
    assert weights["intruder_reduced"].weight.dtype == weights["default"].weight.dtype
    assert weights["default"].weight.dtype == (torch.float32 if autocast else torch.bfloat16)


# --------------------------------------------------------------------------------------------------------- the new adapter


def test_it_is_active_and_trains():
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    reduce(model, new_adapter_name="milder")
    assert model.active_adapters == ["milder"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.layer.lora_{factor}.milder.weight" for factor in "AB"
    }
    old, new = (model.peft_config[name].to_dict() for name in ("default", "milder"))
    assert old == new and not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def test_everything_else_of_the_adapter_is_copied():
    model = adapted(modules_to_save=["head"], lora_bias=True)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight += 1
        layer_of(model).lora_B["default"].bias += 1
    reduce(model, **EVERYTHING)
    old, new = (get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "intruder_reduced"))
    same = {key for key in old if torch.equal(old[key], new[key])}
    assert old.keys() == new.keys()
    assert old.keys() - same == {f"base_model.model.layer.lora_{factor}.weight" for factor in "AB"}
    assert new["base_model.model.head.weight"].data_ptr() != old["base_model.model.head.weight"].data_ptr()


def test_a_variant_that_is_plain_when_merged_keeps_what_it_has():
    model = adapted(monteclora_config=MontecloraConfig(num_samples=3))
    reduce(model, **EVERYTHING)
    samplers = layer_of(model).lora_monteclora_sampler
    assert torch.equal(samplers["default"].std_prior, samplers["intruder_reduced"].std_prior)


def test_it_can_be_saved_and_loaded(tmp_path):
    model, x = adapted(), torch.randn(3, 9)
    base = copy.deepcopy(layer_of(model).get_base_layer())
    reduce(model, **EVERYTHING)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(base), tmp_path / "intruder_reduced")
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_lines_and_bar_can_be_switched_off(capfd):
    reduce(adapted(), logging_sink=None)
    assert capfd.readouterr() == ("", "")
    reduce_intruder_dimension(adapted())
    out, err = capfd.readouterr()
    assert "base_model.model.layer: " in out and "Intruder dimensions" in err


# ----------------------------------------------------------------------------------------------------------- what is refused


def refused(model, message, **options):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs, active = list(model.peft_config), model.active_adapters
    with pytest.raises(ValueError, match=message):
        reduce(model, **options)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert (list(model.peft_config), model.active_adapters) == (configs, active)


def test_unknown_adapter():
    refused(adapted(), "no adapter 'defualt'; known are .*Did you mean 'default'", old_adapter_name="defualt")


def test_a_name_that_is_taken_or_cannot_be_used():
    refused(adapted(), "There is an adapter 'default' already", new_adapter_name="default")
    refused(adapted(), "contains '.'", new_adapter_name="a.b")


def test_negative_top_k():
    refused(adapted(), "top_k is a number of singular vectors, got -1", top_k=-1)


def test_other_methods():
    model = get_peft_model(Net(), IA3Config(target_modules=["layer"], feedforward_modules=[]))
    refused(model, "those of LoRA adapters, but 'default' is of the method IA3")


def test_variants_with_another_update():
    message = r"base_model.model.layer: the adapter 'default' is no plain LoRA adapter \(it has a DoraLinearVariant\)"
    refused(adapted(use_dora=True), message)


def test_grouped_convolutions():
    refused(adapted(nn.Conv2d(4, 6, 3, groups=2)), "base_model.model.layer: a convolution with 2 groups")


def test_merged_adapters():
    model = adapted()
    model.merge_adapter()
    refused(model, r"the adapters \['default'\] are merged into the base weight. Call unmerge_adapter\(\)")


def test_adapters_that_started_by_taking_a_part_of_the_base_weight():
    refused(adapted(init_lora_weights="pissa"), "started by taking a part of the base weight .*'pissa'")


def test_a_failure_at_the_end_leaves_the_model_as_it_was(monkeypatch):
    def fail(*args):
        raise ValueError("no room")

    model = adapted()
    monkeypatch.setattr("peft.tuners.lora.intruders.load_adapter_state", fail)
    refused(model, "no room")
