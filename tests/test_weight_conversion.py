"""Adapters of models whose experts were one module each before transformers 5, and are single parameters now."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from versions import skip_file

import peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import infer_device

skip_file("transformers", "5.0", "has experts of one module each, as the adapters do")

from peft.utils.transformers_weight_conversion import (  # noqa: E402
    FlattenDims,
    PeftConcatenate,
    PermuteDims,
    build_peft_weight_mapping,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)

pytestmark = pytest.mark.compat

EXPERTS, HIDDEN, INTER = 11, 16, 24  # so many experts that their names sort differently as text and as numbers
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def mixtral(layers=1):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config).eval()


def qwen3_moe(**options):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=3,
        num_experts_per_tok=2,
        head_dim=8,
        **options,
    )
    return Qwen3MoeForCausalLM(config).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


# ------------------------------------------------------------------------------------------------------- single operations


def test_flatten_dims():
    tensor = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(FlattenDims((0, 1)).convert({"a": tensor}, ["a"], ["b"], None)["a"], tensor.view(6, 4))
    assert torch.equal(FlattenDims((1, 2)).convert({"a": [tensor]}, ["a"], ["b"], None)["a"], tensor.view(2, 12))


def test_permute_dims():
    tensor = torch.arange(24.0).view(2, 3, 4)
    result = PermuteDims((2, 0, 1)).convert({"a": tensor}, ["a"], ["b"], None)["a"]
    assert torch.equal(result, tensor.permute(2, 0, 1)) and result.is_contiguous()


def test_concatenation_is_block_diagonal_per_expert_and_experts_vary_fastest():
    gate, up = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[3.0]], [[4.0]]])  # two experts, out 1, r 1
    result = PeftConcatenate(dim=1).convert({"g": gate, "u": up}, ["g", "u"], ["t"], full_layer_name="x.lora_B.weight")
    assert result.keys() == {"x.lora_B.weight"}
    assert result["x.lora_B.weight"].tolist() == [[1, 2, 0, 0], [0, 0, 3, 4]]


@pytest.mark.parametrize("operation", [FlattenDims((0, 1)), PermuteDims((1, 0)), PeftConcatenate(dim=1)])
def test_operations_have_no_reverse(operation):
    with pytest.raises(NotImplementedError):
        operation.reverse_op  # noqa: B018


# ------------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    "targets, modules, parameters",
    [
        (["q_proj", "w1", "w2", "w3"], {"q_proj"}, ["gate_up_proj", "down_proj"]),
        (["w1", "w3"], set(), ["gate_up_proj"]),
        (["w2", "gate"], set(), ["down_proj", "gate.weight"]),
        (["block_sparse_moe.gate", "q_proj"], {"q_proj"}, ["gate.weight"]),
        (r".*\.(q_proj|w1|w2|w3)", {"q_proj"}, ["gate_up_proj", "down_proj"]),
        (r".*block_sparse_moe\.experts\.\d+\.w[123]", set(), ["gate_up_proj", "down_proj"]),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"}, ["gate_up_proj", "down_proj", "gate.weight"]),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}, []),
        (r".*q_proj", r".*q_proj", []),
    ],
)
def test_names_of_experts_move_to_target_parameters(targets, modules, parameters):
    model = mixtral(layers=2)
    config = LoraConfig(r=4, target_modules=targets)
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    assert config.target_modules == modules
    assert config.target_parameters == parameters


def test_two_fused_projections_share_the_sum_of_their_ranks_with_their_scaling():
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["w1", "w2", "w3"])
    model = get_peft_model(mixtral(), config)
    assert config.rank_pattern == {r".*\.gate_up_proj": 8}
    assert config.alpha_pattern == {r".*\.gate_up_proj": 24}
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    assert {layer.parameter_name: (layer.r, layer.scaling) for layer in wrappers} == {
        "gate_up_proj": ({"default": 8}, {"default": 3.0}),
        "down_proj": ({"default": 4}, {"default": 3.0}),
    }


def test_scaling_with_rslora_and_patterns_is_what_the_branches_had():
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["w1", "w3", "w2"], rank_pattern={"w1": 9, "w3": 9, "w2": 2}
    )
    model = get_peft_model(mixtral(), config)
    scalings = {m.parameter_name: m.scaling["default"] for m in model.modules() if hasattr(m, "parameter_name")}
    assert scalings == pytest.approx({"gate_up_proj": 6 / 3, "down_proj": 6 / 2**0.5})
    assert config.rank_pattern == {r".*\.gate_up_proj": 18, r".*\.down_proj": 2}


def test_what_is_limited_to_some_layers_stays_so():
    config = LoraConfig(target_modules=["w1", "w3"], layers_to_transform=[1], layers_pattern="layers")
    model = get_peft_model(mixtral(layers=2), config)
    assert config.target_parameters == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert model.base_model.targeted_parameter_names == ["model.layers.1.mlp.experts.gate_up_proj"]


def test_dense_layers_of_the_same_names_stay_targeted():
    config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"])
    model = get_peft_model(qwen3_moe(mlp_only_layers=[0]), config)
    assert config.target_modules == {"gate_proj", "up_proj", "down_proj"}
    assert sorted(model.base_model.targeted_module_names) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert model.base_model.targeted_parameter_names == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]


@pytest.mark.parametrize(
    "targets, mentions",
    [(["w1"], ("w1", "w3", "gate_up_proj")), (["experts.0.w1", "experts.0.w3"], ("All experts", "gate_up_proj"))],
)
def test_half_of_a_fused_parameter_cannot_be_targeted(targets, mentions):
    with pytest.raises(ValueError) as error:
        get_peft_model(mixtral(), LoraConfig(target_modules=targets))
    assert all(mention in str(error.value) for mention in mentions)


def test_branches_with_different_scalings_cannot_share_factors():
    with pytest.raises(ValueError, match="one scaling"):
        get_peft_model(mixtral(), LoraConfig(target_modules=["w1", "w3"], alpha_pattern={"w1": 1}))


def test_conversion_is_done_once():
    config = LoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"])
    model = get_peft_model(mixtral(), config)
    before = copy.deepcopy(config)
    model.add_adapter("other", config)
    assert config == before
    state = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "other")}
    assert state["default"].keys() == state["other"].keys()


# ----------------------------------------------------------------------------------------------------------------- mappings


def test_mapping_of_nothing_is_empty():
    assert build_peft_weight_mapping([], "default") == []
    assert build_peft_weight_mapping(None, "default") == []


def test_mapping_of_a_model_without_experts_renames_only():
    conversions = get_model_conversion_mapping(llama())
    mapping = build_peft_weight_mapping(conversions, "mine", LoraConfig())
    assert mapping[-len(conversions) :] == conversions

    def renamed(name):
        for step in mapping:
            name, _ = step.rename_source_key(name)
        return name

    path = "model.layers.0.self_attn.q_proj"
    assert renamed(f"base_model.model.{path}.lora_A.weight") == f"{path}.lora_A.mine.weight"
    assert renamed(f"base_model.model.{path}.lora_magnitude_vector") == f"{path}.lora_magnitude_vector.mine.weight"
    assert (
        renamed("base_model.model.model.embed_tokens.lora_embedding_A") == "model.embed_tokens.lora_embedding_A.mine"
    )


def test_mapping_is_not_undone_when_the_base_model_is_saved():
    mapping = build_peft_weight_mapping(get_model_conversion_mapping(llama()), "default", LoraConfig())
    mapping[0].rename_source_key("base_model.model.model.x")
    assert not mapping[0].was_used()


@pytest.mark.parametrize(
    "config, gate_up",
    [
        (None, ".experts.base_layer.lora_A.default.weight"),
        (LoraConfig(target_modules=["w1", "w3", "w2"]), ".experts.base_layer.lora_A.default.weight"),
        (LoraConfig(target_modules=["w1", "w3"]), ".experts.lora_A.default.weight"),
        (LoraConfig(target_parameters=["experts.gate_up_proj"]), ".experts.lora_A.default.weight"),
    ],
)
def test_the_wrapper_of_one_parameter_is_inside_that_of_the_other_only_if_both_are_adapted(config, gate_up):
    mapping = build_peft_weight_mapping(get_model_conversion_mapping(mixtral()), "default", config)
    targets = [
        step.target_patterns
        for step in mapping
        if len(step.source_patterns) == 2 and "lora_A" in step.target_patterns[0]
    ]
    assert targets == [[gate_up]]


# --------------------------------------------------------------------------------------------------------- files from before


def old_adapter(folder, targets, r=4, **options):
    """An adapter file as transformers 4 had it for Mixtral, and the model that it makes of the base model."""
    config = LoraConfig(r=r, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    scaling = 8 / (r**0.5 if config.use_rslora else r)
    adapted, state = mixtral(), {}

    def adapt(name, weight):
        A, B = torch.randn(r, weight.shape[1]) * 0.3, torch.randn(weight.shape[0], r) * 0.3
        prefix = f"base_model.model.model.layers.0.{name}"
        state[f"{prefix}.lora_A.weight"], state[f"{prefix}.lora_B.weight"] = A, B
        weight.data += scaling * B @ A

    layer = adapted.model.layers[0]
    if "q_proj" in targets:
        adapt("self_attn.q_proj", layer.self_attn.q_proj.weight)
    if "gate" in targets:
        adapt("block_sparse_moe.gate", layer.mlp.gate.weight)
    experts = layer.mlp.experts
    for index in range(EXPERTS):
        parts = {
            "w1": experts.gate_up_proj[index, :INTER],
            "w3": experts.gate_up_proj[index, INTER:],
            "w2": experts.down_proj[index],
        }
        for name in parts.keys() & set(targets):
            adapt(f"block_sparse_moe.experts.{index}.{name}", parts[name])
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")
    return adapted


CASES = {
    "all": (["q_proj", "w1", "w2", "w3", "gate"], {}),
    "one parameter": (["w1", "w3"], {}),
    "the other": (["w2"], {}),
    "rslora": (["q_proj", "w1", "w2", "w3"], {"use_rslora": True}),
    "dropout": (["w1", "w2", "w3"], {"lora_dropout": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_old_file_computes_what_it_was_trained_for(case, tmp_path):
    targets, options = CASES[case]
    expected = old_adapter(tmp_path, targets, **options)(IDS).logits
    model = PeftModel.from_pretrained(mixtral(), tmp_path)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(mixtral()(IDS).logits, expected, atol=1e-3)
    model.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(mixtral(), tmp_path / "new")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=0, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_old_files_itself(case, tmp_path):
    targets, options = CASES[case]
    expected = old_adapter(tmp_path, targets, **options)(IDS).logits
    model = mixtral()
    info = model.load_adapter(str(tmp_path), adapter_name="mine")
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=1e-5)


def test_a_file_of_today_is_left_alone(tmp_path):
    model = get_peft_model(mixtral(), LoraConfig(target_modules=["q_proj"], target_parameters=["gate_up_proj"]))
    state = get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    assert convert_peft_adapter_state_dict_for_transformers(model, config, state) is state


def test_a_file_that_lacks_an_expert_does_not_fit(tmp_path):
    old_adapter(tmp_path, ["w2"])
    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors", device=infer_device())
    state = {name: value for name, value in state.items() if ".experts.3." not in name}
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(mixtral(), tmp_path)


# --------------------------------------------------------------------------------------------- transformers' own load_adapter


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [1, 2]}],
    ids=["plain", "copies", "dora", "tokens"],
)
@pytest.mark.parametrize("name", ["default", "mine"])
def test_transformers_loads_what_peft_saved(options, name, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    plain = llama()
    info = plain.load_adapter(str(tmp_path), adapter_name=name)
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-5)
    assert not any(parameter.requires_grad for n, parameter in plain.named_parameters() if "lora" in n)
    plain.save_pretrained(tmp_path / "again")
    again = llama()
    again.load_adapter(str(tmp_path / "again"))
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-5)


def test_other_methods_keep_their_names():
    config = peft.LoHaConfig(target_modules=["q_proj"])
    model = mixtral()
    mapping = build_peft_weight_mapping(get_model_conversion_mapping(model), "default", config)
    patterns = [pattern for step in mapping for pattern in step.source_patterns]
    assert r"(hada_[^\.]*)" in patterns and not any(r"(lora_" in pattern for pattern in patterns)
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    assert config.target_modules == {"q_proj"}
