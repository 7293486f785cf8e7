"""Adapters on quantised layers that can be read but not written: GPTQ, AWQ, EETQ, AQLM, Neural Compressor, TransformerEngine.

Most are stand-ins with the layouts of the packages' layers (see `stand_ins`); those of a package that is installed are its own.
"""

import functools
import importlib
import importlib.util
import tempfile
import warnings
from types import SimpleNamespace

import pytest
import quantized
import stand_ins
import torch
import torch.nn.functional as F
from quantized import CHECKS, IN, METHODS, OUT, Form, is_close, layer_of, linear, run
from torch import nn

import peft
from peft import AdaLoraConfig, HRAConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model, import_utils
from peft.engine.backends import dense_weight, resolve_quantization_backend
from peft.tuners import adalora, lora
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.aqlm import AqlmLoraLinear, dispatch_aqlm
from peft.tuners.lora.awq import AwqLoraLinear, dispatch_awq
from peft.tuners.lora.eetq import EetqLoraLinear, dispatch_eetq
from peft.tuners.lora.gptq import GPTQLoraLinear, dispatch_gptq
from peft.tuners.lora.inc import IncLoraLinear, dispatch_inc
from peft.tuners.lora.te import TeLinear, dispatch_transformer_engine
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from peft.utils.quantized import is_gptqmodel_awq_layer, is_gptqmodel_quant_linear

X = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ------------------------------------------------------------------------------------------------- of packages themselves


@torch.no_grad()
def aqlm_linear(linear: nn.Linear, bits: int = 4, rows: int = 1) -> nn.Module:
    """A layer of AQLM; its weight is drawn, since learning codebooks takes calibration data."""
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(IN, OUT, 8, rows, 2, bits, dtype=linear.weight.dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    layer.codes.copy_(torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), layer.codes.shape, generator=generator))
    layer.codebooks.copy_(torch.randn(layer.codebooks.shape, generator=generator) / 8)
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator) + 0.5)
    layer.bias.copy_(linear.bias)
    return layer


def gptqmodel_linear(linear: nn.Linear, bits: int, awq: bool = False) -> nn.Module:
    """A layer of GPTQModel that computes with torch."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    stand_in = (stand_ins.AwqTorchLinear if awq else stand_ins.TorchLinear)(linear, bits=bits)
    options = {"bits": bits, "group_size": 16, "sym": False, "desc_act": False, "in_features": IN, "out_features": OUT}
    layer = (AwqTorchLinear if awq else TorchLinear)(bias=True, register_buffers=True, **options)
    layer.load_state_dict(stand_in.state_dict())
    layer.optimized = True  # by a compiler, otherwise
    layer.post_init()
    return layer


def neural_compressor_linear(linear: nn.Linear, optimum: bool) -> nn.Module:
    """A layer with integer weights of Neural Compressor."""
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

    codes, scales, zeros = stand_ins.rounded(linear.weight, 4, 16)
    layer = INCWeightOnlyLinear(IN, OUT, bits=4, group_size=16, zp=True, bias=True, use_optimum_format=optimum)
    layer.pack(codes.T.contiguous().int(), scales.T.float(), zeros.T.contiguous().int(), linear.bias.detach())
    return layer


def in_8_bit_floats(linear: nn.Linear, is_measuring: bool = False) -> nn.Module:
    """A layer of Neural Compressor in 8-bit floating point, or one that measures for it what values come by."""
    from neural_compressor.torch.quantization import FP8Config, convert, finalize_calibration, prepare

    with tempfile.TemporaryDirectory() as folder:
        # On a CPU, it computes with the values that codes stand for.
        config = FP8Config(
            fp8_config="E4M3", scale_method="maxabs_pow2", use_qdq=True, dump_stats_path=f"{folder}/measure"
        )
        net = prepare(nn.Sequential(linear).eval(), config)
        if not is_measuring:
            with torch.no_grad():
                net(4 * X.to(linear.weight.dtype))
            finalize_calibration(net)
            net = convert(net)
    return net[0].requires_grad_(False)


FORMS = {
    "gptq": Form("gptq", "gptq", stand_ins.TorchLinear, can_write=False),
    "awq": Form("awq", "awq", stand_ins.AwqTorchLinear, can_write=False),
    "eetq": Form("eetq", "eetq", stand_ins.EetqLinear, can_write=False),
    "inc": Form("inc", "inc", stand_ins.PatchedLinear, can_write=False),
    "te": Form("te", "te", stand_ins.Linear, can_write=False),
}
OTHER_FORMS = [
    *(
        Form(f"gptq-{bits}", "gptq", functools.partial(stand_ins.TorchLinear, bits=bits), can_write=False)
        for bits in (2, 3, 8)
    ),
    Form("gptq-marlin", "gptq", stand_ins.MarlinLinear, can_write=False),
    Form("awq-marlin", "awq", stand_ins.AwqMarlinLinear, can_write=False),
    Form("te-parts", "te", functools.partial(stand_ins.Linear, parts=2, quantised=True), can_write=False),
]
OF_PACKAGES = {
    "aqlm": [Form("aqlm", "aqlm", aqlm_linear, can_write=False)],
    "gptqmodel": [
        Form("gptqmodel-4", "gptq", functools.partial(gptqmodel_linear, bits=4), can_write=False),
        Form("gptqmodel-3", "gptq", functools.partial(gptqmodel_linear, bits=3), can_write=False),
        # Its forward computes in half precision.
        Form("gptqmodel-awq", "awq", functools.partial(gptqmodel_linear, bits=4, awq=True), 3e-3, can_write=False),
    ],
    "neural_compressor": [
        Form("neural-compressor", "inc", in_8_bit_floats, 0.1, can_write=False),  # of activations, too
        Form("inc-measuring", "inc", functools.partial(in_8_bit_floats, is_measuring=True), can_write=False),
    ],
}
SOME = [case for case in METHODS if case.variant.name in ("LORA", "LORA-dora")]
SOME_CHECKS = [  # which ask something of the layer's form
    quantized.the_backend_is_known,
    quantized.its_output_is_that_of_the_dense_weight,
    quantized.a_step_of_training_changes_the_adapter_alone,
    quantized.merging_quantises_again_and_unmerging_is_exact,
    quantized.it_is_saved_and_loaded,
    quantized.in_half_precision_it_keeps_the_dtype_of_its_input,
]


def marked(package: str, form: Form):
    skip = pytest.mark.skipif(not has(package), reason=f"the layers that are adapted here are of {package}")
    return pytest.param(form, marks=skip, id=form.name)


REAL = [marked(package, form) for package, forms in OF_PACKAGES.items() for form in forms]
STAND_INS = [pytest.param(form, marks=pytest.mark.stand_in, id=form.name) for form in [*FORMS.values(), *OTHER_FORMS]]


# ------------------------------------------------------------------------------------------- what holds for every method


@pytest.mark.stand_in
@pytest.mark.parametrize("method", METHODS, ids=lambda case: str(case.variant))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_method(check, method, tmp_path):
    run(check, method, FORMS["gptq"], tmp_path)


@pytest.mark.parametrize("form", [*STAND_INS[1:], *REAL])
@pytest.mark.parametrize("method", SOME, ids=lambda case: str(case.variant))
@pytest.mark.parametrize("check", SOME_CHECKS, ids=lambda check: check.__name__)
def test_other_forms(check, method, form, tmp_path):
    run(check, method, form, tmp_path)


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("form", [*STAND_INS, *REAL])
def test_the_weight_is_what_the_layer_multiplies_by(form):
    layer = form.quantise(linear())
    weight = dense_weight(layer)
    assert weight.shape == (OUT, IN) and not weight.requires_grad
    # Of a unit vector, the layer gives a column and the bias, so that nothing is rounded but their sum.
    x = torch.eye(IN, dtype=weight.dtype)
    result = layer(x)
    assert torch.equal(result, F.linear(x, weight) + layer.bias.to(result.dtype))


@pytest.mark.skipif(not has("gptqmodel"), reason="the layers that are adapted here are of gptqmodel")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_gets_the_same_weight(bits):
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    layer = gptqmodel_linear(linear(), bits)
    assert torch.equal(dense_weight(layer), layer.dequantize_weight().T)
    layer = gptqmodel_linear(linear(), bits, awq=True)
    expected = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, 16).T
    assert torch.equal(dense_weight(layer), expected)


CPU_KERNELS = {
    "aten": ("gptqmodel.nn_modules.qlinear.torch_aten_kernel", "TorchAtenLinear", 4),
    "int8": ("gptqmodel.nn_modules.qlinear.torch_int8", "TorchInt8Linear", 8),
    "fused-awq": ("gptqmodel.nn_modules.qlinear.torch_fused_awq", "TorchFusedAwqLinear", 4),
}


def cpu_kernel(name: str, bias: bool = True) -> tuple[nn.Module, torch.Tensor]:
    """A layer of GPTQModel with one of its kernels for CPUs, and its weight (out, in)."""
    module, cls, bits = CPU_KERNELS[name]
    stand_in = (stand_ins.AwqTorchLinear if "awq" in name else stand_ins.TorchLinear)(linear(), bits, 32)
    layer = getattr(importlib.import_module(module), cls)(
        bits=bits, group_size=32, sym=False, desc_act=False, in_features=IN, out_features=OUT, bias=bias,
        register_buffers=True,
    )  # fmt: skip
    layer.load_state_dict(stand_in.state_dict(), strict=False)
    layer.optimized = True
    layer.post_init()
    return layer.eval(), stand_in.dense().T


@pytest.mark.skipif(not has("gptqmodel"), reason="the layers that are adapted here are of gptqmodel")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CPU_KERNELS)
def test_kernels_of_gptqmodel_for_cpus_are_read_and_left_as_they_are(name, bias):
    layer, dense = cpu_kernel(name, bias)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for _ in range(2):
        assert is_close(dense_weight(layer).float(), dense.float(), 0.003)
        assert getattr(layer, "linear_mode", None) is None
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.skipif(not has("gptqmodel"), reason="the layers that are adapted here are of gptqmodel")
@pytest.mark.parametrize("name", ["aten", "fused-awq"])
def test_a_kernel_of_gptqmodel_that_settles_at_the_first_call_settles_for_training(name):
    layer, dense = cpu_kernel(name)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    x = X.half().requires_grad_(True)
    with torch.no_grad():
        result = model(x.detach())
    assert layer.linear_mode == "train"
    model.train()(x).sum().backward()
    delta = layer_of(model).get_delta_weight("default")
    assert is_close(x.grad.float(), (dense.float() + delta).sum(0).expand(5, IN), 0.01)
    assert is_close(result.float(), F.linear(X, dense.float() + delta, layer.bias.float()), 0.01)


@pytest.mark.stand_in
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_kernel_settles_for_training_when_an_adapter_is_added(name):
    layer = FORMS[name].quantise(linear())
    layer.linear_mode = None
    for inference_mode, settled in ((True, None), (False, "train")):
        get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], inference_mode=inference_mode))
        assert layer.linear_mode == settled
    layer.linear_mode = "inference"
    get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], inference_mode=True))
    with pytest.warns(peft.utils.warning.PeftWarning, match="0: this .*Linear was called in eval mode before"):
        get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]))


@pytest.mark.skipif(not has("gptqmodel"), reason="the layers that are adapted here are of gptqmodel")
@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_kernel_of_gptqmodel_that_has_settled_for_inference_says_so(inference_mode):
    layer, _ = cpu_kernel("aten")
    with torch.no_grad():
        layer(X.bfloat16())
    assert layer.linear_mode == "inference"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], inference_mode=inference_mode))
    found = [str(warning.message) for warning in caught if "no gradient goes through it" in str(warning.message)]
    assert bool(found) != inference_mode
    assert all(message.startswith("0: this TorchAtenLinear was called in eval mode") for message in found)


@pytest.mark.stand_in
def test_gptq_by_hand():
    layer = stand_ins.TorchLinear(linear(), bits=4)
    # Eight codes a word along the inputs: output 3, inputs 8 to 15 are the second word of its column.
    word, zero_word = int(layer.qweight[1, 3]) % 2**32, int(layer.qzeros[0, 0]) % 2**32
    codes = [word >> 4 * place & 15 for place in range(8)]
    zero = zero_word >> 4 * 3 & 15
    expected = [float(layer.scales[0, 3] * (code - zero)) for code in codes]
    assert dense_weight(layer)[3, 8:16].tolist() == expected
    assert (dense_weight(layer) - linear().weight).abs().max() < 0.6 * layer.scales.max()


@pytest.mark.stand_in
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_groups_in_the_order_of_activations(bits):
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    layer = stand_ins.TorchLinear(linear(), bits=bits, order=order)
    assert not torch.equal(layer.g_idx, layer.g_idx.sort().values)
    assert torch.equal(dense_weight(layer), layer.dense().T)


@pytest.mark.stand_in
def test_awq_by_hand():
    layer = stand_ins.AwqTorchLinear(linear())
    # Eight columns a word, in the order 0 2 4 6 1 3 5 7: column 3 is the sixth of the first word.
    words, zeros = layer.qweight[:, 0].long() % 2**32, layer.qzeros[:, 0].long() % 2**32
    codes, zero = words >> 4 * 5 & 15, (zeros >> 4 * 5 & 15).repeat_interleave(16)
    expected = layer.scales[:, 3].repeat_interleave(16) * (codes - zero)
    assert torch.equal(dense_weight(layer)[3], expected)


@pytest.mark.stand_in
@pytest.mark.parametrize("bits", [3, 8])
def test_awq_of_other_widths(bits):
    layer = stand_ins.AwqTorchLinear(linear(), bits=bits)
    assert torch.equal(dense_weight(layer), layer.dense().T)


@pytest.mark.stand_in
@pytest.mark.parametrize("mode", ["measure", "quantize", "qdq", "fake"])
def test_each_mode_of_neural_compressor(mode):
    layer = stand_ins.PatchedLinear(linear(), mode=mode)
    expected = F.linear(X, dense_weight(layer), layer.bias)
    assert torch.equal(layer(X), expected)
    assert is_close(expected, linear()(X), 0 if mode == "measure" else 0.1)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"]), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


@pytest.mark.skipif(not has("neural_compressor"), reason="the layers that are adapted here are of neural_compressor")
@pytest.mark.parametrize("optimum", [True, False])
def test_integers_of_neural_compressor(optimum):
    layer = neural_compressor_linear(linear(), optimum)
    weight = dense_weight(layer)
    assert (weight - linear().weight).abs().max() < 0.1
    result = layer(X)
    assert torch.equal(dense_weight(layer), weight.float())
    torch.testing.assert_close(result, F.linear(X, weight.float(), layer.bias))
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], use_dora=True))
    torch.testing.assert_close(model(X), result)
    model(X).sum().backward()
    assert layer_of(model).lora_B["default"].weight.grad.any()


@pytest.mark.skipif(not has("aqlm"), reason="the layers that are adapted here are of aqlm")
@pytest.mark.parametrize("rows", [1, OUT])
def test_codes_of_aqlm_that_its_cpu_kernel_has_swapped(rows):
    layer = aqlm_linear(linear(), bits=8, rows=rows)
    before = dense_weight(layer)
    layer.codes.data = layer.codes.data.transpose(0, 1).contiguous()  # as the first forward does
    layer.gemv_op = object()
    assert torch.equal(dense_weight(layer), before)


@pytest.mark.skipif(not has("aqlm"), reason="the layers that are adapted here are of aqlm")
def test_aqlm_by_hand():
    layer = aqlm_linear(linear(), bits=4)
    first, second = layer.codes[5, 2].tolist()
    block = layer.codebooks[0, first % 16, 0] + layer.codebooks[1, second % 16, 0]
    assert torch.equal(dense_weight(layer)[5, 16:24], block * layer.scales[5, 0, 0, 0])


def test_eetq_in_transformers(monkeypatch):
    eetq = pytest.importorskip("transformers.integrations.eetq")
    monkeypatch.setattr(eetq, "eetq_kernels_hub", stand_ins, raising=False)  # which it fetches from the hub
    dense = linear()
    layer = eetq.EetqLinear(IN, OUT, bias=True)
    codes, scales = stand_ins.int8_columns(dense.weight)
    layer.load_state_dict({"weight": codes, "weight_scales": scales, "bias": dense.bias.detach().half()})
    weight = dense_weight(layer)
    assert is_close(weight.float(), dense.weight, 0.01)
    model = get_peft_model(nn.Sequential(layer.requires_grad_(False)), LoraConfig(target_modules=["0"], use_dora=True))
    assert type(layer_of(model)) is EetqLoraLinear
    assert (layer_of(model).in_features, layer_of(model).out_features) == (IN, OUT)
    x = X[None].clone().requires_grad_(True)  # its backward knows no other batch
    result = model(x)
    torch.testing.assert_close(result, F.linear(x, weight.float(), layer.bias.float()))
    result.sum().backward()
    torch.testing.assert_close(x.grad[0, 0], weight.float().sum(0))


# ---------------------------------------------------------------------------------------------- what is not written


@pytest.mark.parametrize("form", [*STAND_INS, *REAL[:1]])
def test_nothing_can_be_merged(form):
    net = nn.Sequential(linear(), nn.Linear(OUT, IN), form.quantise(linear()))
    model = get_peft_model(net, LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    x, before = X, net[0].base_layer.weight.clone()
    result = model(x)
    message = f"2: its weight is kept by {form.backend_name}, which can only be read: nothing can be merged into it"
    for attempt in (
        model.merge_adapter,
        model.merge_and_unload,
        functools.partial(model.merge_adapter, safe_merge=True),
    ):
        for kind in (TypeError, NotImplementedError):
            with pytest.raises(kind, match=message):
                attempt()
    layer = model.base_model.model[2]
    with pytest.raises(TypeError, match=message):
        layer.set_base_weight(layer.get_base_weight())
    with pytest.raises(TypeError, match=message):
        layer.quantization_backend.write(layer.base_layer, layer.get_base_weight(), "2")
    assert torch.equal(net[0].base_layer.weight, before) and torch.equal(model(x), result)
    assert not any(layer.merged_adapters for layer in (net[0], layer))
    with pytest.raises(
        TypeError, match="2: init_lora_weights='olora' of the adapter 'default': its weight is kept by"
    ):
        get_peft_model(
            nn.Sequential(nn.Identity(), nn.Identity(), form.quantise(linear())),
            LoraConfig(target_modules=["2"], init_lora_weights="olora"),
        )


def test_a_backend_without_a_class_of_its_own():
    backend = ForwardOnlyQuantizationBackend("mine")
    assert (backend.backend_name, backend.supports_merge, backend.layer_type) == ("mine", False, "linear")
    with pytest.raises(TypeError, match="weight of a Identity, kept by mine, cannot be read"):
        backend.get_base_weight(nn.Identity())
    with pytest.raises(TypeError, match="kept by ForwardOnlyQuantizationBackend, cannot be read"):
        ForwardOnlyQuantizationBackend().get_base_weight(nn.Identity())


@pytest.mark.stand_in
def test_a_gptq_model_says_so_as_a_whole():
    net = nn.Sequential(stand_ins.TorchLinear(linear()))
    net.quantization_method = "gptq"
    for config in (LoraConfig(target_modules=["0"]), OFTConfig(target_modules=["0"], oft_block_size=8)):
        with pytest.raises(ValueError, match="GPTQ"):
            get_peft_model(net, config).merge_and_unload()


# ---------------------------------------------------------------------------------------------------------- names


CLASSES = {
    "gptq": (GPTQLoraLinear, dispatch_gptq),
    "awq": (AwqLoraLinear, dispatch_awq),
    "eetq": (EetqLoraLinear, dispatch_eetq),
    "inc": (IncLoraLinear, dispatch_inc),
    "te": (TeLinear, dispatch_transformer_engine),
}


@pytest.mark.stand_in
@pytest.mark.parametrize("name", CLASSES)
def test_layers_are_found_by_their_names(name):
    layer_class, dispatch = CLASSES[name]
    config = LoraConfig(r=4, target_modules=["0"])
    net = nn.Sequential(FORMS[name].quantise(linear()))
    layer = layer_of(get_peft_model(net, config))
    assert type(layer) is layer_class
    assert isinstance(layer.quantization_backend, ForwardOnlyQuantizationBackend)
    assert dispatch(nn.Linear(3, 3), "default", config) is None
    assert type(dispatch(FORMS[name].quantise(linear()), "default", config, r=4, lora_alpha=2)) is layer_class
    others = [form for other, form in FORMS.items() if other != name]
    assert all(dispatch(form.quantise(linear()), "default", config) is None for form in others)
    alone = layer_class(FORMS[name].quantise(linear()), "default", config=config, r=4, lora_alpha=2)
    assert torch.equal(alone(X), FORMS[name].quantise(linear())(X))


@pytest.mark.skipif(not has("aqlm"), reason="the layers that are adapted here are of aqlm")
def test_the_name_for_aqlm():
    config = LoraConfig(r=4)
    assert type(dispatch_aqlm(aqlm_linear(linear()), "default", config, r=4, lora_alpha=2)) is AqlmLoraLinear
    assert dispatch_aqlm(nn.Linear(3, 3), "default", config) is None


def test_where_eetq_is_missing_its_layer_is_not_there(monkeypatch):
    import_utils.is_eetq_available.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(import_utils, "_installed", lambda module: False)
        with pytest.raises(AttributeError, match="EetqLoraLinear"):
            _ = lora.EetqLoraLinear
    import_utils.is_eetq_available.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(import_utils, "_installed", lambda module: True)
        assert lora.EetqLoraLinear is EetqLoraLinear
    import_utils.is_eetq_available.cache_clear()
    assert lora.GPTQLoraLinear is GPTQLoraLinear


@pytest.mark.stand_in
def test_adalora_on_gptq():
    config = AdaLoraConfig(target_modules=["0"], total_step=10, init_r=4)
    model = get_peft_model(nn.Sequential(stand_ins.TorchLinear(linear())), config)
    assert type(layer_of(model)) is adalora.SVDQuantLinear


@pytest.mark.stand_in
def test_kinds_of_layers_of_gptqmodel():
    gptq, awq = (FORMS[name].quantise(linear()) for name in ("gptq", "awq"))
    assert is_gptqmodel_quant_linear(gptq) and not is_gptqmodel_awq_layer(gptq)
    assert is_gptqmodel_quant_linear(awq) and is_gptqmodel_awq_layer(awq)
    assert [resolve_quantization_backend(layer).backend_name for layer in (gptq, awq)] == ["gptq", "awq"]


@pytest.mark.stand_in
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_an_old_gptqmodel_is_refused(monkeypatch, name):
    monkeypatch.setattr(import_utils, "_installed", lambda module: True)
    monkeypatch.setattr(import_utils.importlib.metadata, "version", lambda package: "6.9.1")
    import_utils.is_gptqmodel_available.cache_clear()
    net = nn.Sequential(FORMS[name].quantise(linear()))
    with pytest.raises(ImportError, match="gptqmodel 7.0.0 or newer is needed, found 6.9.1"):
        get_peft_model(net, LoraConfig(target_modules=["0"]))
    assert isinstance(net[0], stand_ins.BaseQuantLinear)
    monkeypatch.undo()
    import_utils.is_gptqmodel_available.cache_clear()


@pytest.mark.stand_in
@pytest.mark.parametrize("name", FORMS)
def test_all_linear_means_these_layers_too(name):
    net = nn.Sequential(FORMS[name].quantise(linear()), nn.ReLU(), nn.Linear(OUT, 4), nn.LayerNorm(4))
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_modules == {"0", "2"}
    assert [layer.quantization_backend for layer in peft.get_layer_status(model)] == [name, None]


@pytest.mark.stand_in
@pytest.mark.parametrize("name", FORMS)
def test_a_layer_without_bias(name):
    dense = nn.Linear(IN, OUT, bias=False)
    dense.weight = linear().weight
    layer = FORMS[name].quantise(dense)
    weight = dense_weight(layer).float()
    assert torch.equal(layer(X), F.linear(X, weight))
    for config in (LoraConfig, HRAConfig, VeraConfig):
        options = {"vera_dropout": 0.0} if config is VeraConfig else {}
        model = get_peft_model(nn.Sequential(FORMS[name].quantise(dense)), config(target_modules=["0"], **options))
        torch.testing.assert_close(model(X), F.linear(X, weight), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ layers of TransformerEngine


@pytest.mark.stand_in
@pytest.mark.parametrize("layer_class", [stand_ins.LayerNormLinear, stand_ins.LayerNormMLP])
def test_a_normalisation_comes_first(layer_class):
    base = layer_class(linear())
    expected = base(X)
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    layer = layer_of(model)
    assert type(layer) is TeLinear
    assert (layer.in_features, layer.out_features) == (IN, expected.shape[1])
    term = X @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * 2
    torch.testing.assert_close(model(X), expected + term)
    assert isinstance(layer.weight, nn.Parameter)
    with pytest.raises(TypeError, match=f"weight of a {layer_class.__name__}, kept by te, cannot be read"):
        layer.get_base_weight()
    with pytest.raises(TypeError, match="cannot be read"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="does not support use_dora. Supported here: plain LoRA only"):
        get_peft_model(nn.Sequential(layer_class(linear())), LoraConfig(target_modules=["0"], use_dora=True))


@pytest.mark.stand_in
def test_a_bias_that_is_given_back_stays_beside_the_output():
    base = stand_ins.Linear(linear(), return_bias=True)
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer = layer_of(model)
    result, bias = layer(X)
    assert bias is base.bias
    torch.testing.assert_close(result, F.linear(X, dense_weight(base) + layer.get_delta_weight("default")))
    again, _ = layer(X, is_first_microbatch=True)
    assert torch.equal(again, result)


# ------------------------------------------------------------------------------------------------------------- QA-LoRA


@pytest.mark.stand_in
def test_qalora_goes_with_no_other_variant():
    config = LoraConfig(target_modules=["0"], use_qalora=True, use_dora=True)
    net = nn.Sequential(stand_ins.TorchLinear(linear()))
    with pytest.raises(ValueError, match="0 does not support use_qalora with use_dora"):
        get_peft_model(net, config)
    assert type(net[0]) is stand_ins.TorchLinear


@pytest.mark.parametrize("form", [pytest.param(FORMS["gptq"], marks=pytest.mark.stand_in, id="gptq"), *REAL[1:3]])
def test_qalora_changes_zero_points_alone(form, tmp_path):
    layer = form.quantise(linear())
    weight, scales = dense_weight(layer).float(), layer.scales.float()
    config = LoraConfig(r=4, target_modules=["0"], use_qalora=True, qalora_group_size=16, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config)
    adapter = layer_of(model)
    A, B = (factor["default"].weight for factor in (adapter.lora_A, adapter.lora_B))
    assert type(adapter) is GPTQLoraLinear and A.shape == (4, IN // 16)
    x = X.clone().requires_grad_(True)
    result = model(x)
    # Each group's sum of inputs comes in once for each output, which is what another zero point would do.
    update = (B @ A * adapter.scaling["default"] * (IN // 16) / 16).repeat_interleave(16, 1)
    zeros = update[:, ::16].T / scales
    torch.testing.assert_close(update, (scales * zeros).T.repeat_interleave(16, 1))
    torch.testing.assert_close(result, F.linear(X, weight + update, layer.bias.float()), atol=2e-5, rtol=1e-4)
    result.sum().backward()
    torch.testing.assert_close(x.grad, (weight + update).sum(0).expand(5, IN), atol=2e-5, rtol=1e-4)
    assert A.grad.any() and B.grad.any()
    with pytest.raises(NotImplementedError, match="acts on means of inputs and has no merged weight"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(nn.Sequential(form.quantise(linear())), tmp_path)
    assert torch.equal(again(X), result)


@pytest.mark.compat
@pytest.mark.skipif(not has("gptqmodel"), reason="the layers that are adapted here are of gptqmodel")
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_model_of_transformers(tmp_path, method):
    if method == "gptq" and not has("optimum"):
        pytest.skip("transformers loads models of GPTQ by optimum")
    import safetensors.torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    shape = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    torch.manual_seed(0)
    packed = LlamaForCausalLM(LlamaConfig(**shape))
    packed.config.quantization_config = {
        "awq": {"zero_point": True, "version": "gemm", "backend": "torch_awq"},
        "gptq": {"sym": False, "desc_act": False, "checkpoint_format": "gptq_v2", "backend": "torch"},
    }[method] | {"quant_method": method, "bits": 4, "group_size": 16}
    packed.config.save_pretrained(tmp_path)
    for name, module in list(packed.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed.set_submodule(name, FORMS[method].quantise(module))
    state = {name: tensor.contiguous() for name, tensor in packed.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float16)
    assert peft.utils.get_quantization_config(base, method) is base.config.quantization_config
    up = base.model.layers[0].mlp.up_proj
    assert torch.equal(dense_weight(up), packed.model.layers[0].mlp.up_proj.dense().T)

    model = peft.prepare_model_for_kbit_training(base)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True))
    assert {type(module) for module in model.modules() if isinstance(module, LoraLayer)} == {CLASSES[method][0]}
    ids = torch.arange(12).view(2, 6)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    kept = [layer.quantization_backend for layer in peft.get_layer_status(model)]
    with pytest.raises((TypeError, ValueError), match="cannot be merged|can only be read"):
        model.merge_and_unload()
    assert [layer.quantization_backend for layer in peft.get_layer_status(model)] == kept == [method] * 7


def test_what_transformers_says_of_a_model():
    config = SimpleNamespace(quantization_config=object())
    model = nn.Identity()
    model.config, model.quantization_method = config, "gptq"
    assert peft.utils.get_quantization_config(model, "gptq") is config.quantization_config
    assert peft.utils.get_quantization_config(model, "awq") is None
