"""X-LoRA: LoRA experts whose terms a classifier weights for each token."""

import copy
import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, XLoraConfig, XLoraModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora.classifier import TemperatureScaledSoftmax, XLoraClassifier
from peft.tuners.xlora.layer import XLoraConv2dLayer, XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer

WIDTH, VOCABULARY = 8, 11
IDS = torch.tensor([[1, 4, 2, 9], [3, 3, 7, 5]])


class Toy(nn.Module):
    """An embedding and two layers, which gives hidden states like a language model."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)

    def forward(self, input_ids=None, inputs_embeds=None, labels=None, output_hidden_states=False, **kwargs):
        embedded = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.second(torch.tanh(self.first(embedded)))
        states = (embedded, hidden) if output_hidden_states else None
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, hidden_states=states, loss=loss)


def llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 2, "pad_token_id": 0, "use_cache": False, **options})
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def save_expert(folder, base, seed=1, **options):
    """Save a LoRA adapter with random values."""
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["first", "second"], **options}
    model = get_peft_model(base, LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two experts of the toy."""
    folder = tmp_path_factory.mktemp("experts")
    return {name: save_expert(folder / name, Toy(), seed) for seed, name in enumerate(["a", "b"])}


def config(experts, **options):
    return XLoraConfig(**{"hidden_size": WIDTH, "adapters": experts, "xlora_dropout_p": 0.0, **options})


def toy(experts, dtype=torch.float32, **options):
    torch.manual_seed(2)
    return get_peft_model(Toy(dtype), config(experts, **options))


def term(layer, name, x):
    return layer.scaling[name] * x @ (layer.lora_B[name].weight @ layer.lora_A[name].weight).T


def by_hand(model, weights, factor=1.0):
    """The toy's logits with these weights (B, T, L, n) of its experts."""
    base = model.base_model.lora_model.model
    hidden = base.table(IDS)
    for number, layer in enumerate((base.first, base.second)):
        x = torch.tanh(hidden) if number else hidden
        terms = [weights[:, :, number, i, None] * term(layer, str(i), x) for i in range(weights.shape[-1])]
        hidden = layer.base_layer(x) + factor * sum(terms)
    return base.head(hidden)


# ------------------------------------------------------------------------------------------------------ the mathematics


def test_each_token_weights_the_experts_by_what_the_classifier_reads_in_the_base_models_hidden_state(experts):
    model = toy(experts)
    base, classifier = model.base_model.lora_model.model, model.base_model.internal_xlora_classifier
    embedded = base.table(IDS)
    hidden = base.second.base_layer(torch.tanh(base.first.base_layer(embedded)))
    weights = classifier.layers[0](hidden).softmax(-1)
    output = model(IDS).logits
    assert_close(model.base_model.get_latest_scalings(), weights[:, :, None].expand(2, 4, 2, 2))
    assert_close(output, by_hand(model, model.base_model.get_latest_scalings()))


def test_layerwise_scalings_differ_by_layer(experts):
    model = toy(experts, layerwise_scalings=True)
    model(IDS)
    weights = model.base_model.get_latest_scalings()
    assert weights.shape == (2, 4, 2, 2)
    assert not torch.allclose(weights[:, :, 0], weights[:, :, 1])
    assert_close(weights.sum(-1), torch.ones(2, 4, 2))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(5, WIDTH)]),
        ({"layerwise_scalings": True}, [(15, WIDTH)]),
        ({"xlora_depth": 2, "xlora_dropout_p": 0.1}, [(6, WIDTH), "ReLU", "Dropout", (5, 6)]),
        ({"xlora_depth": 3}, [(6, WIDTH), "ReLU", (6, 6), "ReLU", (5, 6)]),
    ],
)
def test_the_classifier(options, expected):
    settings = config({"a": "a"}, xlora_size=6, **options)
    classifier = XLoraClassifier(Toy(torch.bfloat16), settings, n_classes=5, n_layers=3, device="cpu")
    found = [tuple(m.weight.shape) if isinstance(m, nn.Linear) else type(m).__name__ for m in classifier.layers]
    assert found == expected
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.bfloat16}
    states = SimpleNamespace(hidden_states=(torch.randn(2, 4, WIDTH),))
    assert classifier(states).shape == (2, 4, 3, 5)
    assert classifier.make_dummy_scalings(IDS).eq(0).all()


def test_a_quantised_base_model_gets_a_classifier_in_floating_point():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    classifier = XLoraClassifier(model, config({"a": "a"}), 1, 1, None)
    assert classifier.layers[0].weight.dtype == torch.float32


def test_temperature_flattens_the_weights(experts):
    logits = torch.tensor([2.0, 0.0])
    assert_close(TemperatureScaledSoftmax(4.0)(logits), torch.tensor([0.5, 0.0]).softmax(-1))
    model = toy(experts, softmax_temperature=1e6)
    model(IDS)
    assert_close(model.base_model.get_latest_scalings(), torch.full((2, 4, 2, 2), 0.5), atol=1e-5, rtol=0)


def test_without_softmax_the_logits_are_the_weights(experts):
    model = toy(experts, enable_softmax=False)
    output = model(IDS).logits
    weights = model.base_model.get_latest_scalings()
    assert not torch.allclose(weights.sum(-1), torch.ones(()))
    assert_close(output, by_hand(model, weights))


def weighting(**options):
    return XLoraLayer(None, None, None, 0, config({"a": "a"}, **options))


def test_top_k_keeps_the_heaviest_experts():
    scalings = torch.tensor([0.2, 0.5, 0.3]).view(1, 1, 1, 3)
    assert_close(weighting(top_k_lora=2).get_maybe_topk_scalings(scalings), torch.tensor([[[0.0, 0.5, 0.3]]]))
    assert_close(weighting(top_k_lora=7).get_maybe_topk_scalings(scalings), scalings[:, :, 0])
    assert_close(weighting().get_maybe_topk_scalings(scalings), scalings[:, :, 0])


@pytest.mark.filterwarnings("ignore:enable_softmax")
def test_a_softmax_over_those_that_are_kept():
    scalings = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 0.0]]).view(1, 2, 1, 3)
    found = weighting(top_k_lora=2, enable_softmax_topk=True).get_maybe_topk_scalings(scalings)
    kept = torch.tensor([0.5, 0.3]).softmax(-1)
    assert_close(found, torch.tensor([[[0.0, *kept], [0.0, 0.0, 0.0]]]))


def test_top_k_can_be_set_afterwards(experts):
    model = toy(experts)
    model.base_model.set_topk_lora(1)
    output = model(IDS).logits
    weights = model.base_model.get_latest_scalings()
    assert_close(output, by_hand(model, torch.where(weights == weights.amax(-1, keepdim=True), weights, 0)))
    model.base_model.set_topk_lora(None)
    assert_close(model(IDS).logits, by_hand(model, weights))
    assert model.peft_config["default"].top_k_lora is None


def test_the_global_weight_multiplies_all_terms(experts):
    model = toy(experts)
    model(IDS)
    weights = model.base_model.get_latest_scalings()
    model.base_model.set_global_scaling_weight(2.5)
    assert model.base_model.get_global_scaling_weight() == model.peft_config["default"].global_scaling_weight == 2.5
    assert_close(model(IDS).logits, by_hand(model, weights, factor=2.5))
    assert_close(model.base_model.get_latest_scalings(), weights)


@pytest.mark.parametrize(("value", "constant"), [(0.3, 0.3), (None, 0.5)])
def test_the_pass_that_is_read_may_use_the_experts_too(experts, value, constant):
    model = toy(experts)
    model.base_model.set_scaling_pass_value(value)
    assert model.peft_config["default"].scaling_pass_value == constant
    seen = []
    model.base_model.internal_xlora_classifier.register_forward_pre_hook(lambda m, args: seen.append(args[0].logits))
    model(IDS)
    assert_close(seen[0], by_hand(model, torch.full((2, 4, 2, 2), constant)))
    assert not seen[0].requires_grad


def test_a_configuration_without_a_pass_value_means_one_nth(experts):
    model = toy(experts, scaling_pass_value=None)
    assert (
        model.base_model.internal_xlora_classifier.make_dummy_scalings(inputs_embeds=torch.ones(1, 2, 3)).eq(0.5).all()
    )


# ------------------------------------------------------------------------------------------------------ kinds of layers


def test_rows_of_an_input_get_the_weights_of_their_tokens():
    weights = torch.arange(1.0, 7).view(2, 3, 1)

    def scaled(*shape):
        return XLoraLayer.apply_scalings_to_x(torch.ones(shape), weights, 0)

    assert scaled(2, 3, 4)[:, :, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert scaled(2, 1, 4)[:, :, 0].tolist() == [[3], [6]]  # the last tokens, as of an output layer
    assert scaled(6, 4)[:, 0].tolist() == [1, 2, 3, 4, 5, 6]  # as in a mixture of experts
    assert scaled(2, 4)[:, 0].tolist() == [2, 5]  # as in a pooler
    assert XLoraLayer.apply_scalings_to_x(torch.ones(2, 3, 4).bfloat16(), weights, 0).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"weights 2 x 3 tokens, but.* input of shape \(5, 4\)"):
        scaled(5, 4)


class Layer(nn.Module):
    """One layer behind a table of hidden states."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.table = layer, nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, input_ids, x=None, output_hidden_states=False, return_dict=True):
        states = (self.table(input_ids),)
        return SimpleNamespace(y=self.layer(input_ids if x is None else x), hidden_states=states)


LAYERS = {
    "linear": (nn.Linear(WIDTH, 5), XLoraLinearLayer, torch.randn(2, 4, WIDTH)),
    "embedding": (nn.Embedding(VOCABULARY, 5), XLoraEmbeddingLayer, None),
    "conv1d": (nn.Conv1d(3, 5, 2), XLoraConv2dLayer, torch.randn(2, 3, 6)),
    "conv2d": (nn.Conv2d(3, 5, 2), XLoraConv2dLayer, torch.randn(2, 3, 6, 6)),
    "conv3d": (nn.Conv3d(3, 5, 2), XLoraConv2dLayer, torch.randn(2, 3, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_weighted_sum_on_every_kind_of_layer(kind, tmp_path):
    layer, weighted_cls, x = LAYERS[kind]
    names = {
        str(i): save_expert(tmp_path / str(i), Layer(copy.deepcopy(layer)), i, target_modules=["layer"])
        for i in (0, 1)
    }
    model = get_peft_model(Layer(copy.deepcopy(layer)), config(names)).eval()
    inner = model.base_model.lora_model.model.layer
    assert type(inner.forward.__self__) is weighted_cls
    output = model(IDS, x).y
    weights = model.base_model.get_latest_scalings()[:, :, 0]
    inputs = IDS if x is None else x
    expected = inner.base_layer(inputs)
    for number in range(2):
        part = inner.kind.apply(inner.base_layer, inputs, inner.get_delta_weight(str(number)))
        c = weights[..., number]
        expected = expected + part * (
            c.mean(1).view(-1, *[1] * (part.dim() - 1)) if "conv" in kind else c.unsqueeze(-1)
        )
    assert_close(output, expected)


def test_layers_that_cannot_be_weighted_are_refused(tmp_path):
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    source = save_expert(tmp_path / "e", copy.deepcopy(base), target_modules=["attention"])
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with pytest.raises(ValueError, match="cannot weight the experts of 'attention' token by token: it is a Multihead"):
        get_peft_model(base, config({"e": source}))
    assert type(base["attention"]) is nn.MultiheadAttention
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == flags


# ---------------------------------------------------------------------------------------------------------- language models


@pytest.mark.compat
@pytest.mark.parametrize(
    ("make", "targets"), [(llama, ["q_proj", "v_proj"]), (gpt2, ["c_attn"])], ids=["llama", "gpt2"]
)
def test_language_models_of_any_architecture(make, targets, tmp_path):
    names = {
        name: save_expert(tmp_path / name, make(), seed, target_modules=targets, task_type="CAUSAL_LM")
        for seed, name in enumerate(["law", "medicine"])
    }
    model = get_peft_model(make(), config(names, task_type="CAUSAL_LM", layerwise_scalings=True)).eval()
    with torch.no_grad():
        output = model(input_ids=IDS, labels=IDS)
        layers = len([m for m in model.modules() if isinstance(m, LoraLayer)])
        assert model.base_model.get_latest_scalings().shape == (2, 4, layers, 2)
        tokens = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS))
        expected = IDS
        for _ in range(3):
            step = model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, step], 1)
    assert torch.equal(tokens, expected)
    assert torch.isfinite(output.loss)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(make(), tmp_path / "saved")
    assert_close(again(input_ids=IDS).logits, output.logits)


@pytest.mark.compat
def test_an_output_layer_may_have_experts(tmp_path):
    source = save_expert(tmp_path / "e", llama(), target_modules=["lm_head"])
    model = get_peft_model(llama(), config({"e": source}, task_type="CAUSAL_LM")).eval()
    full = model(input_ids=IDS).logits
    assert_close(model(input_ids=IDS, logits_to_keep=1).logits, full[:, -1:])


@pytest.mark.parametrize("wrapped", [True, False])
def test_each_forward_is_two(experts, wrapped):
    model = toy(experts)
    passes = []
    model.base_model.lora_model.model.head.register_forward_hook(lambda *args: passes.append(torch.is_grad_enabled()))
    for _ in range(2):
        (model if wrapped else model.base_model)(IDS)
    assert passes == [False, True] * 2
    with pytest.raises(TypeError):
        model(IDS, no_such_argument_of=None, input_ids=IDS)
    model(IDS)
    assert passes == [False, True] * 3


def test_the_model_can_be_called_without_the_wrapper(experts):
    model = toy(experts)
    assert torch.equal(model.base_model(IDS).logits, model(IDS).logits)
    model.base_model.internal_xlora_scalings = None
    plain = model.base_model.lora_model.model
    expected = by_hand(model, torch.ones(2, 4, 2, 2))
    assert_close(plain(IDS).logits, expected)  # the LoRA model itself, whose adapters are all active
    assert model.base_model.get_latest_scalings() is None


@pytest.mark.compat
def test_a_cache_is_refused(experts, tmp_path):
    with pytest.raises(ValueError, match="Set model.config.use_cache to False"):
        get_peft_model(llama(use_cache=True), config(experts))
    source = save_expert(tmp_path / "e", llama(), target_modules=["q_proj"])
    model = get_peft_model(llama(), config({"e": source}, task_type="CAUSAL_LM")).eval()
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot serve: leave past_key_values out"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    assert model.generate(input_ids=IDS, max_new_tokens=2, use_cache=True).shape == (2, 6)


def test_hidden_states_of_another_size_are_refused(experts):
    model = toy(experts, hidden_size=16)
    with pytest.raises(
        ValueError, match=r"of shape \(batch, tokens, 16\) by its hidden_size; this one gives \(2, 4, 8\)"
    ):
        model(IDS)
    classifier = XLoraClassifier(Toy(), config({"a": "a"}), 1, 1, None)
    with pytest.raises(ValueError, match="gives none"):
        classifier(SimpleNamespace(logits=None))
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        classifier.make_dummy_scalings()


# ------------------------------------------------------------------------------------------------------------ life cycle


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


CLASSIFIER = {f"base_model.internal_xlora_classifier.layers.0.{name}" for name in ("weight", "bias")}


def test_exactly_the_classifier_trains(experts):
    model = toy(experts)
    assert trainable(model) == CLASSIFIER
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == CLASSIFIER


def test_the_experts_can_train_too(experts):
    model = toy(experts, use_trainable_adapters=True)
    names = {name for name, _ in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    assert len(names) == 8 and trainable(model) == CLASSIFIER | names
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in names)


def test_disabled_is_the_base_model_and_nothing_trains(experts):
    model = toy(experts, use_trainable_adapters=True)
    before, output = trainable(model), model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, Toy()(IDS).logits)
        assert trainable(model) == set()
        assert torch.equal(model.base_model(IDS).logits, Toy()(IDS).logits)
        model.base_model.disable_adapter_layers()
    assert trainable(model) == before
    assert torch.equal(model(IDS).logits, output)


def test_inference_mode_and_back(experts):
    model = toy(experts, use_trainable_adapters=True)
    before = trainable(model)
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    model.set_adapter("default")
    assert trainable(model) == before and model.active_adapters == ["default"]


@pytest.mark.compat
def test_gradient_checkpointing_gives_the_same_gradient(tmp_path):
    source = save_expert(tmp_path / "e", llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(4)
        model = get_peft_model(
            llama(), config({"a": source, "b": source}, task_type="CAUSAL_LM", enable_softmax=False)
        )
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(model.base_model.internal_xlora_classifier.layers[0].weight.grad)
    assert gradients[0].ne(0).any()
    assert_close(gradients[1], gradients[0])


def test_merging_adds_the_experts_unweighted(experts):
    model = toy(experts)
    output = model(IDS).logits
    model.merge_adapter()
    merged = model(IDS).logits
    model.unmerge_adapter()
    assert_close(merged, by_hand(model, torch.ones(2, 4, 2, 2)))
    assert torch.equal(model(IDS).logits, output)
    plain = model.merge_and_unload()
    assert type(plain) is Toy and type(plain.first) is nn.Linear


def test_unload_gives_the_base_model(experts):
    plain = toy(experts).unload()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), Toy().state_dict().values()))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_stand_alone(experts, duplicate):
    model = toy(experts)
    output = model(IDS).logits
    other = duplicate(model)
    assert torch.equal(other(IDS).logits, output)
    other.base_model.set_global_scaling_weight(0.0)
    other.base_model.lora_model.model.first.lora_A["0"].weight.data.zero_()
    assert torch.equal(model(IDS).logits, output)


def test_half_precision(experts):
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(Toy(torch.bfloat16), config(experts), autocast_adapter_dtype=autocast)
        assert model.base_model.lora_model.model.first.lora_A["0"].weight.dtype == expected
        assert model(IDS).logits.dtype == torch.bfloat16


def test_status_and_attributes_are_those_of_the_lora_model(experts):
    model = toy(experts)
    status = model.get_model_status()
    assert status.peft_types == {"default": "XLORA", "0": "LORA", "1": "LORA"}
    assert status.active_adapters == ["0", "1"] and status.available_adapters == ["0", "1"]
    assert model.base_model.targeted_module_names == ["first", "second"]
    assert not model.supports_lora_conversion() and model.base_model.supports_lora_conversion("1")


# ------------------------------------------------------------------------------------------------------------------- log


def test_weights_are_logged_while_asked_for(experts):
    model = toy(experts)
    tuner = model.base_model
    model(IDS)
    assert tuner.get_scalings_log() == []
    tuner.enable_scalings_logging()
    for tokens in (4, 2, 4):
        model(IDS[:, :tokens])
    tuner.disable_scalings_logging()
    model(IDS)
    log = tuner.get_scalings_log()
    assert [entry.shape for entry in log] == [(2, 4, 2, 2), (2, 2, 2, 2), (2, 4, 2, 2)]
    buckets = tuner.get_bucketed_scalings_log()
    assert {length: positions for length, (positions, _) in buckets.items()} == {4: [0, 2], 2: [1]}
    assert buckets[2][1][0] is log[1]
    log.clear()
    assert len(tuner.get_scalings_log()) == 3
    tuner.clear_scalings_log()
    assert tuner.get_scalings_log() == []


# ----------------------------------------------------------------------------------------------------------------- files


def test_all_of_the_classifier_and_each_expert_are_saved(experts, tmp_path):
    model = toy(experts, xlora_depth=2, xlora_size=6)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    prefix = "base_model.internal_xlora_classifier.layers"
    assert keys == {f"{prefix}.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["adapters"] == experts
    for number, source in enumerate(experts.values()):
        saved = load_file(tmp_path / str(number) / "adapter_model.safetensors")
        original = load_file(f"{source}/adapter_model.safetensors")
        assert saved.keys() == original.keys() and all(torch.equal(saved[key], original[key]) for key in saved)


def test_loading_gives_the_same_output(experts, tmp_path):
    model = toy(experts, layerwise_scalings=True)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(), tmp_path)
    assert_close(again(IDS).logits, model(IDS).logits)
    assert not again.training
    trained = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True)
    assert trainable(trained) == CLASSIFIER


def test_a_file_without_some_of_the_classifier_is_loaded_with_a_warning(experts, tmp_path):
    toy(experts).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}  # the file is about to be another
    del weights["base_model.internal_xlora_classifier.layers.0.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.warns(
        UserWarning, match="lack these of the adapter 'default'.*internal_xlora_classifier.layers.0.bias"
    ):
        again = PeftModel.from_pretrained(Toy(), tmp_path)
    assert torch.equal(
        again.base_model.internal_xlora_classifier.layers[0].weight,
        weights["base_model.internal_xlora_classifier.layers.0.weight"],
    )


@pytest.fixture
def movable(experts, tmp_path):
    """Experts whose folders a test may remove."""
    return {name: str(shutil.copytree(source, tmp_path / "experts" / name)) for name, source in experts.items()}


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_the_saved_copies_serve_where_the_experts_are_gone(movable, tmp_path, adapter_name):
    torch.manual_seed(2)
    model = get_peft_model(Toy(), config(movable), adapter_name=adapter_name)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "experts")
    folder = tmp_path / "saved" / ("" if adapter_name == "default" else adapter_name)
    again = PeftModel.from_pretrained(Toy(), folder)
    assert_close(again(IDS).logits, model(IDS).logits)
    if adapter_name != "default":
        again = PeftModel.from_pretrained(Toy(), tmp_path / "saved", subfolder=adapter_name)
        assert_close(again(IDS).logits, model(IDS).logits)


def test_experts_that_trained_are_loaded_as_they_were_saved(experts, tmp_path):
    model = toy(experts, use_trainable_adapters=True)
    with torch.no_grad():
        model.base_model.lora_model.model.first.lora_A["1"].weight.add_(1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(), tmp_path)
    assert_close(again(IDS).logits, model(IDS).logits)


def test_experts_can_be_given_when_loading(movable, experts, tmp_path):
    model = toy(movable)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "experts")
    for number in (0, 1):
        shutil.rmtree(tmp_path / "saved" / str(number))
    again = PeftModel.from_pretrained(Toy(), tmp_path / "saved", adapters=experts)
    assert_close(again(IDS).logits, model(IDS).logits)
    assert again.peft_config["default"].adapters == experts
    with pytest.raises(ValueError, match=r"expert 'a' are neither at .*experts/a' nor beside.*adapters=\{'a': 'path'"):
        PeftModel.from_pretrained(Toy(), tmp_path / "saved")


def as_another_release_saves(folder, number, without=()):
    """Rewrite a copy of an expert as other releases save it: with the base weights, and without some of its own."""
    path = folder / str(number) / "adapter_model.safetensors"
    weights = {
        key.replace("base_model.model.", "base_model.lora_model.model."): value
        for key, value in load_file(path).items()
    }
    weights = {key: value for key, value in weights.items() if not any(part in key for part in without)}
    weights["base_model.lora_model.model.head.weight"] = torch.full((VOCABULARY, WIDTH), 5.0)
    weights["base_model.internal_xlora_classifier.layers.weight"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})


def test_copies_that_other_releases_saved_serve_if_they_are_whole(movable, tmp_path):
    model = toy(movable)
    model.save_pretrained(tmp_path / "saved")
    for number in (0, 1):
        as_another_release_saves(tmp_path / "saved", number)
    again = PeftModel.from_pretrained(Toy(), tmp_path / "saved")  # the originals are there
    assert_close(again(IDS).logits, model(IDS).logits)
    shutil.rmtree(tmp_path / "experts")
    again = PeftModel.from_pretrained(Toy(), tmp_path / "saved")
    assert_close(again(IDS).logits, model(IDS).logits)
    as_another_release_saves(tmp_path / "saved", 1, without=["second"])
    base = Toy()
    with pytest.raises(
        ValueError, match="expert 'b'.* lack 2 tensors.*release that left these out; pass the original"
    ):
        PeftModel.from_pretrained(base, tmp_path / "saved")
    assert type(base.first) is nn.Linear and all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.compat
def test_auto_classes_load_it(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    source = save_expert(tmp_path / "e", llama(), target_modules=["q_proj"])
    model = get_peft_model(llama(), config({"e": source}, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


# ---------------------------------------------------------------------------------------------------------------- config


def test_experts_are_numbered_in_the_order_of_their_names():
    names = ["10", "9", "b2", "b10", "a", "1"]
    assert list(config(dict.fromkeys(names, "x")).adapters) == ["1", "9", "10", "a", "b2", "b10"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adapters": {}}, "hidden_size is not set and is taken as 4096"),
        ({"hidden_size": 8}, "adapters is not set"),
        ({"enable_softmax_topk": True, "enable_softmax": False}, "no effect without top_k_lora"),
        ({"enable_softmax_topk": True, "top_k_lora": 1}, "both set"),
        ({"top_k_lora": 0}, "top_k_lora=0 selects no expert"),
    ],
)
def test_settings_that_are_hardly_meant_are_warned_of(options, match):
    given = {} if "set" in match and ("hidden" in match or "adapters" in match) else {"hidden_size": 8, "adapters": {}}
    with pytest.warns(UserWarning, match=match):
        settings = XLoraConfig(**given | options)
    assert settings.hidden_size in (8, 4096) and settings.adapters == {}


# ---------------------------------------------------------------------------------------------------------------- errors


def test_an_x_lora_model_needs_experts():
    with pytest.raises(ValueError, match="at least one LoRA expert"):
        get_peft_model(Toy(), config({}))


def test_the_classifier_needs_layers(experts):
    base = Toy()
    with pytest.raises(ValueError, match="xlora_depth counts.*at least 1, got 0"):
        get_peft_model(base, config(experts, xlora_depth=0))
    assert type(base.first) is nn.Linear


def test_numbers_are_the_names_of_experts(experts):
    with pytest.raises(ValueError, match="called by numbers, so '0' cannot be its own name"):
        get_peft_model(Toy(), config(experts), adapter_name="0")


def test_experts_of_another_method_are_refused(tmp_path):
    from peft import LoHaConfig

    get_peft_model(Toy(), LoHaConfig(target_modules=["first"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expert 'a' at .* is a LOHA adapter; X-LoRA takes LoRA"):
        get_peft_model(Toy(), config({"a": str(tmp_path)}))


def test_experts_whose_terms_cannot_be_weighted_are_refused(tmp_path):
    source = save_expert(tmp_path, Toy(), use_dora=True)
    with pytest.raises(ValueError, match="expert 'a' at .* uses use_dora, whose terms cannot be weighted"):
        get_peft_model(Toy(), config({"a": source}))


def test_experts_of_another_model_are_refused(experts, tmp_path):
    source = save_expert(tmp_path / "e", Toy())
    path = tmp_path / "e" / "adapter_model.safetensors"
    weights = load_file(path)
    weights["base_model.model.frist.lora_A.weight"] = weights.pop("base_model.model.first.lora_A.weight")
    save_file(weights, path, metadata={"format": "pt"})
    base = Toy()
    with pytest.raises(
        ValueError, match=r"expert 'z' at .* no place for \['.*frist.lora_A.weight'\]. Nearest: 'first.lora"
    ):
        get_peft_model(base, config({**experts, "z": source}))
    assert type(base.first) is nn.Linear and all(parameter.requires_grad for parameter in base.parameters())


def test_an_expert_that_lacks_weights_is_warned_of(tmp_path):
    source = save_expert(tmp_path, Toy())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    del weights["base_model.model.first.lora_B.weight"]
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="expert 'a' at .* lack 1 tensors.*first.lora_B.*keep their initial values"):
        model = get_peft_model(Toy(), config({"a": source}))
    assert model.base_model.lora_model.model.first.lora_B["0"].weight.eq(0).all()


def test_the_experts_are_one_adapter(experts):
    model = toy(experts)
    with pytest.raises(ValueError, match=r"uses all its experts \['0', '1'\] at once.*'1' cannot be set"):
        model.set_adapter("1")
    with pytest.raises(ValueError, match="has one adapter, 'default'; 'other' cannot be added"):
        model.add_adapter("other", config(experts))
    with pytest.raises(ValueError, match="'1' cannot be deleted"):
        model.delete_adapter("1")
    with pytest.raises(ValueError, match="adapter_names cannot choose among them"):
        model(IDS, adapter_names=["0", "1"])
    assert list(model.peft_config) == ["default", "0", "1"]


def test_the_tuner_takes_a_configuration_or_a_dictionary(experts):
    for given in (config(experts), {"default": config(experts)}):
        assert list(XLoraModel(Toy(), given, "default").experts) == ["0", "1"]
