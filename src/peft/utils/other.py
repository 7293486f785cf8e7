"""Public import path of helpers and wrappers."""
# layer: top

from ..engine.additional import _set_trainable, set_additional_trainable_modules
from ..engine.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from ..engine.matching import get_pattern_key, match_target_against_key
from ..engine.tuner import set_adapter as _set_adapter
from ..engine.tying import input_embedding_name as _get_input_embeddings_name
from . import constants as _constants
from .constants import *  # noqa: F403
from .devices import infer_device
from .modules import _freeze_adapter, _get_batch_size, _get_submodules, _is_valid_match, str_to_bool
from .tensors import id_tensor_storage, transpose


def is_gptqmodel_quant_linear(module) -> bool:
    return False
