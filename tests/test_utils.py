"""`peft.utils`: what it exports, preparing models for training, and small helpers."""

import functools
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft.utils
from peft import LoraConfig, PeftType, PromptTuningConfig, cast_mixed_precision_params, get_peft_model
from peft.tuners.prompt_tuning import PromptEmbedding
from peft.utils import other, quantization_utils, quantized
from peft.utils.other import (
    _freeze_adapter,
    _get_batch_size,
    _get_submodules,
    _is_valid_match,
    fsdp_auto_wrap_policy,
    get_gptqmodel_quant_linear,
    get_pattern_key,
    get_quantization_config,
    id_tensor_storage,
    infer_device,
    is_gptqmodel_awq_layer,
    is_gptqmodel_quant_linear,
    match_target_against_key,
    prepare_model_for_kbit_training,
    str_to_bool,
    transpose,
)

# ------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("module", [peft.utils, other, quantization_utils])
def test_every_announced_name_exists(module):
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_importing_utils_imports_neither_the_engine_nor_client_libraries():
    code = "import sys, peft.utils; print([m for m in sys.modules if m.startswith(('peft.engine', 'transformers'))])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "first", ["peft.utils.other", "peft.utils.save_and_load", "peft.utils.hotswap", "peft.helpers"]
)
def test_any_of_them_can_be_imported_first(first):
    subprocess.run([sys.executable, "-c", f"import {first}"], check=True, capture_output=True)


def test_names_are_the_same_objects_everywhere():
    assert peft.utils.prepare_model_for_kbit_training is prepare_model_for_kbit_training
    assert peft.prepare_model_for_kbit_training is prepare_model_for_kbit_training
    assert peft.utils.PeftType is PeftType
    with pytest.raises(AttributeError, match="no_such_name"):
        peft.utils.no_such_name  # noqa: B018
    assert set(peft.utils.__all__) <= set(dir(peft.utils))


# ----------------------------------------------------------------------------------------------- preparing for training


class Checkpointed(nn.Module):
    """What `prepare_model_for_kbit_training` asks of a model, and a record of its calls."""

    def __init__(self, **attributes):
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.float16 = nn.Linear(4, 4).half()
        self.bf16 = nn.Linear(4, 4).bfloat16()
        self.calls = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def get_input_embeddings(self):
        return self.embedding

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.calls.append(gradient_checkpointing_kwargs)


class Params4bit(nn.Parameter):
    pass


def test_a_model_that_is_not_quantised_is_frozen_and_in_float32():
    model = Checkpointed()
    assert prepare_model_for_kbit_training(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.calls == [] and not model.embedding(torch.tensor([1])).requires_grad


@pytest.mark.parametrize("flag", ["is_loaded_in_8bit", "is_loaded_in_4bit"])
def test_a_model_in_bits_is_checkpointed(flag):
    model = prepare_model_for_kbit_training(Checkpointed(**{flag: True}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.calls == [{}] and model.embedding(torch.tensor([1])).requires_grad


@pytest.mark.parametrize(
    "attributes", [{"quantization_method": m} for m in ("gptq", "aqlm", "eetq", "torchao", "hqq")]
)
def test_other_methods_keep_their_dtypes(attributes):
    model = prepare_model_for_kbit_training(Checkpointed(**attributes))
    assert model.float16.weight.dtype == torch.float16 and model.bf16.weight.dtype == torch.bfloat16
    assert model.calls == [{}]


def test_a_model_that_says_itself_that_it_is_hqq():
    assert prepare_model_for_kbit_training(Checkpointed(hqq_quantized=True)).float16.weight.dtype == torch.float16


def test_4bit_parameters_are_not_cast():
    model = Checkpointed(is_loaded_in_4bit=True)
    model.float16.weight = Params4bit(model.float16.weight.data, requires_grad=False)
    prepare_model_for_kbit_training(model)
    assert model.float16.weight.dtype == torch.float16 and model.float16.bias.dtype == torch.float32


def test_no_checkpointing():
    model = prepare_model_for_kbit_training(Checkpointed(is_loaded_in_8bit=True), use_gradient_checkpointing=False)
    assert model.calls == [] and not model.embedding(torch.tensor([1])).requires_grad


def test_checkpointing_that_is_not_re_entrant_needs_no_gradient_of_the_input():
    options = {"use_reentrant": False}
    model = Checkpointed(is_loaded_in_8bit=True)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    assert model.calls == [options] and not model.embedding(torch.tensor([1])).requires_grad


def test_the_models_own_method_asks_for_the_gradient_of_the_input():
    model = Checkpointed(is_loaded_in_8bit=True)
    model.enable_input_require_grads = lambda: model.calls.append("enabled")
    prepare_model_for_kbit_training(model)
    assert model.calls == ["enabled", {}]


def test_options_that_the_model_does_not_take():
    model = Checkpointed(is_loaded_in_8bit=True)
    model.gradient_checkpointing_enable = lambda: model.calls.append("on")
    with pytest.warns(FutureWarning, match="use_reentrant"):
        prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.calls == ["on"]


def test_cast_mixed_precision_params():
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    model.register_parameter("packed", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    model.half()
    cast_mixed_precision_params(model, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "base_layer" in name} == {torch.bfloat16}
    assert dtypes["packed"] == torch.int8


# ---------------------------------------------------------------------------------------------------------------- FSDP


def llama():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def units(model):
    policy = fsdp_auto_wrap_policy(model)
    assert all(policy(module=module, recurse=True, nonwrapped_numel=0) for module in model.modules())
    modules = model.named_modules()
    return {name for name, module in modules if policy(module=module, recurse=False, nonwrapped_numel=0)}


@pytest.mark.compat
def test_trainable_leaves_and_blocks_are_units():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    blocks = {f"base_model.model.model.layers.{i}" for i in range(2)}
    factors = {f"{block}.self_attn.q_proj.lora_{factor}.default" for block in blocks for factor in "AB"}
    assert units(model) == blocks | factors


@pytest.mark.compat
def test_prompt_encoders_are_units():
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    encoders = {name for name, module in model.named_modules() if isinstance(module, PromptEmbedding)}
    assert encoders and encoders <= units(model)


@pytest.mark.compat
def test_blocks_can_be_named(monkeypatch):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,LlamaRMSNorm")
    assert "base_model.model.model.layers.0.mlp" in units(model)
    assert "base_model.model.model.layers.0" not in units(model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,NoSuchBlock")
    with pytest.raises(TypeError, match="NoSuchBlock"):
        fsdp_auto_wrap_policy(model)


@pytest.mark.compat
def test_the_policy_can_be_sent_to_other_processes():
    import pickle

    policy = fsdp_auto_wrap_policy(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    assert isinstance(policy, functools.partial)
    assert isinstance(pickle.loads(pickle.dumps(policy)), functools.partial)


# --------------------------------------------------------------------------------------------------------- quantisation


def test_quantization_config_of_a_method():
    model = types.SimpleNamespace(
        quantization_method="gptq", config=types.SimpleNamespace(quantization_config={"bits": 4})
    )
    assert get_quantization_config(model, "gptq") == {"bits": 4}
    assert get_quantization_config(model, "awq") is None
    assert get_quantization_config(nn.Linear(1, 1), "gptq") is None


def test_without_gptqmodel_there_are_none_of_its_layers(monkeypatch):
    monkeypatch.setattr(quantized.import_utils, "is_gptqmodel_available", lambda: False)
    assert get_gptqmodel_quant_linear(types.SimpleNamespace(bits=4)) is None
    assert get_gptqmodel_quant_linear(None) is None
    assert not is_gptqmodel_quant_linear(nn.Linear(1, 1)) and not is_gptqmodel_awq_layer(nn.Linear(1, 1))


def test_layers_of_gptqmodel_are_known_by_their_classes():
    base = type("BaseQuantLinear", (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear"})
    awq = type("AWQuantLinear", (base,), {"__module__": "gptqmodel.nn_modules.qlinear"})
    stranger = type("BaseQuantLinear", (nn.Module,), {})
    answers = [(is_gptqmodel_quant_linear(cls()), is_gptqmodel_awq_layer(cls())) for cls in (base, awq, stranger)]
    assert answers == [(True, False), (True, True), (False, False)]


def test_gptqmodel_chooses_the_layer(monkeypatch):
    asked = {}

    def choose(**options):
        asked.update(options)
        return nn.Linear

    importer = types.SimpleNamespace(hf_select_quant_linear_v2=choose)
    quantization = types.SimpleNamespace(METHOD=types.SimpleNamespace(GPTQ="gptq method"))
    for name, module in {"": None, ".utils": None, ".utils.importer": importer, ".quantization": quantization}.items():
        monkeypatch.setitem(sys.modules, f"gptqmodel{name}", module or types.ModuleType(f"gptqmodel{name}"))
    monkeypatch.setattr(quantized.import_utils, "is_gptqmodel_available", lambda: True)
    config = types.SimpleNamespace(bits=4, group_size=8, desc_act=False, sym=True, checkpoint_format="gptq_v2")
    assert get_gptqmodel_quant_linear(config, device_map="auto") is nn.Linear
    assert asked == {
        "bits": 4,
        "group_size": 8,
        "desc_act": False,
        "sym": True,
        "format": "gptq_v2",
        "backend": "auto",
        "device_map": "auto",
        "meta": None,
        "quant_method": "gptq method",
        "pack": False,
    }


def test_quantization_kwargs_and_repr():
    assert quantization_utils.get_quantization_kwargs(nn.Linear(1, 1)) == {}
    helper = object()
    config = types.SimpleNamespace(get_apply_tensor_subclass=helper)
    model = types.SimpleNamespace(hf_quantizer=types.SimpleNamespace(quantization_config=config))
    assert quantization_utils.get_quantization_kwargs(model) == {"get_apply_tensor_subclass": helper}
    layer = types.SimpleNamespace(quantization_backend=types.SimpleNamespace(backend_name="bnb 4bit"))
    assert quantization_utils.quantization_extra_repr(layer) == "quantization_backend='bnb 4bit'"
    assert quantization_utils.quantization_extra_repr(nn.Linear(1, 1)) == ""
    assert quantization_utils.resolve_quantization_backend(nn.Linear(1, 1)) is None


# -------------------------------------------------------------------------------------------------------- small helpers


def test_get_submodules():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1))})
    assert _get_submodules(model, "a.0") == (model["a"], model["a"][0], "0")
    assert _get_submodules(model, "a") == (model, model["a"], "a")
    with pytest.raises(AttributeError):
        _get_submodules(model, "a.b")


def test_freeze_adapter():
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), "mine")
    _freeze_adapter(model, "min")  # a part of a name is no name
    assert any(parameter.requires_grad for parameter in model.parameters())
    _freeze_adapter(model, "mine")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "key, target, valid", [("a.b", "b", True), ("b", "b", True), ("a.xb", "b", False), ("a.b.c", "b", False)]
)
def test_is_valid_match(key, target, valid):
    assert _is_valid_match(key, target) is valid


def test_batch_size():
    assert _get_batch_size(torch.ones(3, 2), None) == 3
    assert _get_batch_size(None, torch.ones(4, 2, 2)) == 4
    with pytest.raises(ValueError):
        _get_batch_size(None, None)


@pytest.mark.parametrize(
    "patterns, key, found",
    [
        (["lin0", "lin"], "model.lin0", "lin0"),
        (["lin"], "model.lin0", "model.lin0"),
        ([r"layers\.\d+\.q"], "model.layers.12.q", r"layers\.\d+\.q"),
        (["^model.q"], "model.q", "^model.q"),
        ([], "q", "q"),
    ],
)
def test_pattern_key(patterns, key, found):
    assert get_pattern_key(patterns, key) == found


def test_match_target_against_key():
    assert match_target_against_key(r".*\.q", "a.q") and not match_target_against_key("q", "a.q")


def test_transpose():
    weight = torch.arange(6.0).view(2, 3)
    assert transpose(weight, False) is weight and torch.equal(transpose(weight, True), weight.T)
    assert isinstance(transpose(nn.Parameter(weight), True), nn.Parameter)


def test_storage_identity():
    tensor = torch.zeros(4)
    assert id_tensor_storage(tensor) == id_tensor_storage(tensor[1:]) != id_tensor_storage(tensor.clone())


@pytest.mark.parametrize("word, value", [("yes", 1), ("TRUE", 1), (" on ", 1), ("n", 0), ("0", 0), ("False", 0)])
def test_words_for_yes_and_no(word, value):
    assert str_to_bool(word) == value and isinstance(str_to_bool(word), int)


def test_neither_yes_nor_no():
    with pytest.raises(ValueError, match="maybe"):
        str_to_bool("maybe")


def test_device_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert infer_device() == "cpu"
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert infer_device() == "xpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert infer_device() == "cuda"


class OlderModel(nn.Module):
    """Leaves it to its caller that checkpointed segments get an input which asks for gradients, as transformers 4 does."""

    is_gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.embed, self.lin = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.options = []

    def get_input_embeddings(self):
        return self.embed

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.options.append(gradient_checkpointing_kwargs)

    def forward(self, ids):
        return torch.utils.checkpoint.checkpoint(self.lin, self.embed(ids), use_reentrant=True)


def test_checkpointing_that_is_asked_for_later_lets_gradients_through():
    model = get_peft_model(OlderModel(), LoraConfig(target_modules=["lin"], init_lora_weights=False))
    layer, ids = model.base_model.model.lin, torch.tensor([1, 2])
    assert not model.get_base_model().embed(ids).requires_grad
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model.get_base_model().options == [{"use_reentrant": True}]
    model(ids).sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    plain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert not hasattr(plain, "gradient_checkpointing_enable")
