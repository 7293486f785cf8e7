"""Models of transformers that are loaded in 8 bits, in 4 bits and by torchao, on the CPU."""

import logging

import pytest
import torch
from matrix import output, same
from quantized import all_same, is_close, merged_quietly, parts, unpacked
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    ViTConfig,
    ViTForImageClassification,
)
from versions import needs

import peft
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.loftq_utils import replace_lora_weights_loftq

pytestmark = pytest.mark.compat

pytest.importorskip("bitsandbytes", reason="two of the three forms are of bitsandbytes")
quantization = pytest.importorskip("torchao.quantization", reason="one of the three forms is of torchao")
with_torchao = needs("torchao", "0.16.0", "has tensors that the library does not read")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMS = {
    "8bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), "bnb 8bit", "Linear8bitLt"),
    "4bit": (lambda: BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32), "bnb 4bit", "Linear4bit"),
    "torchao": (lambda: TorchAoConfig(quantization.Int8WeightOnlyConfig()), "torchao", "TorchaoLoraLinear"),
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes tells of each cast to half precision."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


@pytest.fixture(params=["8bit", "4bit", pytest.param("torchao", marks=with_torchao)])
def form(request):
    return request.param


def load(folder, form, cls=AutoModelForCausalLM, **options):
    return unpacked(
        cls.from_pretrained(
            folder, quantization_config=FORMS[form][0](), device_map="cpu", dtype=torch.float32, **options
        )
    )


def adapted(folder, form, config=None, **options):
    model = get_peft_model(load(folder, form), config or LoraConfig(r=4, target_modules="all-linear", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def dense_twin(folder, form):
    """A model with the values that the quantised weights stand for."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in load(folder, form).named_modules():
        if type(dense.get_submodule(name)) is torch.nn.Linear:
            dense.get_submodule(name).weight.data = dequantize_module_weight(module).float()
    return dense


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def test_all_linear_layers_are_adapted_in_their_form(folder, form):
    model = adapted(folder, form)
    found = layers(model)
    assert {name.rsplit(".", 1)[-1] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert len(found) == 14
    for layer in found.values():
        assert type(layer).__name__ == FORMS[form][2] and isinstance(layer, lora.Linear)
        assert layer.quantization_backend.backend_name == FORMS[form][1]
    status = peft.get_model_status(model)
    assert status.quantization_backend == FORMS[form][1]
    assert model.get_nb_trainable_parameters()[1] == sum(
        p.numel() for p in LlamaForCausalLM(model.config).parameters()
    ) + (status.trainable_params)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_its_output_is_that_of_a_model_with_the_same_values(folder, form, options, tmp_path):
    model = adapted(folder, form, **options)
    model.save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(dense_twin(folder, form), tmp_path))
    assert is_close(logits(model), expected, 0.03 if form == "8bit" else 1e-4)
    again = PeftModel.from_pretrained(load(folder, form), tmp_path)
    assert same(logits(again), logits(model))
    assert not is_close(logits(load(folder, form)), expected, 0.05)


def test_it_trains_with_checkpointing(folder, form):
    model = prepare_model_for_kbit_training(load(folder, form), gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not any(p.requires_grad for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.train()
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(own) == 8
    before = {
        key: value for name, p in model.named_parameters() if name not in own for key, value in parts(name, p).items()
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = {
        key: value for name, p in model.named_parameters() if name not in own for key, value in parts(name, p).items()
    }
    assert all_same(after, before)


def test_merging_is_undone_exactly_and_done_for_good_is_saved(folder, form, tmp_path):
    model = adapted(folder, form)
    result = logits(model)
    base = {name: layer.get_base_layer().weight for name, layer in layers(model).items()}
    merged_quietly(model)
    merged = logits(model)
    assert is_close(merged, result, 0.3) and not same(merged, result)
    for name, layer in layers(model).items():
        weight = layer.get_base_layer().weight
        assert weight is not base[name] and type(weight) is type(base[name])
    model.unmerge_adapter()
    assert all(layer.get_base_layer().weight is base[name] for name, layer in layers(model).items())
    assert same(logits(model), result)
    plain = model.merge_and_unload()
    assert same(logits(plain), merged) and not layers(plain)
    plain.save_pretrained(tmp_path)
    again = unpacked(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32))
    assert same(logits(again), merged)


@with_torchao
def test_the_recipe_of_torchao_is_that_of_the_model(folder):
    model = adapted(folder, "torchao")
    for layer in layers(model).values():
        recipe = layer.quantization_backend.get_apply_tensor_subclass()
        assert type(recipe) is quantization.Int8WeightOnlyConfig


def test_a_method_without_factors(folder, form):
    model = adapted(folder, form, LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]))
    result, base = logits(model), logits(load(folder, form))
    assert not is_close(result, base, 0.01)
    merged_quietly(model)
    assert is_close(logits(model), result, 0.3)
    model.unmerge_adapter()
    assert same(logits(model), result)
    with model.disable_adapter():
        assert same(logits(model), base)


def test_the_adapters_of_transformers_own_methods(folder, form, tmp_path):
    model = adapted(folder, form)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = load(folder, form)
    plain.load_adapter(str(tmp_path))
    assert {type(layer).__name__ for layer in layers(plain).values()} == {FORMS[form][2]}
    assert same(logits(plain), expected)
    plain.disable_adapters()
    assert same(logits(plain), logits(load(folder, form)))


def test_a_classifier_trains_its_head(folder, form):
    base = load(folder, form, AutoModelForSequenceClassification, num_labels=3)
    assert type(base.score) is torch.nn.Linear  # transformers leaves it dense
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    model(input_ids=IDS, labels=torch.tensor([1])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "base_model.model.score.modules_to_save.default.weight" in trained
    assert len(trained) == 5


def test_it_generates(folder, form):
    model = adapted(folder, form, task_type="CAUSAL_LM")
    tokens = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    by_hand = IDS
    for _ in range(4):
        by_hand = torch.cat([by_hand, logits(model, by_hand)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, by_hand)


def test_loftq_starts_from_what_was_rounded_away(folder):
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = get_peft_model(
        load(folder, "4bit"), LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    before = (logits(model) - logits(exact)).norm()
    replace_lora_weights_loftq(model, folder)
    assert (logits(model) - logits(exact)).norm() < 0.8 * before


def test_loftq_finds_weights_under_the_names_of_older_releases(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    pixels = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        exact = ViTForImageClassification.from_pretrained(tmp_path).eval()(pixel_values=pixels).logits
        base = load(tmp_path, "4bit", ViTForImageClassification)
        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).eval()
        before = (model(pixel_values=pixels).logits - exact).norm()
        replace_lora_weights_loftq(model, tmp_path)
        assert (model(pixel_values=pixels).logits - exact).norm() < 0.8 * before


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)]
)
def test_the_adapter_computes_in_the_dtype_of_4_bits(folder, dtype, autocast):
    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=autocast).eval()
    expected = torch.float32 if autocast else dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    assert logits(model).dtype == dtype
    assert (
        output(model.base_model.model.model.layers[0].self_attn.q_proj, torch.ones(1, 64, dtype=dtype)).dtype == dtype
    )


# ----------------------------------------------------------------------------------- methods that adapt no linear layers

PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
OTHERS = {
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
    "LN_TUNING": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**PROMPTS),
    "P_TUNING": lambda: peft.PromptEncoderConfig(**PROMPTS, encoder_hidden_size=16),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**PROMPTS),
}
"""Method -> a configuration; the others are in `quantized.METHODS`, or of one of these families."""


def start(model, name):
    """An adapter that changes the output, the same at every call."""
    torch.manual_seed(0)
    model = get_peft_model(model, OTHERS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def loss_and_gradients(model):
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_that_adapts_other_modules(folder, form, name):
    dense = dense_twin(folder, form)
    loss, gradients = loss_and_gradients(start(load(folder, form), name))
    expected, expected_gradients = loss_and_gradients(start(dense, name))
    assert is_close(loss, expected, 1e-5) and gradients.keys() == expected_gradients.keys() and gradients
    for key, gradient in expected_gradients.items():
        largest = gradient.abs().max()
        assert largest > 0 and is_close(gradients[key] / largest, gradient / largest, 1e-3), key


def test_experts_of_xlora(folder, form, tmp_path):
    paths = {}
    for number in range(2):
        torch.manual_seed(number)
        expert = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        paths[str(number)] = str(tmp_path / str(number))
        get_peft_model(load(folder, form), expert).save_pretrained(paths[str(number)])
    config = {
        "task_type": "CAUSAL_LM",
        "hidden_size": 64,
        "adapters": paths,
        "xlora_depth": 1,
        "layerwise_scalings": True,
    }
    models = []
    for base in (load(folder, form), dense_twin(folder, form)):
        base.config.use_cache = False
        torch.manual_seed(0)
        models.append(get_peft_model(base, peft.XLoraConfig(**config)))
    assert {type(layer).__name__ for layer in layers(models[0]).values()} == {FORMS[form][2]}
    found = [loss_and_gradients(model) for model in models]
    assert is_close(found[0][0], found[1][0], 1e-3)
    for key, gradient in found[1][1].items():
        largest = gradient.abs().max()
        assert largest > 0 and is_close(found[0][1][key] / largest, gradient / largest, 0.1), key


def test_no_method_is_left_out():
    from quantized import METHODS

    from peft.utils.registry import all_methods

    families = {
        peft.MultitaskPromptTuningConfig,
        peft.CPTConfig,
        peft.CartridgeConfig,
    }  # of prompts, as those in OTHERS
    known = {case.variant.method.config_cls for case in METHODS} | {type(make()) for make in OTHERS.values()}
    assert {entry.config_cls for entry in all_methods().values()} == known | families | {peft.XLoraConfig}
