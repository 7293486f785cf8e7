"""The names of the methods and tasks, and the call by which a method makes itself known."""

from __future__ import annotations

import enum

from .registry import METHODS, Method

_METHOD_NAMES = """
    PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT ADAPTION_PROMPT IA3
    BEFT LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA HRA VBLORA UNILORA CPT MISS
    RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT
    SHADOW SUPERTUNING DEFT
"""


class _Names(str, enum.Enum):
    """A name that is its own value, as configuration files hold it."""


# A method's name is its value: listing each once is enough, and a new method is one more word.
PeftType = _Names("PeftType", {name: name for name in _METHOD_NAMES.split()}, module=__name__)
PeftType.__doc__ = "A parameter-efficient fine-tuning method; the value is what `adapter_config.json` stores."


_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

TaskType = _Names("TaskType", {task: task for task in _TASKS}, module=__name__)
TaskType.__doc__ = "What the model is for: it decides the `PeftModelFor...` class, and which head is trained in full."


def register_peft_method(
    *,
    name: str,
    config_cls: type,
    model_cls: type,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Make a method known to every table of the library.

    Args:
        name: lower-case name; upper-cased it is a member of `PeftType`.
        config_cls: the method's configuration class.
        model_cls: its tuner (a `BaseTuner`) or, for prompt learning, its encoder class.
        prefix: what the names of its parameters start with; `name + "_"` by default.
        is_mixed_compatible: whether `PeftMixedModel` may combine it with other methods.

    Raises:
        ValueError: the name or the prefix is not usable.
        KeyError: the method is registered already.
    """
    if name.endswith("_"):
        raise ValueError(f"A method's name must not end in an underscore, got {name!r}.")
    if name != name.lower():
        raise ValueError(f"A method's name is lower case: {name.lower()!r}, not {name!r}.")
    if name.upper() not in PeftType.__members__:
        raise ValueError(f"{name!r} is no member of PeftType in lower case; add it to PeftType first.")
    peft_type = PeftType(name.upper())
    prefix = f"{name}_" if prefix is None else prefix
    if peft_type in METHODS:
        raise KeyError(f"The method {peft_type.value} is registered already, with {METHODS[peft_type].config_cls}.")
    declared = getattr(model_cls, "prefix", prefix)
    if declared != prefix:
        raise ValueError(f"{model_cls.__name__}.prefix is {declared!r}, but {name!r} is registered with {prefix!r}.")
    METHODS[peft_type] = Method(peft_type, config_cls, model_cls, prefix, is_mixed_compatible)
