"""LoftQ: factors that make up for a quantisation; on layers, and on models that are in four bits already."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft import LoftQConfig, LoraConfig, get_peft_model, replace_lora_weights_loftq
from peft.utils import loftq_utils
from peft.utils.loftq_utils import OriginalWeights, alternate, loftq_init, quantised_part, residual_factors

with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def rounded(weight, steps=3):
    """A quantisation: a few values between the smallest and the largest one of a matrix."""
    low, high = weight.min(), weight.max()
    return ((weight - low) / (high - low) * steps).round() / steps * (high - low) + low


class Bitsandbytes(types.ModuleType):
    """Stands in for the library: four bits by `rounded`, eight by rows."""

    def __init__(self):
        super().__init__("bitsandbytes.functional")

    @staticmethod
    def quantize_4bit(weight, quant_type, compress_statistics, blocksize):
        assert (quant_type, compress_statistics, blocksize) == ("nf4", False, 64) and weight.is_contiguous()
        return rounded(weight), None

    @staticmethod
    def dequantize_4bit(codes, state):
        return codes.half()

    @staticmethod
    def int8_vectorwise_quant(weight):
        assert weight.dtype == torch.float16
        largest = weight.abs().amax(1).float()
        return (weight.float() * 127 / largest.unsqueeze(1)).round().to(torch.int8), largest, None


@pytest.fixture
def bitsandbytes(monkeypatch):
    package = types.ModuleType("bitsandbytes")
    package.functional = Bitsandbytes()
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", package.functional)
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        monkeypatch.setattr(loftq_utils, name, lambda: True)
    return package


# -------------------------------------------------------------------------------------------------------- the mathematics


def test_a_residual_is_split_evenly():
    A, B = residual_factors(torch.diag(torch.tensor([9.0, 4.0, 1.0])), rank=2)
    assert torch.allclose(B @ A, torch.diag(torch.tensor([9.0, 4.0, 0.0])), atol=1e-5)
    assert torch.allclose(A @ A.T, B.T @ B, atol=1e-5)


def test_one_turn_is_the_residual_of_the_quantisation():
    W = torch.randn(8, 12)
    ((A, B),) = alternate(W, rounded, rank=3, num_iter=1)
    assert torch.equal(A, residual_factors(W - rounded(W), 3)[0])
    assert torch.equal(quantised_part(W, rounded, []), rounded(W))


def test_each_turn_quantises_what_the_factors_leave():
    W = torch.randn(8, 12)
    turns = alternate(W, rounded, rank=3, num_iter=3)
    assert len(turns) == 3
    (A, B), (A2, B2) = turns[:2]
    Q = rounded(W - B @ A)
    assert torch.equal(quantised_part(W, rounded, turns[:1]), Q)
    assert torch.equal(A2, residual_factors(W - Q, 3)[0])
    assert torch.equal(B2, residual_factors(W - Q, 3)[1])


def test_factors_bring_the_quantised_weight_nearer():
    W = torch.randn(16, 16)
    A, B = alternate(W, rounded, rank=4, num_iter=1)[-1]
    assert (W - rounded(W) - B @ A).norm() < 0.9 * (W - rounded(W)).norm()


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("num_iter", [1, 3])
def test_the_start_is_the_last_turns(bitsandbytes, num_bits, num_iter):
    W = torch.randn(8, 64).half()
    before = W.clone()
    Q, A, B = loftq_init(W, num_bits=num_bits, reduced_rank=3, num_iter=num_iter)
    assert torch.equal(W, before)
    assert (Q.dtype, A.dtype, B.dtype) == (torch.float16, torch.float32, torch.float32)
    turns = alternate(W.float(), loftq_utils.ROUNDING[num_bits], 3, num_iter)
    assert torch.equal(A, turns[-1][0]) and torch.equal(B, turns[-1][1])
    assert torch.equal(Q, quantised_part(W.float(), loftq_utils.ROUNDING[num_bits], turns[:-1]).half())


def test_eight_bits_are_finer_than_four(bitsandbytes):
    W = torch.randn(8, 64)
    errors = [(W - loftq_utils.ROUNDING[bits](W)).norm() for bits in (4, 8)]
    assert errors[1] < 0.1 * errors[0]


@with_bitsandbytes
@pytest.mark.parametrize("num_bits, error", [(4, 0.2), (8, 0.02)])
def test_the_librarys_own_quantisation(num_bits, error):
    W = torch.randn(8, 64)
    Q, A, B = loftq_init(W, num_bits=num_bits, reduced_rank=3, num_iter=2)
    assert (W - Q).norm() < error * W.norm()
    assert (W - Q - B @ A).norm() < (W - Q).norm()


def test_settings_that_do_not_exist_are_refused(bitsandbytes):
    with pytest.raises(ValueError, match="4 or 8 bits, got loftq_bits=3"):
        loftq_init(torch.randn(4, 4), num_bits=3, reduced_rank=2)
    with pytest.raises(ValueError, match="one step at least, got loftq_iter=0"):
        loftq_init(torch.randn(4, 4), num_bits=4, reduced_rank=2, num_iter=0)
    with pytest.raises(ValueError, match="1000 steps at most, .* got loftq_iter=1001"):
        loftq_init(torch.randn(4, 4), num_bits=4, reduced_rank=2, num_iter=1001)


def test_bitsandbytes_is_needed(monkeypatch):
    monkeypatch.setattr(loftq_utils, "is_bnb_available", lambda: False)
    monkeypatch.setattr(loftq_utils, "is_bnb_4bit_available", lambda: False)
    for bits in (4, 8):
        with pytest.raises(ValueError, match="bitsandbytes, which is not installed"):
            loftq_init(torch.randn(4, 4), num_bits=bits, reduced_rank=2)
    net = Net()
    with pytest.raises(ValueError, match="bitsandbytes, which is not installed"):
        get_peft_model(net, config())
    assert type(net.layer) is nn.Linear
    with pytest.raises(ValueError, match="for models in 4 bits, which need bitsandbytes"):
        replace_lora_weights_loftq(net)


# ---------------------------------------------------------------------------------------------------------------- layers


class Net(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        self.layer = layer or nn.Linear(64, 16)
        self.other = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


def config(**options):
    settings = LoftQConfig(loftq_bits=options.pop("bits", 4), loftq_iter=options.pop("iterations", 2))
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["layer"], **options}
    return LoraConfig(init_lora_weights="loftq", loftq_config=settings, **options)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_weight_becomes_the_quantised_one(bitsandbytes, bits, dtype, use_dora):
    net = Net().to(dtype)
    W = net.layer.weight.data.clone()
    layer = get_peft_model(net, config(bits=bits, use_dora=use_dora)).base_model.model.layer
    Q, A, B = loftq_init(W, num_bits=bits, reduced_rank=4, num_iter=2)
    assert torch.equal(layer.base_layer.weight, Q) and layer.base_layer.weight.dtype == dtype
    assert torch.equal(layer.lora_A["default"].weight, A.to(dtype).float())
    assert torch.equal(layer.lora_B["default"].weight, B.to(dtype).float())
    if use_dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert torch.allclose(magnitude, (Q.float() + B @ A).norm(dim=1), rtol=1e-2)


def test_a_transposed_weight_is_quantised_as_it_is_used(bitsandbytes):
    from transformers.pytorch_utils import Conv1D

    net = Net(Conv1D(16, 64))
    W = net.layer.weight.data.clone()
    layer = get_peft_model(net, config(fan_in_fan_out=True)).base_model.model.layer
    Q, A, _ = loftq_init(W.T, num_bits=4, reduced_rank=4, num_iter=2)
    assert torch.equal(layer.base_layer.weight.T, Q) and torch.equal(layer.lora_A["default"].weight, A)


def test_the_layers_method_starts_an_adapter_over(bitsandbytes):
    layer = get_peft_model(Net(), LoraConfig(r=4, target_modules=["layer"])).base_model.model.layer
    W = layer.base_layer.weight.data.clone()
    layer.loftq_init("default", config())
    assert torch.equal(layer.base_layer.weight, loftq_init(W, 4, 4, 2)[0])
    with pytest.raises(
        ValueError, match="layer: init_lora_weights='loftq' of the adapter 'default' needs loftq_config"
    ):
        layer.reset_lora_parameters("default", "loftq")


@pytest.mark.parametrize("layer", [nn.Embedding(5, 4), nn.Conv2d(2, 4, 3)], ids=["embedding", "convolution"])
def test_only_linear_layers_are_quantised(bitsandbytes, layer):
    net = Net(layer)
    with pytest.raises(
        TypeError, match=f"layer: .*'loftq'.* is for linear layers, .* not for a {type(layer).__name__}"
    ):
        get_peft_model(net, config())
    assert net.layer is layer


def test_an_injection_that_fails_leaves_the_base_weight(bitsandbytes):
    net = Net()
    net.other.double()
    before = net.layer.weight.clone()
    with pytest.raises(TypeError):
        get_peft_model(net, config(target_modules=["layer", "other"]))
    assert torch.equal(net.layer.weight, before)


# ------------------------------------------------------------------------------------------------------ quantised models


class Params4bit(nn.Parameter):
    """A weight as bitsandbytes keeps it, but for the packing."""

    def __new__(cls, values):
        return nn.Parameter.__new__(cls, values, requires_grad=False)


class Model(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"q": nn.Linear(64, 16), "v": nn.Linear(64, 16)})
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.model["q"](x) + self.model["v"](x))


ORIGINAL = {
    f"model.{name}.weight": torch.randn(16, 64, generator=torch.Generator().manual_seed(n))
    for n, name in enumerate("qv")
}
KEYS = [f"model.{name}" for name in "qv"]


@pytest.fixture
def quantised(bitsandbytes, monkeypatch):
    def dequantise(weight, state=None):
        return weight.data.half()

    monkeypatch.setattr(loftq_utils, "dequantize_bnb_weight", dequantise)
    net = Model()
    for name in "qv":
        net.model[name].weight = Params4bit(rounded(ORIGINAL[f"model.{name}.weight"]))
    return get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["q", "v"]))


def layers_of(model):
    return {key: model.base_model.model.get_submodule(key) for key in KEYS}


def factors(layer):
    return layer.lora_A["default"].weight.data.clone(), layer.lora_B["default"].weight.data.clone()


def is_replaced(key, layer):
    A, B = residual_factors(ORIGINAL[f"{key}.weight"] - layer.base_layer.weight.half().float(), 4)
    return all(torch.equal(*pair) for pair in zip(factors(layer), (A, B)))


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder / name


@pytest.mark.parametrize("where", ["file", "folder", "parts", "index", "no prefix", "name"])
def test_factors_are_replaced_from_the_original_weights(quantised, tmp_path, where):
    tensors = ORIGINAL
    if where == "no prefix":
        tensors = {key.removeprefix("model."): value for key, value in ORIGINAL.items()}
    path = tmp_path
    if where in ("parts", "index"):
        files = {}
        for number, (key, value) in enumerate(ORIGINAL.items()):
            files[key] = write(tmp_path, {key: value}, f"model-{number}.safetensors").name
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))
        path = index if where == "index" else tmp_path
    else:
        file = write(tmp_path, tensors)
        path = file if where == "file" else tmp_path
    if where == "name":
        quantised.get_base_model().name_or_path = str(tmp_path)
        path = None
    replace_lora_weights_loftq(quantised, model_path=path)
    assert all(is_replaced(key, layer) for key, layer in layers_of(quantised).items())
    assert all(layer.lora_A["default"].weight.requires_grad for layer in layers_of(quantised).values())


def test_a_callback_decides_on_each_module(quantised, tmp_path):
    write(tmp_path, ORIGINAL)
    before, seen = {key: factors(layer) for key, layer in layers_of(quantised).items()}, []

    def keep(model, name):
        seen.append(name)
        assert model is quantised and is_replaced(name, layers_of(model)[name])
        return name.endswith("v")

    replace_lora_weights_loftq(quantised, model_path=tmp_path, callback=keep)
    assert seen == KEYS
    layers = layers_of(quantised)
    assert is_replaced("model.v", layers["model.v"])
    assert all(torch.equal(*pair) for pair in zip(factors(layers["model.q"]), before["model.q"]))


def test_what_fails_leaves_the_factors_as_they_were(quantised, tmp_path):
    write(tmp_path, {"model.q.weight": ORIGINAL["model.q.weight"], "model.w.weight": torch.ones(1)})
    before = {key: factors(layer) for key, layer in layers_of(quantised).items()}
    with pytest.raises(ValueError, match=r"have no weight 'model.v.weight' \(nearest: model\.[wq]\.weight\)"):
        replace_lora_weights_loftq(quantised, model_path=tmp_path)
    after = {key: factors(layer) for key, layer in layers_of(quantised).items()}
    assert all(torch.equal(*pair) for key in KEYS for pair in zip(before[key], after[key]))


def test_files_that_are_not_there_are_named(quantised, tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            replace_lora_weights_loftq(quantised, model_path=path)
    with pytest.raises(ValueError, match="does not say where it is from: pass model_path"):
        replace_lora_weights_loftq(quantised)
    quantised.get_base_model().name_or_path = "some/model"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="weights of 'some/model' are not in the hub client's cache"):
        replace_lora_weights_loftq(quantised)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="neither a safetensors file nor an index of such"):
        replace_lora_weights_loftq(quantised, model_path=tmp_path)


def test_models_that_are_not_quantised_are_refused(quantised, tmp_path):
    write(tmp_path, ORIGINAL)
    plain = get_peft_model(Model(), LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match=r"No layer .* both a LoRA adapter 'default' and a weight in 4 bits"):
        replace_lora_weights_loftq(plain, model_path=tmp_path)
    with pytest.raises(ValueError, match=r"a LoRA adapter 'x' and .*adapters are \['default'\]"):
        replace_lora_weights_loftq(quantised, model_path=tmp_path, adapter_name="x")
    with pytest.raises(TypeError, match="takes the PeftModel itself, .* got a LoraModel with 'model.model.q'"):
        replace_lora_weights_loftq(quantised.base_model, model_path=tmp_path)


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    weights = OriginalWeights.in_file(write(tmp_path, ORIGINAL), prefix="model")
    assert torch.equal(weights.read("model.q.weight"), ORIGINAL["model.q.weight"])
    assert torch.equal(weights.read("q.weight"), ORIGINAL["model.q.weight"])
