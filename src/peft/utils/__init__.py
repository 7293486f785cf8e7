"""Constants, errors and helpers; and public import paths of much that lives in the engine, resolved when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_HOMES: dict[str, str] = {
    **dict.fromkeys(("PeftType", "TaskType", "register_peft_method"), "peft_types"),
    **dict.fromkeys(("PeftError", "NoMatchingPeftModuleError"), "error"),
    "PeftWarning": "warning",
    **dict.fromkeys(
        (
            "get_peft_model_state_dict",
            "load_peft_weights",
            "set_peft_model_state_dict",
            "get_base_model_state_dict",
            "set_base_model_state_dict",
        ),
        "save_and_load",
    ),
    "replace_lora_weights_loftq": "loftq_utils",
    "map_cache_to_layer_device_map": "integrations",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({*_HOMES, *importlib.import_module(f"{__name__}.other").__all__} - {"replace_lora_weights_loftq"})
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    else:
        value = getattr(importlib.import_module(f"{__name__}.other"), name, None)
        if value is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value
