"""A weight that is no dense parameter: a small fake-quantised linear layer that packs its weight, as one backend."""

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, get_peft_model
from peft.engine import backends
from peft.engine.backends import QuantizationBackend, register_backend, resolve_quantization_backend


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight as int8 with one scale per row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.empty_like(linear.weight, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(linear.out_features, 1))
        self.bias = nn.Parameter(linear.bias.data.clone())
        self.pack(linear.weight.data)

    def pack(self, weight):
        self.scale.copy_(weight.abs().amax(1, keepdim=True) / 127)
        self.qweight.copy_((weight / self.scale).round())

    def unpacked(self):
        return self.qweight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked(), self.bias)


@pytest.fixture(autouse=True)
def packed_backend():
    resolve_quantization_backend(nn.Linear(1, 1))  # the library's own backends are in place

    @register_backend
    class PackedBackend(QuantizationBackend):
        backend_name = "packed"
        supports_merge = True

        @classmethod
        def claims(cls, base_layer, options):
            return cls() if isinstance(base_layer, PackedLinear) else None

        def get_base_weight(self, base_layer):
            return base_layer.unpacked()

        def set_base_weight(self, peft_layer, weight_data):
            peft_layer.get_base_layer().pack(weight_data)

    yield PackedBackend
    backends._BACKENDS.remove(PackedBackend)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = PackedLinear(nn.Linear(8, 6))
        self.lin1 = nn.Linear(6, 4)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


X = torch.linspace(-1, 1, 24).view(3, 8)


def adapted(**options):
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["lin0", "lin1"], **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
class TestLora:
    def test_forward_adds_to_the_unpacked_weight(self, options):
        model = adapted(**options)
        plain = Net()
        lin0 = model.base_model.model.lin0
        merged = lin0.folded(["default"])["weight"]
        hidden = nn.functional.linear(X, merged, plain.lin0.bias)
        assert torch.allclose(lin0(X), hidden, atol=1e-5)

    def test_only_the_adapter_trains(self, options):
        model = adapted(**options)
        model(X).square().mean().backward()
        assert model.base_model.model.lin0.base_layer.bias.grad is None
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_merging_packs_again_and_unmerging_is_exact(self, options):
        model = adapted(**options)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        output = model(X)
        model.merge_adapter()
        assert model.base_model.model.lin0.base_layer.qweight.dtype == torch.int8
        assert not torch.equal(
            model.base_model.model.lin0.base_layer.qweight, before["base_model.model.lin0.base_layer.qweight"]
        )
        assert torch.allclose(model(X), output, atol=0.05)  # packing rounds
        model.unmerge_adapter()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(model(X), output)

    def test_merge_and_unload_gives_the_packed_layer(self, options):
        model = adapted(**options)
        output = model(X)
        plain = model.merge_and_unload()
        assert type(plain.lin0) is PackedLinear
        assert torch.allclose(plain(X), output, atol=0.05)


def test_status_names_the_backend():
    model = adapted()
    assert [layer.quantization_backend for layer in peft.get_layer_status(model)] == ["packed", None]
    assert peft.get_model_status(model).quantization_backend == "irregular"


def test_save_and_load(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("make", [Net, lambda: nn.Sequential(PackedLinear(nn.Linear(8, 6)), nn.Linear(6, 4))])
def test_a_copy_is_dense_and_stays_in_place(make, tmp_path):
    base = make()
    packed = next(name for name, module in base.named_modules() if isinstance(module, PackedLinear))
    other = "lin1" if packed == "lin0" else "1"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[other], modules_to_save=[packed]))
    copy = model.base_model.model.get_submodule(packed).modules_to_save["default"]
    assert isinstance(copy, nn.Linear) and torch.equal(
        copy.weight, base.get_submodule(packed).original_module.unpacked()
    )
    with pytest.raises(TypeError, match=f"{packed}: its weight is kept by packed, which can only be read"):
        model.merge_adapter()
    assert model.base_model.model.get_submodule(packed).merged_adapters == []
    assert model.merge_and_unload().get_submodule(packed) is copy


def test_a_copy_of_a_layer_of_another_kind_is_refused(packed_backend, monkeypatch):
    monkeypatch.setattr(packed_backend, "layer_type", "conv2d")
    with pytest.raises(TypeError, match="A PackedLinear, whose weight is kept by packed, cannot be copied"):
        get_peft_model(Net(), LoraConfig(r=2, target_modules=["lin1"], modules_to_save=["lin0"]))


def test_adapters_on_top_of_merged_ones_count_from_the_original_weight():
    model = adapted(use_dora=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lin0"], use_dora=True))
    layer = model.base_model.model.lin0
    original = layer.get_base_weight().clone()
    model.merge_adapter(["default"])
    assert not torch.equal(layer.get_base_weight(), original)
    assert torch.equal(layer.unmerged_weight(), original)
