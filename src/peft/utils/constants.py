"""Names of files and shorthands, and which modules each method adapts by default, by the `model_type` of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
"""From so many targets on, it pays to look for a shorter list of suffixes that selects the same modules."""

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Weights of these types are computed with in a wider one; given by name since not every torch has them all."""

Targets = dict[str, list[str] | str]


def _table(rows: str) -> Targets:
    """Read lines of the form `model types: modules`."""
    table: Targets = {}
    for row in rows.strip().splitlines():
        families, modules = row.split(":")
        table.update({family: modules.split() for family in families.split()})
    return table


def _like(base: Targets, rows: str = "", without: str = "", only: Iterable[str] | None = None) -> Targets:
    """Another method's table with some rows replaced, added or left out; its lists are its own."""
    families = [family for family in (base if only is None else only) if family not in without.split()]
    copied = {family: base[family] if isinstance(base[family], str) else list(base[family]) for family in families}
    return {**copied, **_table(rows)} if rows else copied


# Attention's query and value projections, as in the LoRA paper, or the fused projection where there is one.
_LORA = {
    **_table(
        """
        t5 mt5: q v
        bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3: q_proj v_proj
        gpt2 gpt_bigcode: c_attn
        bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon: query_key_value
        blip-2: q v q_proj v_proj
        bert roberta xlm-roberta electra layoutlm: query value
        deberta-v2: query_proj value_proj
        deberta: in_proj
        mpt: Wqkv
        btlm: c_proj c_attn
        codegen: qkv_proj
        phi: q_proj v_proj fc1 fc2
        nemotron_h: q_proj k_proj v_proj o_proj
        rwkv: key value receptance output
        rwkv7: r_proj k_proj v_proj o_proj key value
        """
    ),
    # The towers for images and sound have projections of the same names; only the language model is meant.
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = _LORA
TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING = _like(_LORA)
TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING = _like(_LORA)

TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING = _like(_LORA, "vit: query value")

# Without phi's feed-forward layers: VeRA and its relatives share frozen matrices between targets, best of one shape.
TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING = _like(_LORA, "phi: q_proj v_proj")
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = _like(_LORA, "phi: q_proj v_proj")
TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING = _like(_LORA, "phi: q_proj v_proj\nvit: query value")
TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING = _like(_LORA, "phi: q_proj v_proj\ndinov2: query value")

# Methods on square or block-wise weights take a projection of GPT-2 that is not three fused ones.
_UNFUSED = "gpt2 gpt_bigcode: mlp.c_proj"
TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING = _like(_LORA, _UNFUSED)
TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING = _like(_LORA, _UNFUSED)
TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING = _like(_LORA, _UNFUSED, without="btlm rwkv rwkv7")

# AdaLoRA prunes ranks where they are not needed, so it starts from many more modules.
_NOT_IN_ADALORA = (
    "blip-2 xlm-roberta electra layoutlm chatglm mpt RefinedWebModel RefinedWeb falcon btlm codegen mistral mixtral "
    "stablelm phi rwkv rwkv7"
)
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = _like(
    _LORA,
    """
    t5: q k v o wi wo
    mt5: q k v o wi_0 wi_1 wo
    bart opt: q_proj k_proj v_proj out_proj fc1 fc2
    deberta-v2: query_proj key_proj value_proj dense
    roberta: query key value dense
    """,
    without=_NOT_IN_ADALORA,
)
TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING = _like(
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING, "roberta: query value"
)

# BEFT tunes the biases of the value projections.
TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING = _table(
    """
    t5 mt5: v
    bert roberta: value
    deberta-v2: value_proj
    bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3: v_proj
    """
)

# (IA)^3 rescales keys, values and the activations between the feed-forward layers; the second table names the latter.
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = _table(
    """
    t5: k v wo
    mt5: k v wi_1
    bart: q_proj v_proj fc2
    opt: q_proj k_proj fc2
    phi: q_proj v_proj fc2
    gpt2 gpt_bigcode: c_attn mlp.c_proj
    gpt_neo: q_proj v_proj c_proj
    gptj: q_proj v_proj fc_out
    bloom: query_key_value mlp.dense_4h_to_h
    gpt_neox RefinedWeb RefinedWebModel falcon: query_key_value dense_4h_to_h
    bert roberta: key value output.dense
    deberta-v2: key_proj value_proj output.dense
    deberta: in_proj output.dense
    llama mistral: k_proj v_proj down_proj
    mixtral: k_proj v_proj w2
    llama4 gemma gemma2 gemma3_text qwen2 qwen3: q_proj v_proj down_proj
    """
)
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {
    # None of mT5: its wi_1 is rescaled on the way out, like keys and values, not on the way in.
    family: [] if family == "mt5" else modules[-1:]
    for family, modules in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items()
}

TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING = _table(
    """
    bart: self_attn_layer_norm encoder_attn_layer_norm final_layer_norm
    blip-2: layernorm LayerNorm final_layer_norm self_attn_layer_norm
    bloom falcon: input_layernorm post_attention_layernorm ln_f
    gemma llama mistral: input_layernorm post_attention_layernorm norm
    gpt2: ln_1 ln_2 ln_f
    gptj: ln_1 ln_f
    llava: multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head
    mt5 t5: layer_norm final_layer_norm
    phi: input_layernorm final_layernorm
    qwen2 qwen3: post_attention_layernorm
    """
)
for _family in ("gemma2", "gemma3_text"):  # their blocks normalise before and after both halves
    TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING[_family] = [
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"),
    ]

# OSF trains whole weights within a subspace: every projection of attention and feed-forward.
TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING = _table(
    """
    llama llama4 mistral mixtral phi: q_proj k_proj v_proj o_proj gate_proj down_proj up_proj
    gemma gemma2 gemma3_text qwen2 qwen3: q_proj k_proj v_proj o_proj gate_proj down_proj up_proj
    bloom falcon gpt_neox: query_key_value dense_4h_to_h
    gpt2 gpt_bigcode: c_attn c_proj
    gptj: q_proj k_proj v_proj out_proj fc_in fc_out
    opt: q_proj k_proj v_proj out_proj fc1 fc2
    """
)

PastKeyValues = tuple[torch.Tensor, ...]


def bloom_model_postprocess_past_key_value(past_key_values: PastKeyValues) -> tuple[PastKeyValues, ...]:
    """Lay a prefix out as Bloom of old transformers releases kept its cache, batch and heads in one dimension.

    Args:
        past_key_values: per layer, keys and values stacked: (2, batch, heads, tokens, head_dim).

    Returns:
        Per layer (keys, values): (batch * heads, head_dim, tokens) and (batch * heads, tokens, head_dim).
    """
    pairs = [pair.flatten(1, 2) for pair in past_key_values]
    return tuple((keys.transpose(-1, -2), values) for keys, values in pairs)


def starcoder_model_postprocess_past_key_value(past_key_values: PastKeyValues) -> PastKeyValues:
    """Lay a prefix out as GPTBigCode of old transformers releases kept its cache: one head, keys beside values.

    Args:
        past_key_values: per layer, keys and values stacked: (2, batch, heads, tokens, head_dim).

    Returns:
        Per layer (batch, tokens, 2 * head_dim), from the first head.
    """
    return tuple(torch.cat((pair[0, :, 0], pair[1, :, 0]), dim=-1) for pair in past_key_values)


TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Callable] = {}
"""Models whose cache needs another layout than a prefix has. None of the supported transformers releases does."""
