"""Loading a base model and its adapter in one call."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from .config import PeftConfig
from .peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .utils.constants import TOKENIZER_CONFIG_NAME
from .utils.hub import file_exists as check_file_exists_on_hf_hub

TASK_MODELS = (
    PeftModelForSequenceClassification,
    PeftModelForSeq2SeqLM,
    PeftModelForCausalLM,
    PeftModelForTokenClassification,
    PeftModelForQuestionAnswering,
    PeftModelForFeatureExtraction,
)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {cls.task.value: cls for cls in TASK_MODELS}


def get_default_import_allowlist() -> list[str]:
    """Libraries that an adapter's file may name as the home of its base model's class."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: list[str], parent_name: str) -> None:
    """Raise unless a module is one of the allowed libraries or inside one.

    Raises:
        ValueError: it is not.
    """
    if not any(parent_name == name or parent_name.startswith(f"{name}.") for name in allowlist):
        raise ValueError(
            f"The adapter's file names a class in {parent_name!r}, which is not among the libraries to import from: "
            f"{sorted(allowlist)}. If you trust it, pass import_allowlist=[{parent_name.partition('.')[0]!r}]."
        )


class _BaseAutoPeftModel:
    """Builds the base model that an adapter names, and wraps it with the adapter."""

    _target_class: ClassVar[str | None] = None
    _target_peft_class: ClassVar[type[PeftModel] | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is not constructed; use {type(self).__name__}.from_pretrained(path).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter with the base model that its configuration names.

        Args:
            pretrained_model_name_or_path: folder or repository of the adapter.
            adapter_name: the name to give it.
            is_trainable: go on training it.
            config: use this configuration instead of the saved one.
            revision: of the adapter.
            import_allowlist: libraries that the base model's class may come from.
            kwargs: of the base model's and the adapter's `from_pretrained`.

        Raises:
            ValueError: the adapter is for another task, or does not say what its base model is.
        """
        peft_config = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        base_cls, peft_cls = cls._classes(peft_config, import_allowlist)
        if not peft_config.base_model_name_or_path:
            raise ValueError(
                f"The configuration at {os.fspath(pretrained_model_name_or_path)!r} does not say what its base model is: "
                f"base_model_name_or_path is {peft_config.base_model_name_or_path!r}. Load the base model yourself and use "
                "PeftModel.from_pretrained."
            )
        base = base_cls.from_pretrained(peft_config.base_model_name_or_path, revision=peft_config.revision, **kwargs)
        _resize_embeddings(base, pretrained_model_name_or_path, revision, kwargs)
        return peft_cls.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _classes(cls, config: PeftConfig, allowlist: list[str] | None) -> tuple[Any, type[PeftModel]]:
        """Class of the base model, and of the model around it."""
        if config.task_type is not None:
            expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
            if cls._target_class is None or cls._target_peft_class is not expected:
                raise ValueError(
                    f"The adapter has task_type={config.task_type!r}, which {cls.__name__} does not load; use "
                    f"Auto{expected.__name__}."
                )
            return getattr(importlib.import_module("transformers"), cls._target_class), expected
        mapping = config.auto_mapping or {}
        if not mapping.get("parent_library"):
            raise ValueError(
                f"The adapter's configuration has neither a task_type nor an auto_mapping, so {cls.__name__} cannot tell what "
                "its base model is. Load the base model yourself and use PeftModel.from_pretrained."
            )
        base = _class_called(mapping, allowlist or get_default_import_allowlist())
        return base, cls._target_peft_class or PeftModel


def _class_called(mapping: dict[str, Any], allowlist: list[str]) -> Any:
    """The class that an adapter's file names, out of one of the libraries to import from."""
    parent, name = (mapping.get(key) for key in ("parent_library", "base_model_class"))
    if not isinstance(parent, str) or not isinstance(name, str):
        raise ValueError(
            "The auto_mapping in an adapter's configuration names a class by the texts parent_library and "
            f"base_model_class; found {mapping}. Load the base model yourself and use PeftModel.from_pretrained."
        )
    check_import_allowlist(allowlist, parent)
    try:
        found = getattr(importlib.import_module(parent), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The adapter's base model is of the class {name!r} in {parent!r}, which is not there: {error}. It may be of "
            "another version; load the base model yourself and use PeftModel.from_pretrained."
        ) from error
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"The adapter's configuration names {name!r} in {parent!r} as the class of its base model, and it is none that "
            "has from_pretrained."
        )
    return found


def _resize_embeddings(base: Any, source: str | os.PathLike, revision: str | None, kwargs: dict[str, Any]) -> None:
    """Make room for the tokens of a tokenizer that lies beside the adapter."""
    local = os.path.isdir(source)
    present = (
        os.path.isfile(os.path.join(source, kwargs.get("subfolder") or "", TOKENIZER_CONFIG_NAME))
        if local
        else check_file_exists_on_hf_hub(
            os.fspath(source),
            TOKENIZER_CONFIG_NAME,
            revision=revision,
            repo_type=kwargs.get("repo_type"),
            token=kwargs.get("token"),
            subfolder=kwargs.get("subfolder"),
        )
    )
    if not present:
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=kwargs.get("trust_remote_code", False))
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModel(_BaseAutoPeftModel):
    """For adapters without a task type, whose file names the base model's class."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """For adapters of models that continue texts."""

    _target_class = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """For adapters of models with an encoder and a decoder."""

    _target_class = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """For adapters of models that classify sequences."""

    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """For adapters of models that classify tokens."""

    _target_class = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """For adapters of models that mark answers in a text."""

    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """For adapters of models that give hidden states."""

    _target_class = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction
