"""Adapters on layers of HQQ, computed on the CPU."""

import copy
import functools

import pytest
import torch
from quantized import CHECKS, IN, METHODS, OUT, Form, all_same, frozen_state, layer_of, linear, merged_quietly, run
from torch import nn

import peft
from peft import LoraConfig, get_peft_model
from peft.engine.backends import dense_weight, resolve_quantization_backend
from peft.tuners.lora.hqq import HqqLoraLinear, dispatch_hqq
from peft.utils.integrations import dequantize_module_weight
from peft.utils.quantization_utils import HqqBackend

hqq = pytest.importorskip("hqq.core.quantize", reason="the layers that are adapted here are of HQQ")
pytestmark = pytest.mark.compat


def quantised(linear: nn.Linear, **options) -> nn.Module:
    config = hqq.BaseQuantizeConfig(**{"nbits": 4, "group_size": 16, **options})
    linear.requires_grad_(False)  # HQQ copies the bias as part of the graph
    return hqq.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


def form(name: str, rounding: float = 0.25, **options) -> Form:
    return Form(name, "hqq", functools.partial(quantised, **options), rounding=rounding)


FOUR_BITS = form("4bit")
OTHER_FORMS = (
    form("8bit", nbits=8),
    form("3bit", nbits=3, rounding=0.6),
    form("2bit-columns", nbits=2, axis=0, rounding=1.5),
    form("4bit-rows", group_size=None, rounding=0.5),
)
SOME = [case for case in METHODS if case.variant.name in ("LORA", "LORA-dora")]


@pytest.mark.parametrize("method", METHODS, ids=lambda case: str(case.variant))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_method(check, method, tmp_path):
    run(check, method, FOUR_BITS, tmp_path)


@pytest.mark.parametrize("form", OTHER_FORMS, ids=str)
@pytest.mark.parametrize("method", SOME, ids=lambda case: str(case.variant))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_other_forms(check, method, form, tmp_path):
    run(check, method, form, tmp_path)


# ------------------------------------------------------------------------------------------------------- what is written

X = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))


def adapted(layer: nn.Module | None = None, **options) -> peft.PeftModel:
    torch.manual_seed(2)
    net = nn.Sequential(quantised(linear()) if layer is None else layer)
    return get_peft_model(net, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options))


def bits(layer: nn.Module) -> torch.Tensor:
    """The codes, also of a layer that looks at them as floating-point numbers, of which some are none."""
    return layer.W_q.data.view(torch.uint8)


def test_the_weight_is_what_hqq_says():
    layer = quantised(linear())
    backend = resolve_quantization_backend(layer)
    assert isinstance(backend, HqqBackend) and backend.supports_merge and backend.layer_type == "linear"
    assert torch.equal(dense_weight(layer), layer.dequantize())
    assert torch.equal(dequantize_module_weight(layer), layer.dequantize())
    assert not dense_weight(layer).requires_grad


def test_the_layer_is_found_by_its_name():
    model = adapted()
    layer = layer_of(model)
    assert type(layer) is HqqLoraLinear
    assert layer.weight is layer.base_layer.W_q
    config = LoraConfig(r=4)
    assert dispatch_hqq(nn.Linear(3, 3), "default", config) is None
    other = dispatch_hqq(quantised(linear()), "default", config, r=4, lora_alpha=2)
    assert type(other) is HqqLoraLinear and other.scaling == {"default": 0.5}
    assert torch.equal(other(X), quantised(linear())(X))


@pytest.mark.parametrize(
    "options", [{}, {"axis": 0}, {"nbits": 8, "group_size": 32}, {"nbits": 2}, {"view_as_float": True}], ids=str
)
def test_merging_keeps_the_module_and_its_settings(options):
    base = quantised(linear(), **options)
    model = adapted(base)
    parameter, before = base.W_q, copy.deepcopy(base)
    merged_quietly(model)
    assert layer_of(model).base_layer is base and base.W_q is parameter
    assert not torch.equal(bits(base), bits(before)) and base.W_q.shape == before.W_q.shape
    assert base.quant_config == before.quant_config
    for key in ("nbits", "group_size", "axis", "packing", "shape", "compute_dtype"):
        assert base.meta[key] == before.meta[key], key
    model.unmerge_adapter()
    assert torch.equal(bits(base), bits(before)) and base.W_q is parameter
    for key in ("scale", "zero"):
        assert torch.equal(base.meta[key], before.meta[key])
    assert torch.equal(layer_of(model).base_layer(X), before(X))


def test_a_bias_of_the_adapter_is_merged_and_unmerged():
    model = adapted(lora_bias=True)
    layer = layer_of(model)
    bias, kept = layer.base_layer.bias.clone(), frozen_state(model)
    merged_quietly(model)
    assert torch.equal(layer.base_layer.bias, bias + layer.lora_B["default"].bias * layer.scaling["default"])
    model.unmerge_adapter()
    assert all_same(frozen_state(model), kept)


def test_a_result_that_is_not_finite_is_not_written():
    model = adapted()
    with torch.no_grad():
        layer_of(model).lora_B["default"].weight[0, 0] = float("inf")
    kept = frozen_state(model)
    with pytest.raises(ValueError, match="'default' into 0 gives NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert all_same(frozen_state(model), kept)


def test_all_linear_means_these_layers_too():
    net = nn.Sequential(quantised(linear()), nn.ReLU(), nn.Linear(OUT, 4), nn.LayerNorm(4))
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == {"0", "2"}
    status = peft.get_layer_status(model)
    assert [layer.quantization_backend for layer in status] == ["hqq", None]


def test_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    hf = pytest.importorskip("hqq.models.hf.base")
    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
        hf.AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
        return model

    model = peft.prepare_model_for_kbit_training(make())
    model = get_peft_model(
        model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    status = peft.get_model_status(model)
    assert (status.quantization_backend, status.num_adapter_layers) == ("hqq", 7)
    ids = torch.arange(12).view(2, 6)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.eval().save_pretrained(tmp_path)
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=4, do_sample=False), tokens)


def test_olora_starts_from_the_values_and_writes_the_rest():
    plain = dense_weight(quantised(linear()))
    torch.manual_seed(2)
    model = get_peft_model(
        nn.Sequential(quantised(linear())),
        LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights="olora"),
    )
    layer = layer_of(model)
    total = layer.get_base_weight() + layer.get_delta_weight("default")
    assert not torch.equal(layer.get_base_weight(), plain)
    assert (total - plain).abs().max() < 0.1 * plain.abs().max()
