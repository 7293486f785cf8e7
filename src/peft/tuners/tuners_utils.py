"""Public import path of what all tuners have in common; it lives in the engine."""
# layer: top

from ..config import PeftConfig
from ..engine.auxiliary import AuxiliaryTrainingWrapper
from ..engine.backends import QuantizationBackend
from ..engine.encoders import BasePromptEncoder
from ..engine.injection import set_additional_trainable_modules
from ..engine.inspection import find_parameter_name_by_module, get_device_map, inspect_matched_modules
from ..engine.layer import BaseTunerLayer, check_adapters_to_merge
from ..engine.matching import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    match_target_against_key,
)
from ..engine.offload import onload_layer
from ..engine.operations import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from ..engine.replication import clone_module, replicate_layers
from ..engine.tuner import BaseTuner
from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from ..utils.buffer_dict import BufferDict
from ..utils.constants import (
    DUMMY_MODEL_CONFIG,
    DUMMY_TARGET_MODULES,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
    UPCAST_DTYPES,
)
from ..utils.error import NoMatchingPeftModuleError
from ..utils.integrations import init_empty_weights
from ..utils.other import _get_submodules, _set_adapter, is_gptqmodel_quant_linear
from ..utils.peft_types import PeftType, TaskType
from ..utils.warning import PeftWarning

__all__ = [
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "SEQ_CLS_HEAD_NAMES",
    "UPCAST_DTYPES",
    "AuxiliaryTrainingWrapper",
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftType",
    "PeftWarning",
    "QuantizationBackend",
    "TaskType",
    "_ExcludedModule",
    "_get_submodules",
    "_maybe_include_all_linear_layers",
    "_set_adapter",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "init_empty_weights",
    "inspect_matched_modules",
    "is_gptqmodel_quant_linear",
    "match_target_against_key",
    "onload_layer",
    "replicate_layers",
    "set_adapter",
    "set_additional_trainable_modules",
    "set_requires_grad",
]
