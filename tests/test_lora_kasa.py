"""KaSA: an update with singular values of its own, on a base weight without its smallest singular components."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft import (
    KasaConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.engine.undo import Undo, when_done
from peft.tuners.lora.kasa import penalty, removed_from, restore_base_weights, smallest_directions
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap


class Net(nn.Module):
    """Two linear layers of different sizes and one that is left alone."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)
        self.other = nn.Linear(5, 3)
        self.to(dtype)

    def forward(self, x):
        return self.other(self.second(self.first(x).tanh()).tanh())


KINDS = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(3, 6)),
    "conv1d_transformers": (lambda: Conv1D(8, 6), lambda: torch.randn(3, 2, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.tensor([[0, 3, 6], [1, 1, 2]])),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 2, padding_mode="circular", padding=1), lambda: torch.randn(2, 3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: torch.randn(2, 2, 3, 3, 3)),
}


def config(**options):
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"], "init_lora_weights": False, **options}
    return LoraConfig(**{"kasa_config": KasaConfig(), **options})


def adapted(model=None, adapter="default", **options):
    model = Net() if model is None else model
    return get_peft_model(model, config(**options), adapter).eval()


def on(kind, **options):
    """A model with one layer of a kind, its inputs, and the base weight that it had as (out, in)."""
    make, inputs = KINDS[kind]
    base = make()
    weight = matrix(base)
    return get_peft_model(nn.Sequential(base), config(target_modules=["0"], **options)).eval(), inputs(), weight


def matrix(layer):
    weight = layer.weight.detach().clone()
    return weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else weight.flatten(1)


def truncated(weight, rank):
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    kept = len(S) - rank
    return U[:, :kept] * S[:kept] @ Vh[:kept]


def base_weights(model):
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name.endswith("weight") and "lora" not in name
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def x_of(rows=4, dtype=torch.float32):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(3)).to(dtype)


def out(model, x=None, **kwargs):
    with torch.no_grad():
        return model(x_of() if x is None else x, **kwargs)


# ------------------------------------------------------------------------------------------------------- the mathematics


def test_worked_example():
    base = nn.Sequential(nn.Linear(3, 3, bias=False))
    base[0].weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    model = adapted(base, target_modules=["0"], r=1, lora_alpha=2)
    layer = model.base_model.model[0]
    torch.testing.assert_close(layer.weight.data, torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    layer.lora_A["default"].weight.data = torch.tensor([[1.0, 0.0, 2.0]])
    layer.lora_B["default"].weight.data = torch.tensor([[1.0], [0.0], [-1.0]])
    layer.lora_diag["default"].data = torch.tensor([0.5])
    # A·x = 3, times d 1.5, B and s = 2: (3, 0, -3)
    torch.testing.assert_close(out(model, torch.ones(1, 3)), torch.tensor([[6.0, 2.0, -3.0]]))
    delta = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [-1.0, 0.0, -2.0]])
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_the_smallest_directions_are_orthonormal_and_carry_least():
    weight = torch.randn(7, 5)
    directions = smallest_directions(weight, 2)
    torch.testing.assert_close(directions @ directions.T, torch.eye(2))
    torch.testing.assert_close((weight @ directions.T).norm(dim=0), torch.linalg.svdvals(weight)[-2:])
    assert directions.untyped_storage().nbytes() == directions.numel() * 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    model, x, weight = on(kind)
    layer = model.base_model.model[0]
    base = layer.base_layer
    torch.testing.assert_close(matrix(base), truncated(weight, 2), rtol=1e-5, atol=1e-6)
    state = get_peft_model_state_dict(model)
    assert state["base_model.model.0.lora_diag"].shape == (2,)
    A, B = layer.factors("default")
    delta = 1.5 * (B.flatten(1) * layer.lora_diag["default"]) @ A.flatten(1)
    torch.testing.assert_close(layer.delta_weight("default").flatten(1), delta)
    expected, plain = out(model, x), base(x)
    assert not torch.allclose(expected, plain)
    before = base.weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(out(model, x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matrix(base), truncated(weight, 2) + delta.detach(), rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


def test_a_grouped_convolution_can_be_used_but_not_merged():
    model = get_peft_model(
        nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), config(target_modules=["0"], init_lora_weights=True)
    )
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(out(model.eval(), x), model.base_model.model[0].base_layer(x))  # B is zero
    with pytest.raises(NotImplementedError, match="groups"):
        model.merge_adapter()


def test_a_fresh_adapter_draws_its_singular_values_and_starts_as_the_truncated_base():
    torch.manual_seed(5)
    model = adapted(r=4, init_lora_weights=True, target_modules=["first"])
    layer = model.base_model.model.first
    torch.testing.assert_close(out(layer, x_of()), layer.base_layer(x_of()))
    assert layer.lora_diag["default"].std() > 0.1
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        f"base_model.model.first.{name}"
        for name in ("lora_A.default.weight", "lora_B.default.weight", "lora_diag.default")
    }


def test_dtypes():
    model = get_peft_model(Net(torch.bfloat16), config())
    layer = model.base_model.model.first
    assert layer.lora_diag["default"].dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    expected = truncated(Net(torch.bfloat16).first.weight.data, 2).bfloat16()
    torch.testing.assert_close(layer.weight.data, expected, rtol=1e-2, atol=1e-2)
    assert out(model, x_of(dtype=torch.bfloat16)).dtype == torch.bfloat16
    kept = get_peft_model(Net(torch.bfloat16), config(), autocast_adapter_dtype=False).base_model.model.first
    assert kept.lora_diag["default"].dtype == torch.bfloat16
    delta = (kept.lora_B["default"].weight.float() * kept.lora_diag["default"].float()) @ kept.lora_A[
        "default"
    ].weight.float()
    assert torch.equal(kept.get_delta_weight("default"), 1.5 * delta.bfloat16())
    double = get_peft_model(Net(torch.float64), config()).base_model.model.first
    assert double.weight.dtype == torch.float64 and torch.linalg.svdvals(double.weight)[-2:].max() < 1e-12


def test_dropout_and_bias():
    model = adapted(lora_dropout=0.5, lora_bias=True)
    layer = model.base_model.model.first
    nn.init.normal_(layer.lora_B["default"].bias)
    expected = out(model)
    model.merge_adapter()
    torch.testing.assert_close(out(model), expected)
    model.unmerge_adapter()
    assert not torch.allclose(out(model.train()), expected)


def test_training_moves_the_singular_values():
    model = adapted(init_lora_weights=False).train()
    model(x_of()).square().sum().backward()
    layer = model.base_model.model.first
    assert layer.lora_diag["default"].grad.any() and layer.base_layer.weight.grad is None


def test_it_compiles_as_one_graph():
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_of()), model(x_of()))


def test_a_mixed_batch_is_row_for_row_what_its_adapters_give():
    model = adapted()
    model.add_adapter("other", config())
    x, names = x_of(3), ["other", "__base__", "default"]
    mixed = out(model.eval(), x, adapter_names=names)
    torch.testing.assert_close(mixed[2], out(model, x)[2])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], out(model, x)[1])
    model.set_adapter("other")
    torch.testing.assert_close(mixed[0], out(model, x)[0])


# ------------------------------------------------------------------------------------------------ saving and loading


def test_a_reload_truncates_the_base_again_and_gives_the_same(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(Net(), tmp_path, **options)
        assert same(base_weights(loaded), base_weights(model))
        torch.testing.assert_close(out(loaded), out(model))
    other = adapted()
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    torch.testing.assert_close(out(other), out(model))


def test_without_memory_for_the_start_it_is_the_same():
    eager = adapted()
    lazy = get_peft_model(Net(), config(), low_cpu_mem_usage=True)
    assert lazy.base_model.model.first.lora_diag["default"].is_meta
    assert same(base_weights(lazy), base_weights(eager))
    set_peft_model_state_dict(lazy, get_peft_model_state_dict(eager), low_cpu_mem_usage=True)
    assert not any(value.is_meta for value in lazy.parameters())
    torch.testing.assert_close(out(lazy.eval()), out(eager))


def on_meta():
    """A model whose base weights are to be loaded yet, and the adapter that is on them."""
    eager = adapted()
    with torch.device("meta"):
        base = Net()
    lazy = get_peft_model(base, config(), low_cpu_mem_usage=True)
    set_peft_model_state_dict(lazy, get_peft_model_state_dict(eager), low_cpu_mem_usage=True)
    return eager, lazy.eval()


def fill(model):
    values = {
        f"base_model.model.{name}".replace("first.", "first.base_layer.").replace(
            "second.", "second.base_layer."
        ): value
        for name, value in Net().state_dict().items()
    }
    model.load_state_dict(values, strict=False, assign=True)


@pytest.mark.parametrize("names", [None, ["default", "__base__", "default", "default"]], ids=["plain", "mixed"])
def test_a_base_that_is_loaded_later_is_truncated_when_it_is_called(names):
    eager, lazy = on_meta()
    fill(lazy)
    assert not same(base_weights(lazy), base_weights(eager))
    kwargs = {} if names is None else {"adapter_names": names}
    torch.testing.assert_close(out(lazy, **kwargs), out(eager, **kwargs))
    assert same(base_weights(lazy), base_weights(eager))
    assert not lazy.base_model.model.first._forward_pre_hooks
    torch.testing.assert_close(out(lazy), out(eager))


@pytest.mark.parametrize("safe", [True, False])
def test_a_base_that_is_loaded_later_is_truncated_when_it_is_merged(safe):
    eager, lazy = on_meta()
    fill(lazy)
    lazy.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(out(lazy), out(eager))
    lazy.unmerge_adapter()
    assert same(base_weights(lazy), base_weights(eager))
    torch.testing.assert_close(out(copy.deepcopy(lazy)), out(eager))


def test_copies_of_a_model_that_waits_for_its_base():
    eager, lazy = on_meta()
    for model in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        fill(model)
        torch.testing.assert_close(out(model), out(eager))
        assert not model.base_model.model.first._forward_pre_hooks


def test_a_base_without_values_cannot_be_used():
    _, lazy = on_meta()
    layer = lazy.base_model.model.first
    for attempt in (lambda: layer(x_of()), lazy.merge_adapter):
        with pytest.raises(RuntimeError, match="(first|second): KaSA takes the 2 smallest.*meta device"):
            attempt()


# --------------------------------------------------------------------------------------------------- whole or not at all


def test_a_failed_injection_leaves_the_base_bit_for_bit():
    model = Net()
    before = base_weights(model)
    with pytest.raises(ValueError, match=r"second.*'default'.*r=5.*has 5\. The largest rank here is 4"):
        get_peft_model(model, config(r=5))
    assert same(base_weights(model), before)
    with pytest.raises(ValueError, match="Loss"):
        with Undo():
            get_peft_model(Net(), config())  # fails around it
            raise ValueError("Loss")


def test_a_second_adapter_that_fails_leaves_what_there_is():
    model = adapted()
    before, expected = base_weights(model), out(model)
    with pytest.raises(ValueError, match="second.*'b'.*r=7"):
        model.add_adapter("b", config(r=3, rank_pattern={"second": 7}))
    assert same(base_weights(model), before) and torch.equal(out(model), expected)
    assert len(removed_from(model.base_model.model.first)) == 1


def test_a_failed_load_leaves_the_base_bit_for_bit(tmp_path):
    adapted(r=3).save_pretrained(tmp_path)
    smaller = Net()
    smaller.second = nn.Linear(8, 4)
    smaller.other = nn.Linear(4, 3)
    before = base_weights(smaller)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(smaller, tmp_path)
    assert same(base_weights(smaller), before)
    model = adapted()
    before = base_weights(model)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"r": 3', '"r": 4')
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "b")
    assert same(base_weights(model), before) and list(model.peft_config) == ["default"]


def test_what_is_put_off_is_done_at_the_end_of_the_outermost_block():
    done = []
    when_done(done.append, "at once")
    with Undo():
        with Undo():
            when_done(done.append, "later")
        assert done == ["at once"]
    assert done == ["at once", "later"]
    with pytest.raises(ValueError), Undo():
        when_done(done.append, "never")
        raise ValueError
    assert done == ["at once", "later"]


@pytest.mark.parametrize("kasa_first", [True, False])
def test_adapters_without_kasa_are_refused_beside_it(kasa_first):
    plain = config(kasa_config=None)
    model = get_peft_model(Net(), config() if kasa_first else plain)
    before, expected = base_weights(model), out(model)
    pattern = "does not use KaSA, while .'default'. do" if kasa_first else "uses KaSA, while .'default'. do not"
    with pytest.raises(ValueError, match=pattern):
        model.add_adapter("b", plain if kasa_first else config())
    assert same(base_weights(model), before) and torch.equal(out(model), expected)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kasa_first", [True, False])
def test_other_methods_are_refused_beside_it(kasa_first):
    other = LoHaConfig(target_modules=["first"])
    model = get_peft_model(Net(), config() if kasa_first else other, mixed=True)
    before = base_weights(model)
    with pytest.raises(ValueError, match="all adapters of a model use it or none does"):
        model.add_adapter("b", other if kasa_first else config())
    assert same(base_weights(model), before)


def test_a_weight_with_something_merged_into_it_is_not_truncated():
    model = adapted()
    model.merge_adapter()
    model.add_adapter("same", config())  # takes nothing more out
    with pytest.raises(ValueError, match=r"first: KaSA changes the base weight, but \['default'\] are merged"):
        model.add_adapter("b", config(r=3))
    with pytest.raises(ValueError, match=r"\['default'\] are merged"):
        restore_base_weights(model)
    assert sorted(model.peft_config) == ["default", "same"]


@pytest.mark.parametrize("field", ["beta", "gamma"])
def test_negative_weights_of_the_penalty_are_refused(field):
    with pytest.raises(ValueError, match="must not be negative.*-1"):
        KasaConfig(**{field: -1.0})


def test_another_variant_at_once_and_attention_are_refused():
    with pytest.raises(ValueError, match="first does not support kasa_config with use_dora"):
        adapted(use_dora=True)
    with pytest.raises(ValueError, match="0 does not support kasa_config"):
        get_peft_model(nn.Sequential(nn.MultiheadAttention(4, 2)), config(target_modules=["0"]))


# -------------------------------------------------------------------------------------------------- the truncated base


def test_the_truncated_weight_is_the_base_until_it_is_restored():
    base = Net()
    original, expected = base_weights(base), out(base)
    model = adapted(base)
    truncated_weights = base_weights(model)
    with model.disable_adapter():
        disabled = out(model)
    assert not torch.allclose(disabled, expected)
    plain = copy.deepcopy(model).unload()
    assert torch.equal(out(plain), disabled)
    model.add_adapter("b", config())
    model.delete_adapter("default")
    assert same(base_weights(model), truncated_weights)
    restore_base_weights(model)
    plain = model.unload()
    torch.testing.assert_close(out(plain), expected)
    for name, value in base_weights(plain).items():
        torch.testing.assert_close(value, original[name], rtol=1e-5, atol=1e-6)


def test_restoring_goes_back_over_several_adapters_and_leaves_other_models_alone():
    base = Net()
    original = base_weights(base)
    model = adapted(base)
    model.add_adapter("b", config(r=4))
    restore_base_weights(model)
    restore_base_weights(model)
    for name, value in base_weights(model.unload()).items():
        torch.testing.assert_close(value, original[name], rtol=1e-5, atol=1e-6)
    plain = get_peft_model(Net(), config(kasa_config=None))
    before = base_weights(plain)
    restore_base_weights(plain)
    assert same(base_weights(plain), before)


def test_adapters_of_no_larger_rank_take_nothing_more_out():
    model = adapted(r=3)
    before, expected = base_weights(model), out(model)
    model.add_adapter("same", config(r=3))
    model.add_adapter("smaller", config(r=1))
    model.delete_adapter("smaller")
    model.add_adapter("smaller", config(r=2))
    assert same(base_weights(model), before) and torch.equal(out(model), expected)


def test_an_adapter_of_a_larger_rank_takes_more_out():
    model = adapted()
    model.add_adapter("larger", config(r=4))
    expected = truncated(Net().first.weight.data, 4)
    torch.testing.assert_close(model.base_model.model.first.weight.data, expected, rtol=1e-5, atol=1e-6)
    assert [len(V) for V, _ in removed_from(model.base_model.model.first)] == [2, 4]


@pytest.mark.compat
def test_a_weight_that_layers_share_is_truncated_once():
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(small)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = get_peft_model(base, config(target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)]))
    layers = model.base_model.model.model.layers
    assert len(layers) == 2 and layers[0].self_attn.q_proj.weight is layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(layers[1].self_attn.q_proj.weight.data, truncated(weight, 2), rtol=1e-5, atol=1e-6)


def test_injected_without_a_peft_model():
    model = inject_adapter_in_model(config(), Net())
    torch.testing.assert_close(model.first.weight.data, truncated(Net().first.weight.data, 2), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the penalty


def test_the_penalty_by_hand():
    A, B, d = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0], [0.0]]), torch.tensor([2.0])
    # d² = 4, BᵀB - 1 = 8, AAᵀ - 1 = 1
    torch.testing.assert_close(penalty(A, B, d, KasaConfig(beta=0.5, gamma=0.1)), torch.tensor(2.0 + 0.9))
    half = penalty(A.bfloat16(), B.bfloat16(), d.bfloat16(), KasaConfig(beta=0.5, gamma=0.1))
    assert half.dtype == torch.float32


def test_the_penalty_of_a_model_is_the_sum_over_its_layers():
    model = adapted(kasa_config=KasaConfig(beta=0.5, gamma=0.25))
    model.add_adapter("b", config(target_modules=["first"]))
    tuner = model.base_model

    def of(name, *layers):
        return sum(
            penalty(*layer.factors(name), layer.lora_diag[name], model.peft_config[name].kasa_config)
            for layer in (getattr(tuner.model, layer) for layer in layers)
        )

    torch.testing.assert_close(tuner._get_kasa_loss(), of("default", "first", "second"))
    torch.testing.assert_close(tuner._get_kasa_loss("b"), of("b", "first"))
    torch.testing.assert_close(
        tuner._get_kasa_loss(["default", "b"]), tuner._get_kasa_loss() + tuner._get_kasa_loss("b")
    )
    assert tuner._get_kasa_loss("unknown") == tuner._get_kasa_loss([]) == 0.0
    assert adapted(kasa_config=None).base_model._get_kasa_loss() == 0.0
    tuner._get_kasa_loss().backward()
    assert tuner.model.first.lora_diag["default"].grad.any()


# --------------------------------------------------------------------------------------------------------- hotswapping


def test_adapters_of_its_rank_take_its_place(tmp_path):
    torch.manual_seed(7)
    new = adapted()
    new.save_pretrained(tmp_path)
    model = adapted()
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(out(model), out(new))


def test_it_cannot_be_prepared_for_larger_ranks():
    model = adapted()
    with pytest.raises(
        ValueError, match="'default' of rank 2, a KasaLinearVariant.*cannot be padded to target_rank=4"
    ):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    prepare_model_for_compiled_hotswap(model, target_rank=2)


def test_it_cannot_become_a_plain_adapter():
    assert not adapted().supports_lora_conversion()
