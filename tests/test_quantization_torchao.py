"""Adapters on layers whose weights torchao has quantised, computed on the CPU."""

import functools
import warnings

import pytest
import torch
from matrix import output, same
from quantized import CHECKS, METHODS, Form, all_same, is_close, layer_of, linear, merged_quietly, parts, run
from torch import nn
from versions import skip_file

import peft
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.engine.backends import dense_weight, resolve_quantization_backend
from peft.tuners import lora
from peft.tuners.lora.torchao import TorchaoLoraLinear, dispatch_torchao
from peft.utils.integrations import dequantize_module_weight
from peft.utils.quantization_utils import TorchaoBackend, get_quantization_kwargs

skip_file("torchao", "0.16.0", "has tensors that the library does not read")
quantization = pytest.importorskip("torchao.quantization", reason="the weights that are adapted here are of torchao")
pytestmark = pytest.mark.compat


def quantised(linear: nn.Linear, recipe) -> nn.Module:
    model = nn.Sequential(linear)
    quantization.quantize_(model, recipe)
    return model[0]


def form(name: str, recipe, **options) -> Form:
    return Form(name, "torchao", functools.partial(quantised, recipe=recipe), **options)


NO_GRADIENT = "torchao gives no gradient to activations that it quantises"
GROUPS = quantization.PerGroup(32)
FORMS = (
    form("int8", quantization.Int8WeightOnlyConfig()),
    form("int4", quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=GROUPS)),
)
OTHER_FORMS = (
    form("float8", quantization.Float8WeightOnlyConfig()),
    form(
        "int8-dynamic", quantization.Int8DynamicActivationInt8WeightConfig(), tolerance=0.05, no_training=NO_GRADIENT
    ),
    form(
        "int2-rows",
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=quantization.PerAxis(0)),
        rounding=2,
    ),
    form(
        "int4-dynamic",
        quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=GROUPS),
        tolerance=0.05,
        no_training=NO_GRADIENT,
    ),
)
SOME = [case for case in METHODS if case.variant.name in ("LORA", "LORA-dora", "OFT")]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda case: str(case.variant))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_method(check, method, form, tmp_path):
    run(check, method, form, tmp_path)


@pytest.mark.parametrize("form", OTHER_FORMS, ids=str)
@pytest.mark.parametrize("method", SOME, ids=lambda case: str(case.variant))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_other_forms(check, method, form, tmp_path):
    run(check, method, form, tmp_path)


# ------------------------------------------------------------------------------------------------------- what is written

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
INT8 = quantization.Int8WeightOnlyConfig()
RECIPES = {
    "int8": INT8,
    "int8-tensor": quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor()),
    "int8-dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    "float8": quantization.Float8WeightOnlyConfig(),
    "int4-groups": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=GROUPS),
    "int4-asymmetric": quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=GROUPS, mapping_type=quantization.MappingType.ASYMMETRIC
    ),
    "int3-rows": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=quantization.PerAxis(0)),
    "int4-dynamic": quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=GROUPS
    ),
}


class WithRecipe(nn.Sequential):
    """A model that knows how it was quantised, as one of transformers does."""

    def __init__(self, recipe, *layers):
        super().__init__(*layers)
        self.calls = 0
        self.hf_quantizer = type("Quantizer", (), {"quantization_config": self})()
        self.recipe = recipe

    def get_apply_tensor_subclass(self):
        self.calls += 1
        return self.recipe


def attributes(weight):
    return weight.__tensor_flatten__()[1]


@pytest.mark.parametrize("name", RECIPES)
def test_the_tensor_itself_says_as_much_as_the_recipe(name):
    recipe, weight = RECIPES[name], linear().weight.detach() * 1.1
    layer = quantised(linear(), recipe)
    told, untold = TorchaoBackend(lambda: recipe), TorchaoBackend(None)
    by_recipe, by_itself = told.quantised(layer, weight, "layer"), untold.quantised(layer, weight, "layer")
    for new in (by_recipe, by_itself):
        assert type(new) is type(layer.weight) and isinstance(new, nn.Parameter) and not new.requires_grad
        assert attributes(new) == attributes(layer.weight)
    assert all_same(parts("", by_itself), parts("", by_recipe))
    assert not all_same(parts("", by_itself), parts("", layer.weight))


def test_the_recipe_of_the_model_is_found():
    model = WithRecipe(INT8, quantised(linear(), INT8))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    backend = layer_of(adapted).quantization_backend
    assert backend.get_apply_tensor_subclass == model.get_apply_tensor_subclass
    assert get_quantization_kwargs(model) == {"get_apply_tensor_subclass": model.get_apply_tensor_subclass}
    assert get_quantization_kwargs(nn.Linear(1, 1)) == {}
    assert model.calls == 0
    merged_quietly(adapted)
    assert model.calls == 1
    given = resolve_quantization_backend(model[0].get_base_layer(), get_apply_tensor_subclass=len)
    assert given.get_apply_tensor_subclass is len


def test_a_recipe_by_names_of_modules_is_not_for_a_module_alone():
    recipe = quantization.FqnToConfig({"0": INT8})
    adapted = get_peft_model(
        WithRecipe(recipe, quantised(linear(), INT8)), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    weight = layer_of(adapted).get_base_weight() + layer_of(adapted).get_delta_weight("default")
    merged_quietly(adapted)
    assert all_same(
        parts("", layer_of(adapted).get_base_layer().weight),
        parts("", quantised(linear(weight.detach()), INT8).weight),
    )


def test_the_recipe_of_another_form_is_refused():
    model = WithRecipe(quantization.Float8WeightOnlyConfig(), quantised(linear(), INT8))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))
    weight = layer_of(adapted).get_base_layer().weight
    with pytest.raises(TypeError, match="0: its weight is a Int8Tensor, but .* makes it a Float8Tensor"):
        adapted.merge_adapter()
    assert layer_of(adapted).get_base_layer().weight is weight and layer_of(adapted).merged_adapters == []


def kept_by_a_kernel(can_read):
    """A layer with a weight in a form of torchao's that has no recipe, and that perhaps cannot be undone."""

    class Packed(torch.Tensor):
        __module__ = "torchao.prototype"

        def dequantize(self):
            if not can_read:
                raise NotImplementedError("no kernel")
            return self.as_subclass(torch.Tensor)

    layer = linear()
    layer.weight = nn.Parameter(linear().weight.detach().as_subclass(Packed), requires_grad=False)
    layer.weight.__class__ = Packed
    return layer


def test_a_form_without_recipe_is_read_but_not_written():
    adapted = get_peft_model(nn.Sequential(kept_by_a_kernel(True)), LoraConfig(target_modules=["0"], use_dora=True))
    assert torch.equal(layer_of(adapted).get_base_weight(), linear().weight)
    with pytest.raises(ValueError, match="0: its weight is a Packed, of which torchao keeps no recipe"):
        adapted.merge_adapter()


def test_a_form_that_cannot_be_read_takes_what_adds_to_the_output():
    adapted = get_peft_model(nn.Sequential(kept_by_a_kernel(False)), LoraConfig(target_modules=["0"]))
    assert type(layer_of(adapted).quantization_backend) is TorchaoBackend
    with pytest.raises(NotImplementedError, match="torchao cannot dequantise a weight of the class Packed"):
        adapted.merge_adapter()


# ------------------------------------------------------------------------------------------------------- other layers


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, IA3Config], ids=lambda config: config.__name__)
@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_other_kinds_of_layers(kind, config, tmp_path):
    recipe = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=quantization.PerAxis(0))

    def make():
        torch.manual_seed(0)
        layer = (
            nn.Embedding(12, 64) if kind == "embedding" else nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")
        )
        model = nn.Sequential(layer)
        quantization.quantize_(model, recipe, filter_fn=lambda module, name: module is layer)
        return model

    x = torch.arange(12).view(3, 4) if kind == "embedding" else torch.randn(2, 8, 5, 5)
    options = {"feedforward_modules": []} if config is IA3Config else {"r": 2}
    torch.manual_seed(1)
    model = get_peft_model(make(), config(target_modules=["0"], **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.2
    layer = layer_of(model)
    assert layer.quantization_backend.layer_type == kind == layer.kind.name
    base = make()
    with model.disable_adapter():
        assert same(output(model, x), output(base, x))
    dense = make()
    dense[0].weight = nn.Parameter(dequantize_module_weight(base[0]))
    model.save_pretrained(tmp_path)
    result = output(model, x)
    assert is_close(result, output(peft.PeftModel.from_pretrained(dense, tmp_path), x), 1e-5)
    assert same(output(peft.PeftModel.from_pretrained(make(), tmp_path), x), result)
    weight, kept = layer.get_base_layer().weight, parts("", layer.get_base_layer().weight)
    merged_quietly(model)
    assert is_close(output(model, x), result, 0.05) and not is_close(output(model, x), output(base, x), 0.05)
    assert type(layer.get_base_layer().weight) is type(weight)
    model.unmerge_adapter()
    assert layer.get_base_layer().weight is weight and all_same(parts("", weight), kept)
    assert same(output(model, x), result)


def test_copies_have_dense_weights():
    model = nn.Sequential(quantised(linear(), INT8), quantised(nn.Linear(32, 64), INT8))
    expected = dequantize_module_weight(model[1])
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], modules_to_save=["1"])).eval()
    wrapper = adapted.base_model.model[1]
    copy = wrapper.modules_to_save["default"]
    assert type(copy) is nn.Linear and torch.equal(copy.weight, expected) and "Int8" not in repr(copy)
    copy.weight.data *= 2
    trained, weight = output(adapted, X), wrapper.original_module.weight
    merged_quietly(adapted)
    assert is_close(output(adapted, X), trained, 0.02) and type(wrapper.original_module.weight) is type(weight)
    adapted.unmerge_adapter()
    assert wrapper.original_module.weight is weight and same(output(adapted, X), trained)
    assert adapted.merge_and_unload()[1] is copy


# ------------------------------------------------------------------------------------------------------- what it is called


def test_clients_know_layers_by_their_class():
    layer = quantised(linear(), INT8)
    config = LoraConfig(r=3)
    made = dispatch_torchao(layer, "a", config, r=3, get_apply_tensor_subclass=len)
    assert type(made) is TorchaoLoraLinear and isinstance(made, lora.Linear) and made.r == {"a": 3}
    assert made.quantization_backend.get_apply_tensor_subclass is len
    assert dispatch_torchao(linear(), "a", config, r=3) is None
    by_hand = TorchaoLoraLinear(layer, "a", config, r=3, get_apply_tensor_subclass=max)
    assert by_hand.quantization_backend.get_apply_tensor_subclass is max
    assert type(layer_of(get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"])))) is TorchaoLoraLinear


def test_the_functions_that_dequantise_agree():
    layer = quantised(linear(), INT8)
    assert type(dense_weight(layer)) is torch.Tensor
    assert torch.equal(dense_weight(layer), dequantize_module_weight(layer))
    assert torch.equal(dense_weight(linear()), linear().weight)


def test_condition_numbers_are_those_of_the_values():
    from peft.helpers import KappaTuneSelector

    model, dense = nn.Sequential(quantised(linear(), INT8)), nn.Sequential(linear())
    dense[0].weight.data = dequantize_module_weight(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = (
            KappaTuneSelector(each, show_progress=False).get_best_targets(num_modules=1) for each in (model, dense)
        )
    assert found == expected
