"""Parameter-efficient fine-tuning for torch models.

Names are resolved when they are first asked for: `import peft` itself loads nothing but this file.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

__version__ = "0.22.0"

_HOMES: dict[str, str] = {
    **dict.fromkeys(("PeftConfig", "PromptLearningConfig"), "config"),
    **dict.fromkeys(
        (
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
            "get_layer_status",
            "get_model_status",
        ),
        "peft_model",
    ),
    "PeftMixedModel": "mixed_model",
    **dict.fromkeys(
        (
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        ),
        "auto",
    ),
    **dict.fromkeys(
        (
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
            "PEFT_TYPE_TO_PREFIX_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "get_peft_config",
            "inject_adapter_in_model",
        ),
        "mapping",
    ),
    **dict.fromkeys(
        (
            "compose_cartridge_adapters",
            "initialize_kv_prefix_from_past_key_values",
            "initialize_kv_prefix_from_text",
            "prompt_embeddings_from_past_key_values",
        ),
        "tuners.cartridge.utils",
    ),
    "get_peft_model": "mapping_func",
    "find_kappa_target_modules": "helpers",
    **dict.fromkeys(
        (
            "NoMatchingPeftModuleError",
            "PeftError",
            "PeftType",
            "PeftWarning",
            "TaskType",
            "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
            "bloom_model_postprocess_past_key_value",
            "cast_mixed_precision_params",
            "get_base_model_state_dict",
            "get_peft_model_state_dict",
            "load_peft_weights",
            "prepare_model_for_kbit_training",
            "register_peft_method",
            "replace_lora_weights_loftq",
            "set_base_model_state_dict",
            "set_peft_model_state_dict",
            "shift_tokens_right",
        ),
        "utils",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_HOMES, *importlib.import_module("peft.tuners").__all__})
    if name.startswith("__"):
        raise AttributeError(f"module 'peft' has no attribute {name!r}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"peft.{_HOMES[name]}"), name)
    elif importlib.util.find_spec(f"peft.{name}") is not None:
        return importlib.import_module(f"peft.{name}")
    else:
        # What is left is a method's: its configuration, its tuner, its helpers.
        try:
            value = getattr(importlib.import_module("peft.tuners"), name)
        except AttributeError:
            raise AttributeError(f"module 'peft' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
