"""`add_weighted_adapter`: LoRA adapters combined into one."""

import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import BdLoraConfig, KasaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.combination import (
    COMBINATION_TYPES,
    OPERATORS,
    UPDATE_OPERATORS,
    clamped,
    combined_factors,
    concatenated,
    decomposed,
    decomposed_product,
    quantile,
)
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

A, B, C = "a", "b", "c"


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        result = self.layer(*args)
        return result[0] if isinstance(result, tuple) else result


class Mlp(nn.Module):
    """Three layers, of which the last is a head."""

    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=bias, dtype=dtype), nn.Linear(8, 8, bias=bias, dtype=dtype)
        self.head = nn.Linear(8, 4, dtype=dtype)

    def forward(self, x):
        return self.head(self.second(self.first(x)))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), lambda: [torch.randn(3, 12)]),
    "transformers Conv1D": (lambda: Conv1D(8, 12), lambda: [torch.randn(2, 3, 12)]),
    "embedding": (lambda: nn.Embedding(20, 8), lambda: [torch.randint(0, 20, (2, 5))]),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), lambda: [torch.randn(2, 6, 9)]),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=2), lambda: [torch.randn(2, 6, 9, 9)]),
    "conv2d pointwise": (lambda: nn.Conv2d(8, 8, 1), lambda: [torch.randn(2, 8, 5, 5)]),
    "conv2d grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), lambda: [torch.randn(2, 6, 5, 5)]),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 2, 2)), lambda: [torch.randn(2, 6, 5, 4, 4)]),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


@torch.no_grad()
def fill(model, names, std=0.3):
    """Random values in all adapters."""
    for name, parameter in model.named_parameters():
        if any(f".{adapter}" in name for adapter in names):
            parameter.normal_(std=std) if "magnitude" not in name else parameter.mul_(
                1 + 0.3 * torch.rand_like(parameter)
            )
    return model


def tuner_of(base, *options, names=(A, B, C)):
    """A tuner with one adapter per dictionary of options."""
    shared = {"r": 4, "target_modules": ["layer"], "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = LoraModel(base, LoraConfig(**(shared | options[0])), names[0])
        for name, other in zip(names[1:], options[1:]):
            tuner.peft_config[name] = LoraConfig(**(shared | other))
            tuner.inject_adapter(tuner.model, name)
    return fill(tuner.eval(), names)


def mlp(*options, **base_options):
    return tuner_of(Mlp(**base_options), *({"target_modules": ["first", "second"]} | entry for entry in options))


def output(tuner, adapter, inputs):
    tuner.set_adapter(adapter)
    with torch.no_grad():
        return tuner(*inputs)


def base_output(tuner, inputs):
    tuner.disable_adapter_layers()
    with torch.no_grad():
        result = tuner(*inputs)
    tuner.enable_adapter_layers()
    return result


def expected_sum(tuner, weights, inputs):
    """Base output plus the weighted terms, of a model with one layer."""
    base = base_output(tuner, inputs)
    return base + sum(w * (output(tuner, name, inputs) - base) for name, w in weights.items())


def snapshot(tuner):
    values = {name: value.clone() for name, value in tuner.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in tuner.named_parameters()}
    return values, flags, dict(tuner.peft_config), tuner.active_adapters


def assert_unchanged(tuner, before):
    values, flags, configs, active = snapshot(tuner)
    assert values.keys() == before[0].keys()
    assert all(torch.equal(values[name], before[0][name]) for name in values)
    assert (flags, configs, active) == before[1:]


# --------------------------------------------------------------------------------------------------- the mathematics


def test_concatenation_is_the_weighted_sum():
    As, Bs = [torch.randn(1, r, 5) for r in (2, 3)], [torch.randn(7, r) for r in (2, 3)]
    A_all, B_all = concatenated(As, Bs, [0.5, -2.0])
    assert A_all.shape == (1, 5, 5) and B_all.shape == (7, 5)
    torch.testing.assert_close(B_all @ A_all[0], 0.5 * Bs[0] @ As[0][0] - 2 * Bs[1] @ As[1][0])


def test_either_factor_takes_a_root_of_the_coefficient_and_a_its_sign():
    one = [torch.ones(1, 1, 1)] * 2
    a, b = combined_factors(OPERATORS["linear"], one, one, [4.0, -9.0])
    assert a.item() == 2 - 3 and b.item() == 2 + 3
    a, b = combined_factors(OPERATORS["linear"], one, one, [0.0, 1.0])
    assert (a.item(), b.item()) == (1, 1)


def test_ties_drops_what_is_small_or_outvoted():
    tasks = [torch.tensor([4.0, -1.0, 0.1, 3.0]), torch.tensor([2.0, 5.0, 0.2, -4.0])]
    merged = OPERATORS["ties"](tasks, [1.0, 0.5], density=0.75, majority_sign_method="total")
    # Elected are +, +, +, -; the smallest entry of each is dropped.
    torch.testing.assert_close(merged, torch.tensor([(4 + 0.5 * 2) / 2, 0.5 * 5, 0.0, 0.5 * -4]))


def test_decomposition_is_the_best_approximation_with_the_singular_values_in_b():
    update = torch.randn(6, 9)
    a, b = decomposed(update, 3)
    assert a.shape == (3, 9) and b.shape == (6, 3)
    torch.testing.assert_close(a @ a.T, torch.eye(3))
    error = torch.linalg.matrix_norm(update - b @ a)
    torch.testing.assert_close(error, torch.linalg.svdvals(update)[3:].norm())


def test_decomposing_a_product_does_not_need_the_product():
    b, a = torch.randn(2, 6, 3), torch.randn(2, 3, 9)
    few = decomposed_product(b, a, 2)
    many = decomposed(b @ a, 2)
    torch.testing.assert_close(few[1] @ few[0], many[1] @ many[0])


@pytest.mark.parametrize("share", [0.01, 0.5, 0.77, 1.0])
def test_clamping_limits_both_factors_to_a_quantile_of_all_entries(share):
    a, b = torch.randn(3, 7), torch.randn(5, 3)
    everything = torch.cat([a.flatten(), b.flatten()])
    torch.testing.assert_close(quantile(everything, share), torch.quantile(everything, share))
    if share > 0.5:
        limit = torch.quantile(everything, share)
        low, high = clamped(a, b, share)
        torch.testing.assert_close(low, a.clamp(-limit, limit))
        torch.testing.assert_close(high, b.clamp(-limit, limit))


# ------------------------------------------------------------------------------------------- on every kind of layer


@KINDS
@pytest.mark.parametrize("combination_type", ["cat", "svd"])
def test_the_weighted_sum_is_exact_where_the_rank_allows_it(kind, combination_type):
    build, inputs = LAYERS[kind]
    tuner, inputs = tuner_of(Net(build()), {"r": 4, "lora_alpha": 2}, {"r": 2, "lora_alpha": 3}), inputs()
    options = {} if combination_type == "cat" else {"svd_rank": 6}
    tuner.add_weighted_adapter([A, B], [0.7, -1.3], "w", combination_type, **options)
    layer = tuner.model.layer
    assert layer.r["w"] == 6 and layer.scaling["w"] == 1
    expected = expected_sum(tuner, {A: 0.7, B: -1.3}, inputs)
    torch.testing.assert_close(output(tuner, "w", inputs), expected, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
def test_every_type_works_on_every_kind(kind, combination_type):
    build, inputs = LAYERS[kind]
    tuner, inputs = tuner_of(Net(build()), {"lora_alpha": 2}, {"lora_alpha": 3}), inputs()
    options = {} if combination_type in ("cat", "linear", "svd") else {"density": 0.6}
    tuner.add_weighted_adapter([A, B], [0.7, 1.3], "w", combination_type, **options)
    result = output(tuner, "w", inputs)
    assert torch.isfinite(result).all()
    assert not torch.allclose(result, base_output(tuner, inputs))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "grouped" not in kind])
@pytest.mark.parametrize("combination_type", UPDATE_OPERATORS)
def test_types_with_svd_approximate_the_combined_update(kind, combination_type):
    """At full rank the adapter's update is the operator's result."""
    tuner = tuner_of(Net(LAYERS[kind][0]()), {}, {})
    layer = tuner.model.layer
    rank = min(layer.delta_weight(A).flatten(1).shape)
    torch.manual_seed(3)
    tuner.add_weighted_adapter([A, B], [0.7, 1.3], "w", combination_type, svd_rank=rank, density=1 - 1e-7)
    updates = [layer.delta_weight(name).flatten(1) for name in (A, B)]
    if "dare" in combination_type:
        updates = [update / (1 - 1e-7) for update in updates]
    options = {"density": 1 - 1e-7, "majority_sign_method": "total"}
    torch.manual_seed(3)
    expected = UPDATE_OPERATORS[combination_type](updates, [0.7, 1.3], **options)
    torch.testing.assert_close(layer.delta_weight("w").flatten(1), expected, rtol=1e-3, atol=1e-4)


def test_an_attention_layer_and_its_projection_are_combined():
    tuner = tuner_of(Net(nn.MultiheadAttention(8, 2, batch_first=True)), {"r": 2}, {"r": 3})
    for combination_type in ("cat", "svd"):
        tuner.add_weighted_adapter([A, B], [0.5, 2.0], combination_type, combination_type)
    for layer in (tuner.model.layer, tuner.model.layer.base_layer.out_proj):
        expected = 0.5 * layer.delta_weight(A) + 2 * layer.delta_weight(B)
        torch.testing.assert_close(layer.delta_weight("cat"), expected)
        assert layer.r["cat"] == 5 and layer.r["svd"] == 3
    x = torch.randn(2, 5, 8)
    assert output(tuner, "svd", [x, x, x]).shape == (2, 5, 8)


# --------------------------------------------------------------------------------------------------- the new adapter


def test_the_new_adapter_is_frozen_and_not_active():
    tuner = mlp({}, {})
    tuner.set_adapter(B)
    before = {name: value.clone() for name, value in tuner.state_dict().items()}
    assert tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "linear") is None
    assert tuner.active_adapters == [B]
    assert not any(parameter.requires_grad for name, parameter in tuner.named_parameters() if ".w." in name)
    assert all(torch.equal(tuner.state_dict()[name], value) for name, value in before.items())
    tuner.set_adapter("w")
    assert all(parameter.requires_grad == (".w." in name) for name, parameter in tuner.named_parameters())


def test_a_name_that_exists_changes_nothing():
    tuner = mlp({}, {})
    before = snapshot(tuner)
    tuner.add_weighted_adapter([A, "nobody"], [1.0], B, "no such type")
    assert_unchanged(tuner, before)


def test_the_configuration_is_the_firsts_with_one_rank_and_scaling_1():
    tuner = mlp({"lora_alpha": 5, "lora_dropout": 0.1}, {"rank_pattern": {"second": 7}, "alpha_pattern": {"first": 2}})
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "cat")
    config = tuner.peft_config["w"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (11, 11, {}, {})
    assert config.target_modules == {"first", "second"} and config.lora_dropout == 0.1
    assert tuner.peft_config[A].r == 4 and tuner.peft_config[B].rank_pattern == {"second": 7}
    assert tuner.model.first.lora_A["w"].weight[8:].eq(0).all()  # ranks 4 and 4 in room for 4 and 7


def test_one_adapter_is_rescaled():
    tuner = mlp({"lora_alpha": 3})
    tuner.add_weighted_adapter([A], [-2.0], "w", "ties", density=0.1)
    torch.testing.assert_close(tuner.model.first.delta_weight("w"), -2 * tuner.model.first.delta_weight(A))
    assert tuner.peft_config["w"].r == 4


def test_one_adapter_is_decomposed_if_another_rank_is_asked_for():
    tuner = mlp({})
    tuner.add_weighted_adapter([A], [1.0], "w", svd_rank=2)
    layer = tuner.model.first
    a, b = decomposed(layer.delta_weight(A), 2)
    assert layer.r["w"] == 2
    torch.testing.assert_close(layer.delta_weight("w"), b @ a)


def test_an_adapter_may_be_named_twice():
    tuner = mlp({})
    tuner.add_weighted_adapter([A, A], [1.0, 2.0], "w", "cat")
    torch.testing.assert_close(tuner.model.first.delta_weight("w"), 3 * tuner.model.first.delta_weight(A))


def test_layers_of_some_of_the_adapters_have_these():
    tuner = mlp({"target_modules": ["first"]}, {"target_modules": ["second"]})
    tuner.add_weighted_adapter([A, B], [2.0, 3.0], "w", "linear")
    assert tuner.peft_config["w"].target_modules == {"first", "second"}
    torch.testing.assert_close(tuner.model.first.delta_weight("w"), 2 * tuner.model.first.delta_weight(A))
    torch.testing.assert_close(tuner.model.second.delta_weight("w"), 3 * tuner.model.second.delta_weight(B))


def test_a_layer_of_none_of_the_adapters_gets_nothing():
    tuner = tuner_of(
        Mlp(), {"target_modules": ["first"]}, {"target_modules": "second"}, {"target_modules": "second|head"}
    )
    tuner.peft_config[B].target_modules = "second|head"  # selects more than it has adapted
    tuner.add_weighted_adapter([B], [1.0], "w")
    assert tuner.model.head.delta_weight("w").eq(0).all()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("first", "sec.*", "(first)|(sec.*)"),
        ("first|second", "first|second", "first|second"),
        ({"first"}, ["second", "first"], {"first", "second"}),
        (["first"], ("second",), {"first", "second"}),
    ],
)
def test_targets_are_the_union(first, second, expected):
    tuner = mlp({}, {})
    tuner.peft_config[A].target_modules, tuner.peft_config[B].target_modules = first, second
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "linear")
    assert tuner.peft_config["w"].target_modules == expected
    assert "w" in tuner.model.first.lora_A and "w" in tuner.model.second.lora_A


def test_targets_are_spelt_out_where_the_adapters_narrow_them_differently():
    tuner = mlp({"exclude_modules": ["second"]}, {"exclude_modules": ["first"]})
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "linear")
    config = tuner.peft_config["w"]
    assert config.target_modules == {"first", "second"} and config.exclude_modules is None
    torch.testing.assert_close(tuner.model.second.delta_weight("w"), tuner.model.second.delta_weight(B))


def test_ranks_that_differ_on_a_layer_are_padded():
    tuner = mlp({"r": 2, "rank_pattern": {"first": 4}}, {"r": 4})
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "linear")
    layer = tuner.model.second
    root = [layer.scaling[name] ** 0.5 for name in (A, B)]
    torch.testing.assert_close(
        layer.lora_A["w"].weight[:2],
        root[0] * layer.lora_A[A].weight + root[1] * layer.lora_A[B].weight[:2],
    )
    torch.testing.assert_close(layer.lora_A["w"].weight[2:], root[1] * layer.lora_A[B].weight[2:])


def test_a_default_svd_rank_above_the_layers_size_is_padded():
    tuner = tuner_of(Net(nn.Linear(3, 8)), {"r": 6}, {"r": 6})
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w")
    layer = tuner.model.layer
    assert layer.r["w"] == 6 and layer.lora_A["w"].weight[3:].eq(0).all()
    torch.testing.assert_close(layer.delta_weight("w"), layer.delta_weight(A) + layer.delta_weight(B))


@pytest.mark.parametrize("combination_type", ["cat", "linear", "svd"])
def test_padding_for_hotswapping_is_left_out(combination_type):
    tuners = [mlp({"r": 2}, {"r": 2}) for _ in range(2)]
    tuners[1].load_state_dict(tuners[0].state_dict())
    prepare_model_for_compiled_hotswap(tuners[1].model, target_rank=5)
    updates = []
    for tuner in tuners:
        tuner.add_weighted_adapter([A, B], [1.0, 0.5], "w", combination_type)
        updates.append(tuner.model.first.delta_weight("w"))
    assert tuners[1].model.first.lora_A[A].weight.shape[0] == 5
    torch.testing.assert_close(*updates)


def test_svd_clamp_bounds_the_entries():
    tuner = mlp({}, {})
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "svd")
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "clamped", "svd", svd_clamp=0.8)
    layer = tuner.model.first
    free = torch.cat([layer.lora_A["w"].weight.flatten(), layer.lora_B["w"].weight.flatten()])
    limit = torch.quantile(free, 0.8)
    torch.testing.assert_close(layer.lora_B["clamped"].weight, layer.lora_B["w"].weight.clamp(-limit, limit))


def test_the_same_seed_drops_the_same_entries():
    tuners = [mlp({}, {}) for _ in range(2)]
    tuners[1].load_state_dict(tuners[0].state_dict())
    for tuner in tuners:
        torch.manual_seed(5)
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "dare_ties", density=0.5)
    one, other = (tuner.model.second.delta_weight("w") for tuner in tuners)
    assert torch.equal(one, other)


def test_rslora_does_not_scale_the_combination():
    tuner = mlp({"use_rslora": True}, {"use_rslora": True})
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "cat")
    assert tuner.model.first.scaling["w"] == 1 and not tuner.peft_config["w"].use_rslora
    layer = tuner.model.first
    torch.testing.assert_close(layer.delta_weight("w"), layer.delta_weight(A) + layer.delta_weight(B))


def test_half_precision_adapters_are_combined_in_float32():
    tuner = mlp({}, {}, dtype=torch.bfloat16)
    tuner.add_weighted_adapter([A, B], [1.0, 0.5], "low", "ties_svd", density=0.5)
    assert tuner.model.first.lora_A["low"].weight.dtype == torch.bfloat16
    for name in (A, B):
        tuner._cast_adapter_dtype(name)
    tuner.add_weighted_adapter([A, B], [1.0, 0.5], "w", "cat")
    layer = tuner.model.first
    assert layer.lora_A["w"].weight.dtype == torch.float32
    torch.testing.assert_close(layer.delta_weight("w"), layer.delta_weight(A) + 0.5 * layer.delta_weight(B))


def test_a_base_weight_that_a_start_has_changed_is_not_changed_again():
    tuner = mlp({"init_lora_weights": "pissa"}, {})
    before = tuner.model.first.get_base_weight().clone()
    with pytest.warns(UserWarning, match=r"start of the adapters \['a'\] has changed the base weights.*'w'"):
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "cat")
    assert tuner.peft_config["w"].init_lora_weights is True
    assert torch.equal(tuner.model.first.get_base_weight(), before)
    layer = tuner.model.first
    torch.testing.assert_close(layer.delta_weight("w"), layer.delta_weight(A) + layer.delta_weight(B))


def test_merged_adapters_stay_merged():
    tuner, x = mlp({}, {}), [torch.randn(3, 6)]
    tuner.merge_adapter([A])
    merged = tuner(*x)
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "svd")
    assert torch.equal(tuner(*x), merged)


def test_replicated_layers_are_not_replicated_again():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Net(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Stack()

        def forward(self, x):
            return self.model(x)

    tuner = tuner_of(Model(), {"layer_replication": [[0, 2], [1, 2]]})
    assert len(tuner.model.model.layers) == 3
    tuner.add_weighted_adapter([A], [1.0], "w")
    assert len(tuner.model.model.layers) == 3
    assert tuner.peft_config["w"].layer_replication == [[0, 2], [1, 2]]


def test_biases_are_combined_with_their_scalings():
    tuner = mlp({"lora_bias": True, "lora_alpha": 2}, {"lora_bias": True}, {})
    layer, x = tuner.model.first, torch.randn(3, 6)
    tuner.add_weighted_adapter([A, B, C], [2.0, -1.0, 1.0], "w", "cat")
    bias = 2 * layer.scaling[A] * layer.lora_B[A].bias - layer.scaling[B] * layer.lora_B[B].bias
    torch.testing.assert_close(layer.lora_B["w"].bias, bias)
    base = layer.base_layer(x)
    terms = [output(tuner.model.first, name, [x]) - base for name in (A, B, C)]
    torch.testing.assert_close(
        output(layer, "w", [x]), base + 2 * terms[0] - terms[1] + terms[2], rtol=1e-4, atol=1e-5
    )
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "ties", "ties", density=1 - 1e-7)
    assert layer.lora_B["ties"].bias.ne(0).any()
    single = mlp({"lora_bias": True, "target_modules": ["first"]}, {"target_modules": ["second"]})
    single.add_weighted_adapter([A, B], [1.0, 1.0], "w", "linear")
    assert single.model.second.lora_B["w"].bias.eq(0).all()


# ------------------------------------------------------------------------------------------------------ variants


@KINDS
def test_dora_keeps_its_magnitudes(kind):
    build, inputs = LAYERS[kind]
    tuner, inputs = tuner_of(Net(build()), {"use_dora": True}), inputs()
    tuner.add_weighted_adapter([A], [1.0], "w")
    torch.testing.assert_close(output(tuner, "w", inputs), output(tuner, A, inputs), rtol=1e-4, atol=1e-5)
    tuner.add_weighted_adapter([A], [0.0], "none")
    torch.testing.assert_close(output(tuner, "none", inputs), base_output(tuner, inputs), rtol=1e-4, atol=1e-5)


def test_changes_of_magnitude_add_up_also_with_plain_adapters():
    tuner = mlp({}, {"use_dora": True}, {"use_dora": True})
    tuner.add_weighted_adapter([A, B, C], [1.0, 0.5, 2.0], "w", "cat")
    layer = tuner.model.first
    assert tuner.peft_config["w"].use_dora
    base = layer.get_base_weight().norm(dim=1)
    plain = (layer.get_base_weight() + layer.delta_weight(A)).norm(dim=1)
    m = {name: layer.lora_magnitude_vector[name].weight for name in (B, C, "w")}
    torch.testing.assert_close(m["w"], base + (plain - base) + 0.5 * (m[B] - base) + 2 * (m[C] - base))


def test_block_diagonal_factors_are_combined_as_they_are_or_decomposed():
    blocks = BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["second"], nblocks=2)
    tuner = mlp({"use_bdlora": blocks}, {"use_bdlora": blocks})
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "linear", "linear")
    layer = tuner.model.first
    torch.testing.assert_close(
        layer.lora_A["linear"].weight, sum(layer.scaling[name] ** 0.5 * layer.lora_A[name].weight for name in (A, B))
    )
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "svd", "svd", svd_rank=6)
    assert tuner.peft_config["svd"].use_bdlora is None and tuner.peft_config["linear"].use_bdlora == blocks
    for layer in (tuner.model.first, tuner.model.second):
        update = layer.delta_weight(A) + layer.delta_weight(B)
        a, b = decomposed(update, 6)
        torch.testing.assert_close(layer.delta_weight("svd"), b @ a, rtol=1e-4, atol=1e-5)


def test_kasa_adapters_are_decomposed_and_the_base_weight_is_left_alone():
    tuner = mlp({"kasa_config": KasaConfig(), "r": 2}, {"kasa_config": KasaConfig(), "r": 2})
    layer = tuner.model.first
    before = layer.get_base_weight().clone()
    update = layer.delta_weight(A) - layer.delta_weight(B)
    tuner.add_weighted_adapter([A, B], [1.0, -1.0], "w", "svd")
    assert torch.equal(layer.get_base_weight(), before)
    assert layer.lora_diag["w"].eq(1).all()
    a, b = decomposed(update, 2)
    torch.testing.assert_close(layer.delta_weight("w"), b @ a, rtol=1e-4, atol=1e-5)


def test_kasa_adapters_combine_to_what_their_base_weight_is_truncated_for():
    tuner = mlp({"kasa_config": KasaConfig(), "r": 2}, {"kasa_config": KasaConfig(), "r": 3})
    before = tuner.model.first.get_base_weight().clone()
    with pytest.raises(
        ValueError, match="as much out of the base weight: that is 3, the combination's is 2. Pass svd_rank"
    ):
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "svd", svd_rank=2)
    tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "svd")
    assert tuner.peft_config["w"].r == 3 and torch.equal(tuner.model.first.get_base_weight(), before)


# ------------------------------------------------------------------------------------- modules that train in full


def test_the_copy_of_a_module_is_taken_over():
    tuner, x = mlp({}, {"modules_to_save": ["head"]}), [torch.randn(2, 6)]
    tuner.add_weighted_adapter([A, B], [0.0, 1.0], "w", "cat")
    assert tuner.peft_config["w"].modules_to_save == ["head"]
    torch.testing.assert_close(output(tuner, "w", x), output(tuner, B, x))
    assert tuner.model.head.modules_to_save["w"].weight is not tuner.model.head.modules_to_save[B].weight


def test_rows_of_an_embedding_are_taken_over():
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6))
    tokens = {"target_modules": ["1"], "trainable_token_indices": {"0": [2, 4]}}
    tuner = tuner_of(net, {"target_modules": ["1"]}, tokens)
    tuner.add_weighted_adapter([A, B], [0.0, 1.0], "w", "cat")
    ids = [torch.arange(9)[None]]
    torch.testing.assert_close(output(tuner, "w", ids), output(tuner, B, ids))


# --------------------------------------------------------------------------------------------------------- files


def test_a_combination_is_saved_and_loaded_like_any_adapter(tmp_path):
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["first", "second"], r=3, use_rslora=True))
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=2))
    fill(model, ["default", "other"])
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "w", combination_type="cat")
    model.set_adapter("w")
    x = torch.randn(2, 6)
    expected = model.eval()(x)
    model.save_pretrained(tmp_path, selected_adapters=["w"])
    base = model.unload()
    again = PeftModel.from_pretrained(base, tmp_path / "w")
    torch.testing.assert_close(again(x), expected)


# -------------------------------------------------------------------------------------------------------- errors


REFUSED = {
    "unknown adapter": ([A, "bb"], [1, 1], {}, ValueError, r"no adapter 'bb'; known are \['a', 'b', 'c'\].* 'b'"),
    "number of weights": ([A, B], [1], {}, ValueError, r"2 adapters \['a', 'b'\] and 1 weights"),
    "no adapter": ([], [], {}, ValueError, "0 adapters"),
    "bad name": ([A], [1], {"adapter_name": "x.y"}, ValueError, "'x.y' can't be the name of an adapter"),
    "unknown type": ([A, B], [1, 1], {"combination_type": "tie"}, ValueError, "combination_type='tie'.* 'ties'"),
    "ranks": ([A, C], [1, 1], {"combination_type": "linear"}, ValueError, r"one rank, got \{'a': 4, 'c': 6\}.*'cat'"),
    "no density": ([A, B], [1, 1], {"combination_type": "ties"}, TypeError, "'ties' needs a density"),
    "density": ([A, B], [1, 1], {"combination_type": "dare_linear", "density": -1}, ValueError, "density.*got -1"),
    "sign": (
        [A, B],
        [1, 1],
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "totla"},
        RuntimeError,
        "majority_sign_method='totla'.* 'total'",
    ),
    "svd_rank": ([A, B], [1, 1], {"svd_rank": 7}, ValueError, "svd_rank=7 does not fit 'first': there.* at most 6"),
    "svd_rank zero": ([A, B], [1, 1], {"svd_rank": 0}, ValueError, "svd_rank must be positive, got 0"),
    "svd_clamp": ([A, B], [1, 1], {"svd_clamp": 1.5}, ValueError, "svd_clamp.*got 1.5"),
    "svd_driver": (
        [A, B],
        [1, 1],
        {"combination_type": "ties_svd", "density": 0.5, "svd_driver": "x"},
        RuntimeError,
        "",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(case):
    adapters, weights, options, error, match = REFUSED[case]
    tuner = mlp({}, {}, {"r": 6})
    before = snapshot(tuner)
    with pytest.raises(error, match=match):
        tuner.add_weighted_adapter(adapters, weights, **({"adapter_name": "w"} | options))
    assert_unchanged(tuner, before)


def test_svd_rank_must_divide_among_the_groups():
    tuner = tuner_of(Net(nn.Conv2d(6, 8, 3, groups=2)), {}, {})
    with pytest.raises(
        ValueError, match="svd_rank=3 does not fit 'layer': there it must be at most 8 and a multiple of 2"
    ):
        tuner.add_weighted_adapter([A, B], [1, 1], "w", svd_rank=3)


BLOCKS = BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["second"], nblocks=2)
VARIANTS = {
    "aLoRA": (
        {"alora_invocation_tokens": [1]},
        {"alora_invocation_tokens": [2]},
        "linear",
        "invoked by the same tokens",
    ),
    "KaSA": ({"kasa_config": KasaConfig(), "r": 2},) * 2 + ("linear", "do not add up; use.*svd.*'a': KasaConfig"),
    "blocks": ({"use_bdlora": BLOCKS}, {}, "linear", "other blocks do not add up"),
    "blocks beside blocks": ({"use_bdlora": BLOCKS}, {"use_bdlora": BLOCKS}, "cat", "cannot be put side by side"),
    "DoRA and bias": (
        {"use_dora": True},
        {"lora_bias": True},
        "cat",
        "lora_bias cannot be combined with one with use_dora",
    ),
}


@pytest.mark.filterwarnings("ignore:alora_invocation_tokens")
@pytest.mark.parametrize("case", VARIANTS)
def test_variants_that_do_not_go_together_are_refused(case):
    first, second, combination_type, match = VARIANTS[case]
    tuner = mlp(first, second)
    before = snapshot(tuner)
    with pytest.raises(ValueError, match=match):
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", combination_type)
    assert_unchanged(tuner, before)


def test_an_arrow_router_cannot_be_combined():
    tuner = mlp({}, {})
    tuner.peft_config[B].arrow_config = object()
    with pytest.raises(ValueError, match="an Arrow router has no update of its own"):
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w")


def test_targets_of_other_types_are_refused():
    tuner = mlp({}, {})
    tuner.peft_config[B].target_modules = 3
    with pytest.raises(TypeError, match="target_modules of the adapter 'b' must be a string or a collection.* int"):
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w")
    tuner.peft_config[B].target_modules = "first|second"
    with pytest.raises(ValueError, match="partly regular expressions and partly lists"):
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w")


def test_adapters_of_bare_parameters_are_refused():
    tuner = tuner_of(Mlp(), {"target_modules": None, "target_parameters": ["first.weight"]})
    with pytest.raises(ValueError, match=r"'a' adapts bare parameters \(target_parameters=\['first.weight'\]\)"):
        tuner.add_weighted_adapter([A], [1.0], "w")


def test_two_copies_of_one_module_are_refused():
    tuner = mlp({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]})
    with pytest.raises(ValueError, match=r"\['a', 'b'\] each have their own copy of the module 'head'"):
        tuner.add_weighted_adapter([A, B], [1.0, 1.0], "w", "cat")
