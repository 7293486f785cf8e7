"""Public import path of saving and loading; it lives in the engine."""
# layer: top

from ..engine.auxiliary import AuxiliaryTrainingWrapper
from ..engine.checkpoint import (
    get_base_model_state_dict,
    get_embedding_layer_name,
    get_peft_model_state_dict,
    has_valid_embedding_base_layer,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    torch_load,
)
from ..engine.matching import match_target_against_key
from ..mapping import PEFT_TYPE_TO_TUNER_MAPPING
from .constants import EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from .devices import infer_device
from .hub import file_exists as check_file_exists_on_hf_hub
from .integrations import TpInfo, dtensor_from_local_like
from .peft_types import PeftType
from .warning import PeftWarning

__all__ = [
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "PeftType",
    "PeftWarning",
    "TpInfo",
    "check_file_exists_on_hf_hub",
    "dtensor_from_local_like",
    "get_base_model_state_dict",
    "get_embedding_layer_name",
    "get_peft_model_state_dict",
    "has_valid_embedding_base_layer",
    "infer_device",
    "load_peft_weights",
    "match_target_against_key",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "torch_load",
]
