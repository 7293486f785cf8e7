"""Adapters on layers that bitsandbytes has quantised to 8 and to 4 bits, computed on the CPU."""

import subprocess
import sys

import pytest
import torch
from matrix import output, same, trainable
from quantized import (
    CHECKS,
    METHODS,
    Form,
    all_same,
    frozen_state,
    is_close,
    layer_of,
    linear,
    merged_quietly,
    parts,
    run,
    unpacked,
)
from safetensors.torch import save_file
from torch import nn

import peft
import peft.functional
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from peft.engine.backends import resolve_quantization_backend
from peft.tuners import adalora, ia3, lora
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from peft.utils.loftq_utils import loftq_init, replace_lora_weights_loftq
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend, quantization_extra_repr

bnb = pytest.importorskip("bitsandbytes", reason="the layers that are adapted here are of bitsandbytes")
pytestmark = pytest.mark.compat


def in_8_bits(linear: nn.Linear, **options) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False, **options
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def in_4_bits(linear: nn.Linear, **options) -> nn.Module:
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)
    layer.weight.data = linear.weight.data
    layer.bias = linear.bias
    return unpacked(layer.to("cpu"))


EIGHT = Form("8bit", "bnb 8bit", in_8_bits, eval_tolerance=0.02)
NF4 = Form("nf4", "bnb 4bit", lambda linear: in_4_bits(linear, quant_type="nf4"))
FORMS = (EIGHT, NF4)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda case: str(case.variant))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_method(check, method, form, tmp_path):
    run(check, method, form, tmp_path)


# ------------------------------------------------------------------------------------------------------- how it is kept


class Net(nn.Module):
    """Two quantised layers, and a head for which there are two forms."""

    def __init__(self, make=NF4.quantise, make_head=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = make(linear())
        self.act = nn.PReLU()
        self.head = (make_head or make)(nn.Linear(32, 64))

    def forward(self, x):
        return self.head(self.act(self.layer(x)))


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def adapted(make=NF4.quantise, config=None, **options):
    model = get_peft_model(Net(make), config or LoraConfig(r=4, target_modules=["layer"], **options)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)
    return model


OPTIONS = (
    {"quant_type": "fp4"},
    {"quant_type": "nf4", "compress_statistics": False},
    {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    {"quant_type": "nf4", "compute_dtype": torch.bfloat16},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_merged_is_quantised_with_the_same_options(options):
    model = adapted(lambda linear: in_4_bits(linear, **options))
    base = layer_of(model).get_base_layer()
    before, kept, result = base.weight, parts("", base.weight), output(model, X)
    merged_quietly(model)
    after = base.weight
    assert type(after) is bnb.nn.Params4bit and after is not before and not after.requires_grad
    for name in ("quant_type", "compress_statistics", "quant_storage", "blocksize", "bnb_quantized", "dtype", "shape"):
        assert getattr(after, name) == getattr(before, name)
    assert after.quant_state.nested == before.quant_state.nested
    assert after.quant_state.dtype == before.quant_state.dtype
    assert base.quant_state is after.quant_state and after.module is base
    assert not torch.equal(after.data.view(torch.uint8), before.data.view(torch.uint8))
    model.unmerge_adapter()
    assert base.weight is before and base.quant_state is before.quant_state
    assert all_same(parts("", base.weight), kept) and same(output(model, X), result)


def test_blocks_keep_their_size():
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear().weight.data, blocksize=32, quant_type="nf4", module=layer)
    layer = layer.to("cpu")
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    merged_quietly(model)
    assert layer.weight.quant_state.blocksize == 32
    assert layer.weight.quant_state.absmax.numel() == 64 * 32 / 32


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_scales_of_8_bits_are_found_before_and_after_the_first_forward(ran_before, threshold):
    model = adapted(lambda linear: in_8_bits(linear, threshold=threshold))
    base = layer_of(model).get_base_layer()
    if ran_before:
        model(X)
    assert (base.weight.SCB is None) == ran_before
    weight = layer_of(model).get_base_weight()
    assert weight.dtype == torch.float32
    assert (weight - linear().weight).abs().max() <= linear().weight.abs().max() / 127
    merged_quietly(model)
    assert base.weight.dtype == torch.int8 and base.state.CB is None
    merged = layer_of(model).get_base_weight()
    output(model, X)
    assert torch.equal(layer_of(model).get_base_weight(), merged)
    assert torch.equal(base.state.SCB, merged.half().abs().amax(1).float())
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).get_base_weight(), weight)
    assert same(output(model, X), output(adapted(lambda linear: in_8_bits(linear, threshold=threshold)), X))


def test_a_layer_is_adapted_before_it_is_quantised():
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    layer.weight.data, layer.bias = linear().weight.data, linear().bias
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False))
    weight = layer_of(model).get_base_weight()
    assert torch.equal(weight, linear().weight)
    model.merge_adapter()
    merged = layer_of(model).get_base_weight()
    assert torch.equal(merged, weight + layer_of(model).get_delta_weight("default"))
    assert type(layer.weight) is bnb.nn.Params4bit and not layer.weight.bnb_quantized
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).get_base_weight(), weight)
    model.to("cpu")
    assert layer.weight.bnb_quantized
    assert torch.equal(layer_of(model).get_base_weight(), dequantize_module_weight(NF4.quantise(linear())))


def test_a_weight_of_8_bits_in_half_precision_is_written_as_it_is():
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)  # quantised anew in each forward, which needs a GPU
    layer.load_state_dict(linear().state_dict())
    model = get_peft_model(nn.Sequential(layer.half()), LoraConfig(target_modules=["0"], init_lora_weights=False))
    before = layer.weight
    model.merge_adapter()
    assert type(layer.weight) is bnb.nn.Int8Params and layer.weight.has_fp16_weights
    assert torch.equal(layer.weight, (before.float() + layer_of(model).get_delta_weight("default")).half())
    model.unmerge_adapter()
    assert layer.weight is before


def test_a_state_that_the_weight_has_lost_is_found_in_the_layer():
    layer = NF4.quantise(linear())
    expected = dequantize_module_weight(layer)
    del layer.weight.quant_state
    assert torch.equal(Bnb4bitBackend().get_base_weight(layer), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_codes_packed_for_a_kernel_of_some_cpus_are_read(nested):
    layer = in_4_bits(linear(), quant_type="nf4", compress_statistics=nested)
    expected = dequantize_module_weight(layer)
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    packed = parts("", layer.weight)
    actual = Bnb4bitBackend().get_base_weight(layer)
    assert actual.dtype == torch.float32 and torch.allclose(actual, expected, rtol=2**-8, atol=0)
    assert layer.weight.quant_state.packing_format_for_cpu and all_same(parts("", layer.weight), packed)


# ------------------------------------------------------------------------- codes that are packed for a kernel of some CPUs

packs = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(),
    reason="this CPU lacks avx512_bf16, for which bitsandbytes packs codes of 4 bits",
)


def packing(linear, **options):
    """A layer that packs its codes at the first call in eval mode, as bitsandbytes makes it on such a CPU."""
    layer = in_4_bits(linear, quant_type="nf4", **options)
    layer.support_avx512bf16_for_cpu = True
    return layer


class PackingNet(nn.Module):
    """Two layers of shapes that can be packed."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        layer, head = nn.Linear(64, 64), nn.Linear(64, 32)
        self.layer, self.act, self.head = make(layer), nn.PReLU(), make(head)

    def forward(self, x):
        return self.head(self.act(self.layer(x)))


ADAPTS_ONE = {"target_modules": ["layer"], "init_lora_weights": False}


def is_packed(layer):
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def packed_net(**options):
    """One that was used, before it is given adapters; `dense` has the values of its weights before that."""
    net = PackingNet(lambda linear: packing(linear, **options)).eval().requires_grad_(False)
    net.dense = [dequantize_module_weight(layer).clone() for layer in (net.layer, net.head)]
    output(net, X)
    assert is_packed(net.layer) and is_packed(net.head)
    return net


def gradients(model, x):
    model.train().zero_grad()
    x = x.clone().requires_grad_(True)
    model(x).square().mean().backward()
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def dense_twin(net, model):
    """The same adapters on dense layers with the values that a packing net had."""
    twin = PackingNet(lambda linear: linear)
    for layer, weight in zip((twin.layer, twin.head), net.dense):
        layer.weight.data = weight.float()
    twin = get_peft_model(twin, LoraConfig(**ADAPTS_ONE))
    twin.load_state_dict({n: p.detach() for n, p in model.named_parameters() if "lora_" in n}, strict=False)
    return twin


def assert_trains_as_if_dense(net, model):
    """Forwards and gradients are those of the dense weights, but for scales that were rounded to bfloat16."""
    twin, actual = dense_twin(net, model), gradients(model, X)
    expected = gradients(twin, X)
    assert set(actual) == set(expected) and len(expected) == 3
    for name, gradient in expected.items():
        assert is_close(actual[name] / gradient.abs().max(), gradient / gradient.abs().max(), 0.02), name
    assert is_close(output(model.eval(), X), output(twin.eval(), X), 0.01)


DOORS = {
    "get_peft_model": lambda net: get_peft_model(net, LoraConfig(**ADAPTS_ONE)),
    "inject": lambda net: peft.inject_adapter_in_model(LoraConfig(**ADAPTS_ONE), net),
    "prepare": lambda net: get_peft_model(peft.prepare_model_for_kbit_training(net), LoraConfig(**ADAPTS_ONE)),
}


@packs
@pytest.mark.parametrize("nested", [False, True])
def test_an_adapter_trains_on_layers_that_were_packed(nested):
    net = packed_net(compress_statistics=nested)
    model = get_peft_model(net, LoraConfig(**ADAPTS_ONE))
    base = net.layer.get_base_layer()
    assert not is_packed(base) and not is_packed(net.head)  # through which gradients go, too
    assert base.weight.quant_state is base.quant_state and base.weight.dtype == torch.uint8
    assert base.quant_state.dtype == torch.float32 and not base.quant_state.nested
    assert base.weight.shape == in_4_bits(nn.Linear(64, 64)).weight.shape
    assert torch.allclose(dequantize_module_weight(base), net.dense[0], rtol=2**-8, atol=0)
    assert_trains_as_if_dense(net, model)


@packs
@pytest.mark.parametrize("door", DOORS)
def test_evaluating_between_steps_changes_nothing(door):
    net = packed_net()
    model = DOORS[door](net)
    before = gradients(model, X)
    kept = parts("", net.layer.get_base_layer().weight)
    for _ in range(2):
        output(model.eval(), X)
        with model.disable_adapter() if door != "inject" else torch.no_grad():
            output(model, X)
        assert not is_packed(net.head) and all_same(parts("", net.layer.get_base_layer().weight), kept)
        assert all_same(gradients(model, X), before)


@packs
def test_a_model_that_is_prepared_for_training_is_packed_no_more():
    net = peft.prepare_model_for_kbit_training(packed_net())
    assert not is_packed(net.layer) and not is_packed(net.head)
    output(net, X)
    assert not is_packed(net.layer)


@packs
def test_it_is_packed_as_before_where_nothing_is_trained(tmp_path):
    trained = get_peft_model(packed_net(compress_statistics=False), LoraConfig(**ADAPTS_ONE)).eval()
    trained.save_pretrained(tmp_path)
    net = packed_net(compress_statistics=False)
    model = peft.PeftModel.from_pretrained(net, tmp_path)
    base = layer_of(model).get_base_layer()
    kept, result = parts("", base.weight), output(model, X)
    assert is_packed(base) and is_packed(net.head) and base.support_avx512bf16_for_cpu
    assert is_close(result, output(trained, X), 0.02)
    assert not is_close(result, output(packed_net(compress_statistics=False), X), 0.05)

    model.save_pretrained(tmp_path / "again")
    assert all_same(parts("", base.weight), kept) and is_packed(base)
    merged_quietly(model)
    expected = nn.Linear(64, 64)
    expected.weight.data = layer_of(trained).get_base_weight() + layer_of(trained).get_delta_weight("default")
    expected = in_4_bits(expected, compress_statistics=False, quant_type="nf4")
    merged = dequantize_module_weight(base)
    assert (merged == dequantize_module_weight(expected)).float().mean() > 0.97
    assert is_close(output(model, X), result, 0.25) and is_packed(base)
    model.unmerge_adapter()
    assert all_same(parts("", base.weight), kept) and same(output(model, X), result)
    again = peft.PeftModel.from_pretrained(packed_net(compress_statistics=False), tmp_path / "again")
    assert same(output(again, X), result)


@packs
@pytest.mark.parametrize("set_adapter", [peft.PeftModel.set_adapter, peft.functional.set_adapter], ids=["P", "I"])
def test_an_adapter_that_was_loaded_for_inference_is_set_to_train(set_adapter, tmp_path):
    get_peft_model(PackingNet(in_4_bits), LoraConfig(**ADAPTS_ONE)).save_pretrained(tmp_path)
    net = packed_net()
    model = peft.PeftModel.from_pretrained(net, tmp_path)
    output(model, X)
    assert is_packed(layer_of(model).get_base_layer())
    model.set_adapter("default", inference_mode=True)
    assert is_packed(layer_of(model).get_base_layer())
    set_adapter(model, "default")
    assert not is_packed(layer_of(model).get_base_layer()) and not is_packed(net.head)
    assert_trains_as_if_dense(net, model)


@packs
def test_a_layer_that_a_client_sets_to_train_by_itself(tmp_path):
    get_peft_model(PackingNet(in_4_bits), LoraConfig(**ADAPTS_ONE)).save_pretrained(tmp_path)
    layer = layer_of(peft.PeftModel.from_pretrained(packed_net(), tmp_path))
    layer.set_adapter([])
    assert is_packed(layer.get_base_layer())
    layer.set_adapter("default")
    assert not is_packed(layer.get_base_layer())


@packs
def test_what_was_packed_before_merging_is_not_after_unmerging():
    net = packed_net()
    model = get_peft_model(net, LoraConfig(inference_mode=True, **ADAPTS_ONE))
    merged_quietly(model)
    model.add_adapter("other", LoraConfig(**ADAPTS_ONE))
    model.unmerge_adapter()
    assert not is_packed(layer_of(model).get_base_layer())
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_trains_as_if_dense(net, model)


@packs
def test_layers_of_shapes_that_cannot_be_packed_are_evaluated_beside_adapters_that_train():
    def net():
        return nn.Sequential(packing(linear()), packing(nn.Linear(32, 64))).eval()  # a block of 64 is two rows

    with pytest.raises(RuntimeError, match="shape"):
        output(net(), X)
    assert output(get_peft_model(net(), LoraConfig(target_modules=["0"])), X).isfinite().all()


@packs
def test_prompts_train_through_layers_that_were_packed(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).save_pretrained(tmp_path)
    ids = torch.arange(12).view(2, 6)
    found = []
    for evaluates in (False, True):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        if evaluates:
            with torch.no_grad():
                base.eval()(input_ids=ids)
            assert is_packed(base.model.layers[0].mlp.up_proj)
        torch.manual_seed(0)
        model = get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        if evaluates:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append(model.prompt_encoder["default"].embedding.weight.grad)
    assert is_close(found[1] / found[0].abs().max(), found[0] / found[0].abs().max(), 0.05)


EMBEDDINGS = {
    "8bit": lambda: bnb.nn.Embedding8bit(12, 64),
    "4bit": lambda: bnb.nn.Embedding4bit(12, 64, quant_type="nf4"),
}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("bits", EMBEDDINGS)
def test_embeddings(bits, options, tmp_path):
    def make():
        dense = nn.Embedding(12, 64, _weight=torch.randn(12, 64, generator=torch.Generator().manual_seed(0)))
        layer = EMBEDDINGS[bits]()
        layer.load_state_dict(dense.state_dict())
        return nn.Sequential(layer.to("cpu"))

    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    ids, base = torch.arange(12).view(3, 4), make()
    weight = dequantize_module_weight(base[0])
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    dense = nn.Sequential(nn.Embedding(12, 64, _weight=weight.float()))
    torch.manual_seed(0)
    expected = get_peft_model(dense, config)
    assert layer_of(model).quantization_backend.layer_type == "embedding"
    result = output(model, ids)
    assert torch.allclose(result.float(), output(expected, ids), atol=1e-2)
    model.save_pretrained(tmp_path)
    assert same(output(peft.PeftModel.from_pretrained(make(), tmp_path), ids), result)
    embedding = layer_of(model).get_base_layer()  # which has no state dict
    weight, kept = embedding.weight, parts("", embedding.weight)
    merged_quietly(model)
    assert is_close(output(model, ids).float(), result.float(), 0.25)
    assert not same(output(model, ids), result) and not same(output(model, ids), output(make(), ids))
    model.unmerge_adapter()
    assert embedding.weight is weight and all_same(parts("", weight), kept)
    assert same(output(model, ids), result)


def test_its_dtype_is_that_of_the_computation():
    make = lambda linear: in_4_bits(linear, compute_dtype=torch.bfloat16)  # noqa: E731
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        config = LoraConfig(target_modules=["layer"])
        model = get_peft_model(Net(make), config, autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert output(model, X).dtype == torch.float32


def test_the_result_of_a_4_bit_layer_is_copied_for_sums_in_place():
    x = torch.ones(2)
    assert Bnb4bitBackend().maybe_clone_base_result(x) is not x
    assert Bnb8bitBackend().maybe_clone_base_result(x) is x


# ------------------------------------------------------------------------------------------------------- what it is called


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LoraConfig, (lora.Linear8bitLt, lora.Linear4bit)),
        (AdaLoraConfig, (adalora.SVDLinear8bitLt, adalora.SVDLinear4bit)),
        (IA3Config, (ia3.Linear8bitLt, ia3.Linear4bit)),
    ],
    ids=["lora", "adalora", "ia3"],
)
def test_clients_know_layers_by_their_class(config, names):
    options = {"total_step": 1} if config is AdaLoraConfig else {}
    options |= {"feedforward_modules": []} if config is IA3Config else {}
    for cls, make in zip(names, (in_8_bits, in_4_bits)):
        model = get_peft_model(Net(make, nn.Identity), config(target_modules=["layer"], **options))
        assert type(model.base_model.model.layer) is cls
        assert issubclass(cls, type(model.base_model).tuner_layer_cls)
        assert quantization_extra_repr(model.base_model.model.layer) == (
            f"quantization_backend='bnb {8 if make is in_8_bits else 4}bit'"
        )
    dense = get_peft_model(nn.Sequential(linear()), config(target_modules=["0"], **options))
    assert not isinstance(dense.base_model.model[0], names)


def test_dispatchers_make_layers_for_their_own_sort():
    eight, four = EIGHT.quantise(linear()), NF4.quantise(linear())
    config = LoraConfig(r=3)
    for dispatch, own, other, cls in (
        (lora.bnb.dispatch_bnb_8bit, eight, four, lora.Linear8bitLt),
        (lora.bnb.dispatch_bnb_4bit, four, eight, lora.Linear4bit),
    ):
        made = dispatch(own, "a", config, r=3, lora_alpha=6, loaded_in_8bit=True, loaded_in_4bit=True)
        assert type(made) is cls and made.r == {"a": 3} and made.scaling["a"] == 2.0
        assert made.quantization_backend is not None
        assert dispatch(other, "a", config, r=3) is None
        assert dispatch(linear(), "a", config, r=3) is None
        nested = dispatch(made, "b", config, r=3)
        assert nested.get_base_layer() is own


@pytest.mark.parametrize("module", [lora, ia3, adalora], ids=lambda module: module.__name__)
def test_without_bitsandbytes_there_are_no_such_classes(module):
    from peft.import_utils import names_where_installed

    find = names_where_installed(module.__name__, Linear=(".bnb", lambda: False))
    with pytest.raises(AttributeError, match=f"'{module.__name__}' has 'Linear' only with an optional package"):
        find("Linear")
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'Linear3bit'"):
        _ = module.Linear3bit


def test_nothing_is_imported_to_find_out():
    code = (
        "import sys, torch, peft\n"
        "peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=['0']))\n"
        "import peft.utils.quantization_utils, peft.tuners.lora.bnb, peft.tuners.lora.torchao\n"
        "print([name for name in ('bitsandbytes', 'torchao') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_functions_that_dequantise_agree():
    for form, bits in ((EIGHT, "8bit"), (NF4, "4bit")):
        layer = form.quantise(linear())
        assert get_bnb_param_type(layer.weight) == bits
        expected = resolve_quantization_backend(layer).get_base_weight(layer)
        state = getattr(layer, "state", None)
        assert torch.equal(dequantize_bnb_weight(layer.weight, state=state), expected)
        assert torch.equal(dequantize_module_weight(layer), expected)
    with pytest.raises(ValueError, match="state=layer.state"):
        dequantize_bnb_weight(EIGHT.quantise(linear()).weight)
    bare = bnb.nn.Int8Params(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    layer = nn.Linear(2, 2)
    layer.weight = bare
    with pytest.raises(ValueError, match="has no row scales"):
        resolve_quantization_backend(layer).get_base_weight(layer)


# ------------------------------------------------------------------------------------------------------------ its limits


def test_merging_says_that_it_rounds():
    with pytest.warns(peft.utils.warning.PeftWarning, match=r"quantised \(bnb 4bit\) rounds the result"):
        adapted().merge_adapter()


def test_a_start_that_needs_the_exact_weight_is_refused():
    for make, dtype in ((in_4_bits, "uint8"), (in_8_bits, "int8")):
        with pytest.raises(TypeError, match=f"layer: init_lora_weights='pissa' of the adapter.*got {dtype}"):
            get_peft_model(Net(make), LoraConfig(target_modules=["layer"], init_lora_weights="pissa"))


@pytest.mark.parametrize(
    "make", [in_8_bits, in_4_bits, lambda linear: in_4_bits(linear, quant_storage=torch.bfloat16)]
)
def test_a_packed_parameter_is_no_target(make):
    with pytest.raises(
        TypeError, match=r"layer.weight of the adapter 'default' is quantised \(by bnb .bit\).*target_modules"
    ):
        get_peft_model(Net(make), LoraConfig(target_parameters=["layer.weight"]))


def test_safe_merging_changes_nothing_if_it_fails():
    model = adapted()
    weight = layer_of(model).get_base_layer().weight
    kept = parts("", weight)
    layer_of(model).lora_B["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="'default' into layer gives NaN"):
        model.merge_adapter(safe_merge=True)
    assert layer_of(model).get_base_layer().weight is weight and all_same(parts("", weight), kept)
    assert layer_of(model).merged_adapters == []


# ---------------------------------------------------------------------------------------------- copies, which train in full


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("method", ["modules_to_save", "ln_tuning"])
def test_a_copy_of_a_quantised_module_has_a_dense_weight(form, method, tmp_path):
    if method == "ln_tuning":
        config = LNTuningConfig(target_modules=["head"])
    else:
        config = LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"])
    model = get_peft_model(Net(form.quantise), config).eval()
    base = Net(form.quantise).eval()
    dense = dequantize_module_weight(base.head)
    copies = model.base_model.model.head
    copy = (copies.modules_to_save if method == "modules_to_save" else copies.ln_tuning_layers)["default"]
    assert torch.equal(copy.weight, dense) and isinstance(copy, nn.Linear) and copy.weight.requires_grad
    assert torch.allclose(output(model, X), output(base, X), atol=0.05)
    assert copy(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    kept = {name: value for name, value in frozen_state(model).items() if ".default." not in name}
    model(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(copy.weight, dense)
    assert {name: value.sum() for name, value in kept.items()} == {
        name: value.sum() for name, value in frozen_state(model).items() if name in kept
    }
    trained = output(model, X)
    with model.disable_adapter():
        assert torch.allclose(output(model, X), output(base, X), atol=1e-6)

    original = copies.get_base_layer() if method == "ln_tuning" else copies.original_module
    codes, weight = parts("", original.weight), original.weight
    merged_quietly(model)
    assert original.weight is not weight and type(original.weight) is type(weight)
    again = nn.Linear(32, 64)
    again.load_state_dict(copy.state_dict())
    assert torch.equal(dequantize_module_weight(original), dequantize_module_weight(form.quantise(again)))
    assert torch.allclose(original.bias, copy.bias, atol=1e-6)
    assert (output(model, X) - trained).abs().max() < 0.25 * trained.abs().max()
    model.unmerge_adapter()
    assert original.weight is weight and all_same(parts("", original.weight), codes)
    assert same(output(model, X), trained)

    model.save_pretrained(tmp_path)
    for head in (None, lambda linear: linear):
        loaded = peft.PeftModel.from_pretrained(Net(form.quantise, head), tmp_path).eval()
        assert same(output(loaded, X), trained)
    plain = model.merge_and_unload()
    assert plain.head is copy
    assert torch.allclose(output(plain, X), trained, atol=0.25 * float(trained.abs().max()))


def test_a_copied_embedding_keeps_its_padding():
    from peft.engine.backends.dense import with_dense_weights

    layer = bnb.nn.Embedding8bit(12, 64)
    layer.padding_idx = 3
    expected = dequantize_module_weight(layer.to("cpu"))
    dense = with_dense_weights(layer)
    assert type(dense) is nn.Embedding and dense.padding_idx == 3 and torch.equal(dense.weight, expected)


# ------------------------------------------------------------------------------------------------------ several at once


def test_layers_of_two_methods_around_one():
    model = peft.get_peft_model(Net(), LoraConfig(target_modules=["layer"], init_lora_weights=False), "a", mixed=True)
    model.add_adapter("b", peft.LoHaConfig(r=2, target_modules=["layer"], init_weights=False))
    model.set_adapter(["a", "b"])
    layers = [module for module in model.modules() if hasattr(module, "quantization_backend")]
    assert [type(layer.quantization_backend) for layer in layers] == [Bnb4bitBackend] * 2
    result, kept = output(model, X), frozen_state(model)
    merged_quietly(model)
    assert (output(model, X) - result).abs().max() < 0.25 * result.abs().max()
    model.unmerge_adapter()
    assert all_same(frozen_state(model), kept) and same(output(model, X), result)


def test_rows_of_a_quantised_embedding_train():
    embedding = bnb.nn.Embedding8bit(12, 64)
    model = nn.ModuleDict({"embed": embedding.to("cpu"), "layer": NF4.quantise(linear())})
    model.forward = lambda ids: model["layer"](model["embed"](ids).float())
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["layer"], trainable_token_indices={"embed": [1, 3]})
    )
    ids = torch.tensor([[1, 2, 3]])
    before = output(adapted, ids)
    rows = adapted.base_model.model["embed"].token_adapter.trainable_tokens_delta["default"]
    assert rows.is_floating_point() and rows.requires_grad
    assert torch.allclose(rows.float(), dequantize_module_weight(embedding)[[1, 3]], atol=1e-3)
    rows.data += 1.0
    after = output(adapted, ids)
    assert not torch.allclose(after[:, [0, 2]], before[:, [0, 2]]) and same(after[:, 1], before[:, 1])


# ---------------------------------------------------------------------------------------------------------------- LoftQ


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_makes_up_for_what_is_rounded(bits):
    weight = linear().weight.detach()
    form = NF4 if bits == 4 else EIGHT
    Q, A, B = loftq_init(weight, num_bits=bits, reduced_rank=8, num_iter=2)
    rounded = dequantize_module_weight(form.quantise(linear(Q, torch.zeros(32))))
    plain = dequantize_module_weight(form.quantise(linear()))
    assert (weight - (rounded + B @ A)).norm() < 0.9 * (weight - plain).norm()


def test_an_adapter_is_started_from_what_quantisation_rounded_away(tmp_path):
    class Model(Net):
        base_model_prefix = "model"

    model = get_peft_model(Model(), LoraConfig(r=8, lora_alpha=8, target_modules=["layer"]))
    save_file({"layer.weight": linear().weight.detach().clone()}, tmp_path / "model.safetensors")
    rounded = layer_of(model).get_base_weight()
    exact = linear().weight
    replace_lora_weights_loftq(model, tmp_path)
    started = rounded + layer_of(model).get_delta_weight("default")
    assert (exact - started).norm() < 0.9 * (exact - rounded).norm()
    assert trainable(model) == {f"base_model.model.layer.lora_{factor}.default.weight" for factor in "AB"}


# ------------------------------------------------------------------- files with weights of what is, or was, quantised


class WithHead(Net):
    """One whose head is its output embedding, which a file may hold beside the adapter."""

    def get_input_embeddings(self):
        return self.layer

    def get_output_embeddings(self):
        return self.head


def with_head(make_head, factor=1.0, **options):
    base = WithHead(as_it_is, lambda linear: make_head(scaled(linear, factor)))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["layer"], **options)).eval()


def scaled(linear, factor):
    linear.weight.data *= factor
    return linear


def as_it_is(linear):
    return linear


def head_of(model):
    return model.base_model.model.head


def file_of(model):
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=True)
    return {key: value.clone() for key, value in state.items() if ".head." in key or "lora_" in key}


@pytest.mark.parametrize("source, target", [(as_it_is, in_4_bits), (in_4_bits, as_it_is), (in_4_bits, in_4_bits)])
def test_the_copy_of_what_is_quantised_is_dense_in_files_too(source, target):
    first, second = (with_head(make, modules_to_save=["head"]) for make in (source, target))
    head_of(first).modules_to_save["default"].weight.data += 1
    assert not peft.set_peft_model_state_dict(second, peft.get_peft_model_state_dict(first)).unexpected_keys
    copies = [head_of(model).modules_to_save["default"] for model in (first, second)]
    assert same(copies[0].weight, copies[1].weight) and same(copies[0].bias, copies[1].bias)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_dense_weight_is_quantised_where_it_is_loaded_into_a_quantised_layer(form, ignore, recwarn):
    dense = with_head(as_it_is, factor=2.0)
    head_of(dense).bias.data += 1
    model, expected = with_head(form.quantise), form.quantise(head_of(dense))
    sort = type(head_of(model).weight)
    result = peft.set_peft_model_state_dict(model, file_of(dense), ignore_mismatched_sizes=ignore)
    head, backend = head_of(model), resolve_quantization_backend(expected)
    assert not result.unexpected_keys and type(head.weight) is sort
    assert same(backend.get_base_weight(head), backend.get_base_weight(expected))
    assert same(head.bias, expected.bias)
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_only_taken_with_the_scales_that_are_there(form):
    model, alike, other = with_head(form.quantise), with_head(form.quantise), with_head(form.quantise, factor=2.0)
    before, weight = frozen_state(model), head_of(model).weight
    peft.set_peft_model_state_dict(model, file_of(alike))
    for state in (file_of(other), {key: value for key, value in file_of(other).items() if "absmax" not in key}):
        with pytest.raises((RuntimeError, ValueError), match="head.weight.*Nothing was loaded"):
            peft.set_peft_model_state_dict(model, state)
    assert head_of(model).weight is weight and all_same(frozen_state(model), before)


def test_codes_of_4_bits_are_left_out_where_they_do_not_fit():
    state = file_of(with_head(in_4_bits, factor=2.0))
    for target in (as_it_is, in_4_bits):
        model = with_head(target)
        before = {key: value.clone() for key, value in head_of(model).state_dict().items()}
        with pytest.raises(RuntimeError, match=r"head.weight: expected \(64, 32\), found \(1024, 1\)"):
            peft.set_peft_model_state_dict(model, state)
        with pytest.warns(UserWarning, match=r"left out.*head.weight: expected \(64, 32\), found \(1024, 1\)"):
            peft.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
        assert all_same(head_of(model).state_dict(), before)
