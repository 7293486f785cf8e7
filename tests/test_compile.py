"""torch.compile with one graph: forward, training, and scales that change without compiling anew."""

import pytest
import torch
from torch import nn

from peft import (
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from peft.engine.layer import AdditiveLayer
from peft.helpers import rescale_adapter_scale

pytestmark = pytest.mark.compat

LINEARS = ["lin0", "lin1"]
EVERYTHING = [*LINEARS, "emb", "conv"]

SCALED = {
    "lora": lambda: LoraConfig(target_modules=LINEARS),
    "lora on every kind": lambda: LoraConfig(target_modules=EVERYTHING),
    "lora with bias": lambda: LoraConfig(target_modules=LINEARS, lora_bias=True),
    "dora": lambda: LoraConfig(target_modules=LINEARS, use_dora=True),
    "dora on every kind": lambda: LoraConfig(target_modules=EVERYTHING, use_dora=True),
    "loha": lambda: LoHaConfig(target_modules=[*LINEARS, "conv"], init_weights=False),
    "lokr": lambda: LoKrConfig(target_modules=[*LINEARS, "conv"], init_weights=False),
    "vera": lambda: VeraConfig(target_modules=LINEARS, r=4),
    "fourierft": lambda: FourierFTConfig(target_modules=LINEARS, n_frequency=20),
}
CONFIGS = SCALED | {
    "lora with dropout": lambda: LoraConfig(target_modules=LINEARS, lora_dropout=0.2),
    "lora with a copy": lambda: LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"]),
    "ia3": lambda: IA3Config(target_modules=LINEARS, feedforward_modules=["lin1"]),
    "oft": lambda: OFTConfig(target_modules=LINEARS, oft_block_size=4),
    "hra": lambda: HRAConfig(target_modules=LINEARS, r=2),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 16)
        self.lin0 = nn.Linear(16, 16)
        self.lin1 = nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, ids):
        x = self.lin1(torch.relu(self.lin0(self.emb(ids))))
        return self.conv(x.transpose(1, 2))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(config):
    torch.manual_seed(0)
    model = get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def compiled(model, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def gradients(model, run, ids):
    model.zero_grad()
    torch.manual_seed(1)
    run(ids).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


IDS = torch.arange(15).view(3, 5) % 11


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_gives_the_same_output_and_gradients(name):
    model = trained(CONFIGS[name]()).eval()
    expected = model(IDS)
    fast = compiled(model)
    torch.testing.assert_close(fast(IDS), expected)

    model.train()
    expected = gradients(model, model, IDS)
    assert set(expected) == {key for key, p in model.named_parameters() if p.requires_grad}
    actual = gradients(model, fast, IDS)
    assert set(actual) == set(expected)
    if "dropout" not in name:  # compiled code draws other numbers
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, msg=key)


@pytest.mark.parametrize("name", SCALED)
def test_changing_a_scale_compiles_nothing_anew(name):
    model = trained(SCALED[name]()).eval()
    layers = [module for module in model.modules() if isinstance(module, AdditiveLayer)]
    fast = compiled(model)
    outputs = [fast(IDS).clone()]

    def check():
        actual = fast(IDS).clone()
        torch.testing.assert_close(actual, model(IDS))
        assert not any(torch.allclose(actual, before) for before in outputs), "the scale had no effect"
        return actual

    with torch._dynamo.config.patch(error_on_recompile=True):
        with rescale_adapter_scale(model, 0.5):
            within = check()
        torch.testing.assert_close(fast(IDS), outputs[0])
        outputs.append(within)
        for layer in layers:
            layer.scale_layer(3.0)
        outputs.append(check())
        for layer in layers:
            layer.set_scale("default", 0.25)
        outputs.append(check())
        for layer in layers:
            layer.scaling["default"] = 1.75
        check()


def test_the_scales_are_floats_outside_of_compiled_code():
    layer = trained(LoraConfig(target_modules=LINEARS, r=4, lora_alpha=6)).base_model.model.lin0
    assert layer.scaling == {"default": 1.5} and type(layer.scaling["default"]) is float
    layer.scaling = {"default": 2.0}
    assert layer.scaling.copy() == {"default": 2.0} and type(layer.scaling["default"]) is float


def test_a_copied_model_has_scales_of_its_own():
    import copy

    model = trained(LoraConfig(target_modules=LINEARS)).eval()
    twin = copy.deepcopy(model)
    fast = compiled(model)
    expected = fast(IDS).clone()
    for layer in (twin.base_model.model.lin0, twin.base_model.model.lin1):
        layer.set_scale("default", 0.0)
    torch.testing.assert_close(fast(IDS), expected)
    torch.testing.assert_close(compiled(twin)(IDS), twin(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft", "vera"])
def test_the_default_backend(name):
    model = trained(CONFIGS[name]())
    fast = compiled(model, backend="inductor")
    torch.testing.assert_close(fast(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    expected, actual = gradients(model, model, IDS), gradients(model, fast, IDS)
    assert set(actual) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-5, rtol=1e-4, msg=key)
