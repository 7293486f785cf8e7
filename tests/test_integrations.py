"""The meeting points with other libraries: meta device, device maps, quantised weights, optional packages."""

import sys
import threading
import types

import pytest
import torch
from torch import nn

from peft import import_utils
from peft.utils.integrations import (
    TpInfo,
    check_deepspeed_zero3_enabled,
    dequantize_bnb_weight,
    dequantize_module_weight,
    dtensor_from_local_like,
    gather_params_ctx,
    get_bnb_param_type,
    get_layer_device_map,
    init_empty_weights,
    map_cache_to_layer_device_map,
    skip_init_on_device,
)

pytestmark = pytest.mark.compat


class Params4bit(nn.Parameter):
    """Stands for the class of that name in bitsandbytes."""


class Int8Params(nn.Parameter):
    """Stands for the class of that name in bitsandbytes."""


# ----------------------------------------------------------------------------------------------------- meta device


@pytest.mark.parametrize("include_buffers, device_of_buffers", [(None, "cpu"), (False, "cpu"), (True, "meta")])
def test_parameters_are_made_without_memory(include_buffers, device_of_buffers):
    with init_empty_weights(include_buffers):
        module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
        entries = nn.ParameterDict({"a": nn.Parameter(torch.ones(2), requires_grad=False)})
    assert {parameter.device.type for parameter in (*module.parameters(), *entries.parameters())} == {"meta"}
    assert {buffer.device.type for buffer in module.buffers()} == {device_of_buffers}
    assert not entries["a"].requires_grad and module[0].weight.requires_grad
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def test_a_parameter_without_memory_keeps_its_class_and_attributes():
    class Marked(nn.Parameter):
        pass

    module = nn.Module()
    with init_empty_weights():
        parameter = Marked(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
        parameter.mark = "m"
        module.weight = parameter
        module.lazy = nn.LazyLinear(3)
        module.none = None
    assert type(module.weight) is Marked
    assert (module.weight.mark, module.weight.dtype, module.weight.requires_grad) == ("m", torch.bfloat16, False)
    assert isinstance(module.lazy.weight, nn.UninitializedParameter)


def test_the_context_nests_and_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="stop"), init_empty_weights():
        with init_empty_weights(include_buffers=True):
            assert nn.BatchNorm1d(2).running_mean.is_meta
        assert not nn.BatchNorm1d(2).running_mean.is_meta
        assert nn.Linear(1, 1).weight.is_meta
        raise RuntimeError("stop")
    assert not nn.Linear(1, 1).weight.is_meta


def test_other_threads_are_not_concerned():
    made = []
    with init_empty_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(1, 1)))
        thread.start()
        thread.join()
    assert not made[0].weight.is_meta


def test_a_function_can_ask_for_real_tensors():
    @skip_init_on_device
    def make(size, *, bias):
        """Make."""
        return nn.Linear(size, size, bias=bias)

    with init_empty_weights():
        assert not make(2, bias=True).weight.is_meta
        assert nn.Linear(1, 1).weight.is_meta
    assert make.__doc__ == "Make."


# ------------------------------------------------------------------------------------------------- quantised weights


def test_bitsandbytes_is_recognised_by_its_parameters():
    weight = torch.zeros(1, 1)
    assert get_bnb_param_type(nn.Parameter(weight)) is False
    assert get_bnb_param_type(Params4bit(weight)) == "4bit"
    assert get_bnb_param_type(Int8Params(weight)) == "8bit"


def test_plain_weights_are_given_back():
    layer = nn.Linear(2, 2)
    assert dequantize_module_weight(layer) is layer.weight
    tensor = torch.zeros(2)
    assert dequantize_bnb_weight(tensor) is tensor
    with pytest.raises(TypeError, match="got list"):
        dequantize_bnb_weight([1.0])
    with pytest.raises(TypeError, match="got str"):
        dequantize_module_weight(types.SimpleNamespace(weight="w"))


def test_rows_of_8_bit_are_scaled_back():
    weight = Int8Params(torch.tensor([[127, -127], [0, 64]], dtype=torch.int8), requires_grad=False)
    state = types.SimpleNamespace(SCB=torch.tensor([2.0, 1.27]))
    expected = torch.tensor([[2.0, -2.0], [0.0, 0.64]])
    torch.testing.assert_close(dequantize_bnb_weight(weight, state), expected)
    torch.testing.assert_close(dequantize_module_weight(types.SimpleNamespace(weight=weight, state=state)), expected)
    weight.SCB = state.SCB  # where it is before the first forward
    torch.testing.assert_close(dequantize_bnb_weight(weight, types.SimpleNamespace(SCB=None)), expected)
    with pytest.raises(ValueError, match="state=layer.state"):
        dequantize_bnb_weight(weight)


def test_4_bit_goes_through_bitsandbytes(monkeypatch):
    calls = []
    functional = types.SimpleNamespace(dequantize_4bit=lambda data, state: calls.append(state) or data + 1)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    weight = Params4bit(torch.zeros(2), requires_grad=False)
    weight.quant_state = "state"
    assert dequantize_bnb_weight(weight).tolist() == [1.0, 1.0]
    assert calls == ["state"]


def test_hqq_dequantises_itself():
    layer = types.SimpleNamespace(W_q=None, dequantize=lambda: torch.ones(1))
    assert dequantize_module_weight(layer).item() == 1


# -------------------------------------------------------------------------------------------------------- DeepSpeed


def test_without_zero3_nothing_is_gathered():
    assert check_deepspeed_zero3_enabled() is False
    with gather_params_ctx(nn.Linear(1, 1).weight, modifier_rank=None):
        pass


def test_with_zero3_deepspeed_gathers(monkeypatch):
    calls = []

    class Gathered:
        def __init__(self, param, **options):
            calls.append((param, options))

        def __enter__(self):
            calls.append("in")

        def __exit__(self, *exception):
            calls.append("out")

    integration = types.SimpleNamespace(is_deepspeed_zero3_enabled=lambda: True)
    monkeypatch.setitem(sys.modules, "transformers.integrations.deepspeed", integration)
    zero = types.SimpleNamespace(GatheredParameters=Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    with gather_params_ctx("p", fwd_module="m"):
        calls.append("inside")
    assert calls == [("p", {"modifier_rank": 0, "fwd_module": "m"}), "in", "inside", "out"]


# ------------------------------------------------------------------------------------------------------ device maps


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 10}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))


@pytest.mark.parametrize(
    "device_map, expected",
    [
        ({}, None),
        ({"": "cpu"}, {0: "cpu", 1: "cpu", 2: "cpu"}),
        ({"model": "cuda:1", "lm_head": 0}, {0: "cuda:1", 1: "cuda:1", 2: "cuda:1"}),
        (
            {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "disk", "model.layers.2.mlp": 1},
            {0: 0, 1: 0, 2: 1},
        ),
        ({"model.layers": "cpu", "model.layers.1": 1}, {0: 1, 1: 1, 2: 1}),
    ],
)
def test_the_devices_of_the_layers(llama, monkeypatch, device_map, expected):
    monkeypatch.setattr(llama, "hf_device_map", device_map, raising=False)
    assert get_layer_device_map(llama) == expected


def test_a_layer_without_a_device_is_named(llama, monkeypatch):
    monkeypatch.setattr(llama, "hf_device_map", {"model.layers.0": 0}, raising=False)
    with pytest.raises(RuntimeError, match=r"nothing for 'model\.layers\.1'"):
        get_layer_device_map(llama)


def test_the_layers_of_a_decoder_count():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 10}
    model = T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=3, **sizes))
    model.hf_device_map = {"encoder": 0, "decoder": 1}
    assert get_layer_device_map(model) == {0: 1, 1: 1, 2: 1}


def test_a_cache_follows_the_layers(llama, monkeypatch):
    from transformers import DynamicCache, EncoderDecoderCache

    def filled():
        cache = DynamicCache()
        for layer in range(3):
            cache.update(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), layer)
        return cache

    def devices(cache):
        return [part.device.type for layer in cache.layers for part in (layer.keys, layer.values)]

    cache, both = filled(), EncoderDecoderCache(filled(), filled())
    map_cache_to_layer_device_map(llama, cache)
    assert devices(cache) == ["cpu"] * 6  # no device map

    monkeypatch.setattr(llama, "hf_device_map", {"model.layers.0": "cpu", "model": "meta"}, raising=False)
    map_cache_to_layer_device_map(llama, cache)
    map_cache_to_layer_device_map(llama, both)
    map_cache_to_layer_device_map(llama, ("not", "a", "cache"))
    assert devices(cache) == ["meta"] * 6  # what is offloaded to the CPU is computed on the device in use
    assert devices(both.self_attention_cache) == ["meta"] * 6
    assert devices(both.cross_attention_cache) == ["cpu"] * 6


# -------------------------------------------------------------------------------------------------- tensor parallel


def test_a_local_tensor_follows_the_reference(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    plain = torch.ones(2)
    assert dtensor_from_local_like(plain, torch.ones(2)) is plain
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        made = dtensor_from_local_like(plain, DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)]))
        assert made.placements == (Shard(0),) and made.to_local().tolist() == [1.0, 1.0]
        assert TpInfo({"q": "colwise"}, mesh, tp_size=1).tp_size == 1
    finally:
        distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------ optional packages


@pytest.fixture
def installed(monkeypatch):
    """Pretends that a package is installed in some version; None means that it is not."""

    def pretend(package, version):
        monkeypatch.setattr(import_utils, "_installed", lambda module: version is not None and module == package)
        monkeypatch.setattr("importlib.metadata.version", lambda name: version)

    for name, check in vars(import_utils).items():
        if name.startswith("is_"):
            check.cache_clear()
    yield pretend
    for name, check in vars(import_utils).items():
        if name.startswith("is_"):
            check.cache_clear()


@pytest.mark.parametrize(
    "package, check, oldest, too_old",
    [
        ("gptqmodel", import_utils.is_gptqmodel_available, "7.0.0", "6.9.9"),
        ("torchao", import_utils.is_torchao_available, "0.16.0", "0.15.1"),
    ],
)
def test_a_package_that_is_too_old_is_an_error(installed, package, check, oldest, too_old):
    installed(package, None)
    assert check() is False
    check.cache_clear()
    for version in (oldest, f"{oldest}.dev1+cpu", "99.0"):
        installed(package, version)
        assert check() is True
        check.cache_clear()
    installed(package, too_old)
    with pytest.raises(ImportError, match=f"{package} {oldest} or newer is needed, found {too_old}"):
        check()


@pytest.mark.parametrize("version, expected", [(None, False), ("0.17.9", False), ("0.18.0", True), ("1.0", True)])
def test_torchao_0_18(installed, version, expected):
    installed("torchao", version)
    assert import_utils.is_torchao_ge_v0_18_0() is expected


def test_every_check_answers_without_its_package(installed):
    installed("nothing", None)
    checks = [check for name, check in vars(import_utils).items() if name.startswith("is_")]
    assert len(checks) == 15
    assert {check() for check in checks} == {False}
