"""Constants, errors and helpers; and public import paths of much that lives in the engine, resolved when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# Methods whose table of default targets is exported here.
_TABLES = """
    ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HRA IA3 LILY LNTUNING LOHA LOKR LORA MISS OFT
    PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT
""".split()

_NAMES_BY_MODULE: dict[str, tuple[str, ...]] = {
    "constants": (
        *(f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING" for method in _TABLES),
        "ALLOWED_COMPUTE_DTYPES",
        "CONFIG_NAME",
        "INCLUDE_LINEAR_LAYERS_SHORTHAND",
        "SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "UPCAST_DTYPES",
        "WEIGHTS_NAME",
        "bloom_model_postprocess_past_key_value",
    ),
    "error": ("NoMatchingPeftModuleError", "PeftError"),
    "integrations": ("map_cache_to_layer_device_map",),
    "loftq_utils": ("replace_lora_weights_loftq",),
    "other": (
        "AuxiliaryTrainingWrapper",
        "ModulesToSaveWrapper",
        "TrainableTokensWrapper",
        "_freeze_adapter",
        "_get_batch_size",
        "_get_input_embeddings_name",
        "_get_submodules",
        "_is_valid_match",
        "_prepare_prompt_learning_config",
        "_set_adapter",
        "_set_trainable",
        "cast_mixed_precision_params",
        "get_gptqmodel_quant_linear",
        "get_quantization_config",
        "id_tensor_storage",
        "infer_device",
        "prepare_model_for_kbit_training",
        "set_additional_trainable_modules",
        "shift_tokens_right",
        "transpose",
    ),
    "peft_types": ("PeftType", "TaskType", "register_peft_method"),
    "quantization_utils": ("get_quantization_kwargs", "quantization_extra_repr", "resolve_quantization_backend"),
    "save_and_load": (
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ),
    "warning": ("PeftWarning",),
}
_HOMES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _HOMES and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    # A name that is not exported may still be one of `other`, from where older programs took it.
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'other')}")
    if not hasattr(home, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
