"""Adaption prompt: what gated prompts add to attention, on which modules, and the life of several of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from prompts import NO_DROPOUT, TOKENS, VOCAB, WAYS, WIDTH, base_of, batch, continued_by_hand, generate, gpt2, llama
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft import (
    AdaptionPromptConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.engine.checkpoint import get_base_model_state_dict
from peft.tuners.adaption_prompt import AdaptedAttention, AdaptedAttentionGPT, AdaptionPromptModel
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG, prepare_config
from peft.tuners.adaption_prompt.utils import (
    gpt2_compute_query_states,
    is_adaption_prompt_trainable,
    llama_apply_rotary_pos_emb,
    llama_compute_query_states,
    llama_rotate_half,
)

pytestmark = pytest.mark.compat

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}


def mistral():
    return MistralForCausalLM(
        MistralConfig(**SIZES, sliding_window=4, head_dim=8)
    )  # 4 heads of 8: wider than the model


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


MODELS = [llama, mistral, qwen2, qwen3, gpt2]
LEN = 3


def config_for(**options):
    return AdaptionPromptConfig(**{"task_type": "CAUSAL_LM", "adapter_len": LEN, "adapter_layers": 2, **options})


def adapted(make=llama, **options):
    """A model with the adapter "default" moved away from its start."""
    model = get_peft_model(base_of(make), config_for(**options)).eval()
    return moved(model)


def moved(model, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adaption_prompt_trainable(name):
                parameter.copy_(torch.randn_like(parameter))
    return model


def two(make=llama, layers=1):
    """Adapters "default" and "b", the second on the last layer only; the first active."""
    model = adapted(make)
    model.add_adapter("b", config_for(adapter_layers=layers, adapter_len=2))
    model.set_adapter("b")
    moved(model, seed=4)
    model.set_adapter("default")
    return model


def logits(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or batch())).logits


def train_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def names_on(*layers, place="base_model.model.model.layers.{}.self_attn"):
    return [f"{place.format(layer)}.{part}" for layer in layers for part in ("adaption_prompt", "adaption_gate")]


def attention(model, layer=-1):
    model = model.get_base_model()
    return model.transformer.h[layer].attn if hasattr(model, "transformer") else model.model.layers[layer].self_attn


def loss_of(model):
    inputs = batch(padding=(0, 0))
    return model(**inputs, labels=inputs["input_ids"]).loss


# ------------------------------------------------------------------------------------------------------------- the formula


class OneHead(nn.Module):
    """Attention of one head of width 2 whose projections are the identity."""

    head_dim = 2

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(hidden_size=2, num_attention_heads=1, num_key_value_heads=1)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(2, 2, bias=False))
            nn.init.eye_(getattr(self, name).weight)

    def forward(self, hidden_states, **kwargs):
        return torch.full_like(hidden_states, 10.0), "weights"


def test_by_hand():
    layer = AdaptedAttention("llama", 2, OneHead())
    with torch.no_grad():
        layer.adaption_prompt.copy_(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))
        layer.adaption_gate.fill_(0.5)
    x = torch.tensor([[[2**0.5, 0.0], [0.0, 0.0]]])
    # Token 0 at an angle of 0: scores q·k / √2 = (1, 0). Token 1 has no query: both tokens of the prompt alike.
    e = torch.e
    at_0 = [0.5 * e / (e + 1), 0.5 * 2 / (e + 1)]
    no_turn = (torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
    output, weights = layer(hidden_states=x, position_embeddings=no_turn)
    torch.testing.assert_close(output, 10 + torch.tensor([[at_0, [0.25, 0.5]]]))
    assert weights == "weights"
    # Turned by 90 degrees, the query of token 0 is (0, √2): scores (0, 2).
    turned = (torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
    expected = torch.tensor([0.5 / (1 + e**2), 0.5 * 2 * e**2 / (1 + e**2)])
    torch.testing.assert_close(layer(hidden_states=x, position_embeddings=turned)[0][0, 0], 10 + expected)


def by_hand_on_llamas_kind(module, x, angles, prompt, gate):
    """The term, head by head and token by token."""
    heads, kv_heads = module.config.num_attention_heads, module.config.num_key_value_heads
    size, (cos, sin) = module.head_dim, angles
    norm = [getattr(module, name, nn.Identity()) for name in ("q_norm", "k_norm")]
    q = norm[0](module.q_proj(x).view(*x.shape[:2], heads, size))
    k = norm[1](module.k_proj(prompt).view(-1, kv_heads, size))
    v = module.v_proj(prompt).view(-1, kv_heads, size)
    rows = []
    for row in range(len(x)):
        for token in range(x.shape[1]):
            c, s = cos[row % len(cos), token], sin[row % len(sin), token]
            parts = []
            for head in range(heads):
                one = q[row, token, head]
                one = one * c + torch.cat([-one[size // 2 :], one[: size // 2]]) * s
                shared = head // (heads // kv_heads)
                parts.append(((k[:, shared] @ one) / size**0.5).softmax(0) @ v[:, shared])
            rows.append(module.o_proj(gate * torch.cat(parts)))
    return torch.stack(rows).view(*x.shape[:2], -1)


@pytest.mark.parametrize("make", [llama, mistral, qwen2, qwen3])
@torch.no_grad()
def test_on_models_of_llamas_kind(make):
    layer = attention(adapted(make))
    x, positions = torch.randn(2, 4, WIDTH), torch.randn(2, 4, layer.model.head_dim)
    angles = positions.cos(), positions.sin()
    term = by_hand_on_llamas_kind(layer.model, x, angles, layer.adaption_prompt[0], layer.adaption_gate)
    arguments = {"hidden_states": x, "position_embeddings": angles, "attention_mask": None}
    torch.testing.assert_close(layer(**arguments)[0], layer.model(**arguments)[0] + term, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_on_gpt2():
    layer = attention(adapted(gpt2))
    x, prompt = torch.randn(2, 4, WIDTH), layer.adaption_prompt[0]
    q = layer.model.c_attn(x)[..., :WIDTH]
    k, v = layer.model.c_attn(prompt)[:, WIDTH:].split(WIDTH, dim=-1)
    term = torch.empty_like(x)
    for head in (slice(0, 8), slice(8, 16)):
        term[..., head] = (q[..., head] @ k[:, head].T / 8**0.5).softmax(-1) @ v[:, head]
    expected = layer.model(x)[0] + layer.adaption_gate * term  # not projected
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-4, rtol=1e-4)


def test_projections_bias_is_in_the_term_too():
    def biased():
        return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))

    base = base_of(biased)
    nn.init.constant_(base.model.layers[1].self_attn.o_proj.bias, 0.25)
    layer = attention(get_peft_model(base, config_for(adapter_layers=1)))
    x, angles = torch.randn(1, 2, WIDTH), (torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
    arguments = {"hidden_states": x, "position_embeddings": angles, "attention_mask": None}
    torch.testing.assert_close(layer(**arguments)[0], layer.model(**arguments)[0] + 0.25)


# ----------------------------------------------------------------------------------------------------- modules and weights


@pytest.mark.parametrize("make", MODELS)
def test_starts_as_the_base_model(make):
    base = base_of(make)
    expected = logits(base)
    model = get_peft_model(base, config_for())
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(moved(model)), expected)


@pytest.mark.parametrize(
    "make, place, cls",
    [
        (llama, "base_model.model.model.layers.{}.self_attn", AdaptedAttention),
        (mistral, "base_model.model.model.layers.{}.self_attn", AdaptedAttention),
        (qwen2, "base_model.model.model.layers.{}.self_attn", AdaptedAttention),
        (qwen3, "base_model.model.model.layers.{}.self_attn", AdaptedAttention),
        (gpt2, "base_model.model.transformer.h.{}.attn", AdaptedAttentionGPT),
    ],
)
def test_adapts_the_last_layers(make, place, cls):
    model = get_peft_model(base_of(make), config_for(adapter_layers=1))
    assert train_names(model) == names_on(1, place=place)
    assert type(attention(model)) is cls and not isinstance(attention(model, 0), AdaptedAttention)
    assert isinstance(model.base_model, AdaptionPromptModel)
    state = get_peft_model_state_dict(model)
    assert {name: tuple(value.shape) for name, value in state.items()} == dict(
        zip(names_on(1, place=place), [(1, LEN, WIDTH), (1,)])
    )
    inner = {name for name, _ in attention(model).named_parameters() if not is_adaption_prompt_trainable(name)}
    assert inner == {f"model.{name}" for name, _ in attention(model).model.named_parameters()}
    assert model.peft_config["default"].target_modules == place.rpartition(".")[2]


def test_zero_layers_are_all_layers():
    assert train_names(get_peft_model(base_of(llama), config_for(adapter_layers=0))) == names_on(0, 1)


def test_start_is_drawn_layer_by_layer():
    base = base_of(llama)
    torch.manual_seed(7)
    model = get_peft_model(base, config_for())
    torch.manual_seed(7)
    for layer in (0, 1):
        assert torch.equal(attention(model, layer).adaption_prompt, torch.randn(1, LEN, WIDTH))
        assert torch.equal(attention(model, layer).adaption_gate, torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_weights_have_the_dtype_of_the_projections(make, dtype):
    model = get_peft_model(base_of(make).to(dtype), config_for(), autocast_adapter_dtype=True)
    assert {value.dtype for value in get_peft_model_state_dict(model).values()} == {dtype}
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("make, name", [(llama, "q_proj"), (gpt2, "c_proj")])
def test_weights_on_a_quantised_model_are_in_float32(make, name):
    base = base_of(make).bfloat16()
    for module in base.modules():
        if hasattr(module, name):
            weight = getattr(module, name).weight
            getattr(module, name).weight = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    model = get_peft_model(base, config_for())
    assert {value.dtype for value in get_peft_model_state_dict(model).values()} == {torch.float32}


def test_weights_in_float32_on_a_half_precision_model():
    model = adapted().bfloat16()
    expected = logits(model)
    for parameter in (p for n, p in model.named_parameters() if is_adaption_prompt_trainable(n)):
        parameter.data = parameter.data.float()
    assert torch.equal(logits(model), expected)


# ---------------------------------------------------------------------------------------------------------------- training


def test_the_gate_learns_first_and_then_the_prompt():
    model = get_peft_model(base_of(llama), config_for())
    loss_of(model).backward()
    layer = attention(model)
    assert layer.adaption_gate.grad.abs().item() > 0 and not layer.adaption_prompt.grad.any()
    with torch.no_grad():
        layer.adaption_gate.add_(0.1)
    loss_of(model).backward()
    assert layer.adaption_prompt.grad.any()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(make, reentrant):
    def gradients(checkpointing):
        model = adapted(make).train()
        if checkpointing:
            model.get_base_model().config.use_cache = False
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss_of(model).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_a_step_changes_the_active_adapter_only():
    model = two()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = {name: value.clone() for name, value in get_peft_model_state_dict(model, adapter_name="b").items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss_of(model.train()).backward()
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == names_on(0, 1)
    after = get_peft_model_state_dict(model, adapter_name="b")
    assert all(torch.equal(after[name], other[name]) for name in other)


# -------------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("way", ["greedy", "without a cache", "static cache"])
def test_generation_is_a_forward_repeated(make, way):
    model, inputs = adapted(make), batch()
    expected = continued_by_hand(model, **inputs, count=True)
    assert torch.equal(generate(model, **inputs, **WAYS[way]), expected)
    with model.disable_adapter():
        assert not torch.equal(generate(model, **inputs, **WAYS[way]), expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_on_the_left_changes_nothing(make):
    model, inputs = adapted(make), batch()
    for row, padding in enumerate((0, 2, 4)):
        alone = inputs["input_ids"][row : row + 1, padding:]
        expected = generate(model, input_ids=alone, attention_mask=torch.ones_like(alone))[:, -5:]
        assert torch.equal(generate(model, **inputs)[row : row + 1, -5:], expected)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_beams_are_scored_with_the_prompt(make):
    model, inputs = adapted(make), batch(padding=(0, 0))
    found = generate(
        model, **inputs, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    scores = logits(model, {"input_ids": found.sequences})[:, -6:-1].log_softmax(-1)
    chosen = scores.gather(-1, found.sequences[:, -5:, None]).squeeze(-1)
    torch.testing.assert_close(found.sequences_scores, chosen.sum(1), atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- several adapters


def test_a_second_adapter_waits():
    model = get_peft_model(base_of(llama), config_for())
    model.add_adapter("b", config_for(adapter_layers=1))
    assert model.active_adapters == ["default"]
    assert train_names(model) == names_on(0, 1)
    with pytest.raises(ValueError, match="'b' already"):
        model.base_model.add_adapter("b", config_for())
    model.base_model.add_adapter("c", config_for(adapter_layers=1))
    assert model.active_adapters == ["default"] and train_names(model) == names_on(0, 1)


def test_the_parameters_are_the_active_adapters():
    model = two()
    own = {name: model.get_parameter(name) for name in names_on(0, 1)}
    assert model.get_nb_trainable_parameters()[0] == 2 * (LEN * WIDTH + 1)
    model.set_adapter("b")
    assert train_names(model) == names_on(1)
    assert [name for name, _ in model.named_parameters() if "adaption" in name] == names_on(1)
    assert model.get_nb_trainable_parameters()[0] == 2 * WIDTH + 1
    assert attention(model).adaption_prompt.shape == (1, 2, WIDTH)
    model.set_adapter("default")
    assert all(model.get_parameter(name) is parameter for name, parameter in own.items())


def test_each_adapter_computes_as_if_it_was_alone():
    model = two()
    alone = adapted()
    assert torch.equal(logits(model), logits(alone))
    model.set_adapter("b")
    single = get_peft_model(base_of(llama), config_for(adapter_layers=1, adapter_len=2)).eval()
    assert torch.equal(logits(model), logits(moved(single, seed=4)))


def test_used_without_training():
    model = two()
    model.set_adapter("b", inference_mode=True)
    assert train_names(model) == []
    model.set_adapter("b")
    assert train_names(model) == names_on(1)
    frozen = get_peft_model(base_of(llama), config_for(inference_mode=True))
    assert train_names(frozen) == [] and frozen.active_adapters == ["default"]


def test_disabling():
    base = base_of(llama)
    expected = logits(base)
    model = moved(get_peft_model(base, config_for()).eval())
    output = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected) and train_names(model) == []
        assert not loss_of(model).requires_grad
    assert torch.equal(logits(model), output) and train_names(model) == names_on(0, 1)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), output)


def test_what_was_frozen_by_hand_stays_frozen():
    model = adapted()
    attention(model).adaption_gate.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert train_names(model) == names_on(0, 1)[:-1]
    model.set_requires_grad("default")
    assert train_names(model) == names_on(0, 1)


def test_deleting():
    model = two()
    output, base = logits(model), logits(base_of(llama))
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), output)
    assert all(list(attention(model, layer).adaptions) == ["default"] for layer in (0, 1))
    model.delete_adapter("default")
    assert torch.equal(logits(model), base) and train_names(model) == []
    assert not [name for name, _ in model.named_parameters() if "adaption" in name]


def test_deleting_the_active_one():
    model = two()
    model.set_adapter("b")
    other = logits(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="'default' was deleted"):
        model.delete_adapter("default")
    assert model.active_adapter == "b" and train_names(model) == names_on(1)
    assert torch.equal(logits(model), other)


def test_rows_with_adapters_of_their_own():
    model, inputs = two(), batch(padding=(0, 2, 1))
    mixed = logits(model, {**inputs, "adapter_names": ["b", "__base__", "default"]})
    for row, name in enumerate(["b", None, "default"]):
        if name is None:
            with model.disable_adapter():
                expected = logits(model, inputs)[row]
        else:
            model.set_adapter(name)
            expected = logits(model, inputs)[row]
        torch.testing.assert_close(mixed[row], expected, atol=1e-5, rtol=1e-5)


def test_rows_with_adapters_of_their_own_generate():
    model, inputs = two(gpt2), batch()
    mixed = generate(model, **inputs, adapter_names=["b", "default", "b"])
    for name, rows in (("b", [0, 2]), ("default", [1])):
        model.set_adapter(name)
        assert torch.equal(mixed[rows], generate(model, **inputs)[rows])


def test_status():
    model = two()
    assert [(layer.name, layer.module_type) for layer in get_layer_status(model)] == [
        (f"model.model.layers.{layer}.self_attn", "AdaptedAttention") for layer in (0, 1)
    ]
    status = get_model_status(model)
    assert status.available_adapters == ["b", "default"] and status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "b": False}
    assert status.adapter_model_type == "AdaptionPromptModel" and status.num_adapter_layers == 2


# ------------------------------------------------------------------------------------------------ moving, copying, unloading


def test_waiting_adapters_move_with_the_model():
    model = two().double()
    model.set_adapter("b")
    assert attention(model).adaption_prompt.dtype == torch.float64
    assert logits(model).dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_weights_of_their_own(copied):
    model = two()
    twin = copied(model)
    for name in ("default", "b"):
        model.set_adapter(name)
        twin.set_adapter(name)
        assert torch.equal(logits(twin), logits(model)) and train_names(twin) == train_names(model)
    output = logits(model)
    with torch.no_grad():
        attention(twin).adaption_gate.add_(1)
    assert not torch.equal(logits(twin), output) and torch.equal(logits(model), output)


def test_weights_of_another_model_may_take_the_place_of_its_own():
    model, source = adapted(), moved(adapted(), seed=8)
    expected, own = logits(source), logits(model)
    with torch.no_grad():
        given = torch.func.functional_call(model, dict(source.named_parameters()), (), batch())
    assert torch.equal(given.logits, expected) and torch.equal(logits(model), own)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(logits(model), expected)
    layer = attention(model)
    assert layer.adaptions["default"].adaption_gate is layer.adaption_gate


def test_a_replica_computes_with_the_weights_that_it_is_given():
    layer = attention(adapted(gpt2))
    x = torch.randn(2, 3, WIDTH)
    replica = layer._replicate_for_data_parallel()  # as DataParallel makes them
    replica.adaption_prompt, replica.adaption_gate = layer.adaption_prompt, 2 * layer.adaption_gate
    expected = 2 * layer(x)[0] - layer.model(x)[0]
    torch.testing.assert_close(replica(x)[0], expected)


def test_compiles_without_a_break_whichever_is_active():
    torch.compiler.reset()
    model, ids = two(), batch(padding=(0, 0))["input_ids"]
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("default", "b"):
        model.set_adapter(name)
        assert torch.equal(run(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)
    run(input_ids=ids, use_cache=False).logits.sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)
    torch.compiler.reset()


def test_unloading_gives_the_model_back():
    base = base_of(llama)
    expected, names, cls = logits(base), list(base.state_dict()), type(base.model.layers[0].self_attn)
    model = moved(get_peft_model(base, config_for()).eval())
    assert list(get_base_model_state_dict(model)) == names
    plain = model.unload()
    assert list(plain.state_dict()) == names and type(plain.model.layers[0].self_attn) is cls
    assert torch.equal(logits(plain), expected)


def test_merging_is_refused():
    model = adapted()
    with pytest.raises(NotImplementedError, match="self_attn acts on activations"):
        model.merge_adapter()
    with pytest.raises(NotImplementedError, match="self_attn acts on activations"):
        model.merge_and_unload()
    assert isinstance(attention(model), AdaptedAttention)


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(make, low_cpu_mem_usage, tmp_path):
    model = adapted(make)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == get_peft_model_state_dict(model).keys()
    loaded = PeftModel.from_pretrained(base_of(make), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert train_names(loaded) == [] and not any(p.is_meta for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(base_of(make), tmp_path, is_trainable=True)
    assert train_names(trainable) == train_names(model)


@pytest.mark.parametrize("with_state_dict", [False, True])
def test_saving_one_that_is_not_active(with_state_dict, tmp_path):
    model = two()
    model.save_pretrained(tmp_path, state_dict=model.state_dict() if with_state_dict else None)
    model.set_adapter("b")
    saved = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert saved.keys() == set(names_on(1))
    assert all(torch.equal(saved[name], model.get_parameter(name)) for name in saved)
    alone = PeftModel.from_pretrained(base_of(llama), tmp_path / "b")
    assert torch.equal(logits(alone), logits(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_beside_another(low_cpu_mem_usage, tmp_path):
    source = two()
    source.save_pretrained(tmp_path)
    model = adapted()
    expected = logits(model)
    result = model.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(model), expected) and train_names(model) == names_on(0, 1)
    model.set_adapter("b")
    source.set_adapter("b")
    assert torch.equal(logits(model), logits(source))


def test_weights_into_an_adapter_that_is_not_active():
    model, source = two(), two(layers=1)
    with torch.no_grad():
        source.set_adapter("b")
        attention(source).adaption_gate.add_(1)
    before = logits(model)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source, adapter_name="b"), adapter_name="b")
    assert torch.equal(logits(model), before)
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(source))


def test_training_goes_on_after_a_reload(tmp_path):
    def step(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss_of(model).backward()
        optimizer.step()
        return model

    straight = step(adapted())
    straight.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(llama), tmp_path, is_trainable=True)
    straight.zero_grad()
    assert torch.equal(logits(step(again)), logits(step(straight)))


def test_classifiers_have_the_prompt_too(tmp_path):
    def scoring():
        return LlamaForSequenceClassification(LlamaConfig(**SIZES))

    model = get_peft_model(base_of(scoring), config_for(task_type="SEQ_CLS")).eval()
    expected = logits(base_of(scoring))
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(moved(model)), expected)


# ------------------------------------------------------------------------------------------------------------------ errors


def opt():
    return OPTForCausalLM(
        OPTConfig(vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2)
    )


REFUSED = [
    (opt, {}, ValueError, r"'opt' of OPTForCausalLM is none of \['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3'\]"),
    (lambda: nn.Sequential(nn.Linear(2, 2)), {"task_type": None}, ValueError, "None of Sequential is none of"),
    (llama, {"adapter_len": None}, TypeError, "adapter_len of an adaption prompt must be a number, got None"),
    (llama, {"adapter_layers": None}, TypeError, "adapter_layers .* must be a number, got None"),
    (llama, {"adapter_len": 0}, ValueError, "adapter_len .* must be at least 1, got 0"),
    (llama, {"adapter_layers": -1}, ValueError, "adapter_layers .* must be at least 0, got -1"),
    (llama, {"adapter_layers": 3}, ValueError, "adapter_layers=3 are more than the 2 modules .* 'self_attn'"),
    (llama, {"target_modules": "self_atn"}, ValueError, "the 0 modules .* 'self_atn'.* mean 'self_attn'"),
    (llama, {"target_modules": "mlp"}, AttributeError, "layers.0.mlp .* has a q_proj, and this LlamaMLP does not"),
    (gpt2, {"target_modules": "ln_1"}, AttributeError, "h.0.ln_1 .* has a c_proj, .* should be 'attn'"),
]


@pytest.mark.parametrize("make, options, error, message", REFUSED)
@pytest.mark.parametrize("second", [False, True])
def test_refused_with_nothing_changed(make, options, error, message, second):
    torch.manual_seed(0)
    if second and make not in (llama, gpt2):
        pytest.skip("there is no first adapter")
    base = make()
    if second:
        model = get_peft_model(base, config_for())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(error, match=message):
            model.add_adapter("b", config_for(**options))
        assert list(model.peft_config) == ["default"] and len(train_names(model)) == 4
        assert all(list(attention(model, layer).adaptions) == ["default"] for layer in (0, 1))
        assert before.keys() == model.state_dict().keys()
        return
    names = list(base.state_dict())
    with pytest.raises(error, match=message):
        get_peft_model(base, config_for(**options))
    assert list(base.state_dict()) == names
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_two_at_a_time_are_refused():
    model = two()
    with pytest.raises(TypeError, match="one prompt at a time"):
        model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="'default'.*'b'.*self_attn"):
        attention(model).set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="no adapter 'c'"):
        model.set_adapter("c")
    assert model.active_adapters == ["default"] and train_names(model) == names_on(0, 1)
    model.base_model.set_adapter(["b"])
    assert train_names(model) == names_on(1)


def test_injection_without_a_peft_model_is_refused():
    with pytest.raises(ValueError, match="ADAPTION_PROMPT cannot be injected"):
        inject_adapter_in_model(config_for(), base_of(llama))


def test_attention_needs_positions():
    layer = attention(adapted())
    with pytest.raises(
        ValueError, match=r"LlamaAttention .* needs position_embeddings, .* got only \['hidden_states'\]"
    ):
        llama_compute_query_states(layer.model, hidden_states=torch.randn(1, 2, WIDTH))


# ------------------------------------------------------------------------------------------------------------------- parts


def test_the_configuration_fills_in_the_target():
    assert prepare_config(config_for(), llama()).target_modules == "self_attn"
    assert prepare_config(config_for(), gpt2()).target_modules == "attn"
    assert prepare_config(config_for(target_modules="other"), gpt2()).target_modules == "other"
    assert config_for().is_adaption_prompt and not config_for().is_prompt_learning
    assert TRANSFORMERS_MODEL_CONFIG["llama"][1:] == ("self_attn", "k_proj", "v_proj", "o_proj")
    assert TRANSFORMERS_MODEL_CONFIG["gpt2"][1:] == ("attn", "c_attn", None, None)


def test_rotation():
    assert llama_rotate_half(torch.arange(4.0)).tolist() == [-2, -3, 0, 1]
    q, angle = torch.randn(2, 3, 2, 4), torch.randn(9, 4)
    ids = torch.tensor([[2, 3], [0, 8]])
    found = llama_apply_rotary_pos_emb(q, angle.cos(), angle.sin(), ids)
    for row in (0, 1):
        for token in (0, 1):
            one, a = q[row, :, token], angle[ids[row, token]]
            torch.testing.assert_close(found[row, :, token], one * a.cos() + llama_rotate_half(one) * a.sin())
    tables = angle.cos()[None, None], angle.sin()[None, None]
    assert torch.equal(llama_apply_rotary_pos_emb(q, *tables, ids), found)


def test_queries_of_gpt2():
    module, x = gpt2().transformer.h[0].attn, torch.randn(2, 3, WIDTH)
    found = gpt2_compute_query_states(module, x)
    assert found.shape == (2, 2, 3, 8)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), module.c_attn(x)[..., :WIDTH])
    crossing = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=1, n_head=2, add_cross_attention=True, **NO_DROPOUT)
    )
    module = crossing.transformer.h[0].crossattention
    found = gpt2_compute_query_states(module, x, encoder_hidden_states=torch.randn(2, 5, WIDTH))
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), module.q_attn(x))


def test_names_of_its_parameters():
    names = ["a.adaption_prompt", "a.adaption_gate", "a.q_proj", "x.adaption_gate.y"]
    assert [is_adaption_prompt_trainable(name) for name in names] == [True, True, False, False]
