"""What libraries need that put adapters into their own models: every function takes the model."""

from .engine.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .engine.operations import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from .mapping import inject_adapter_in_model

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
