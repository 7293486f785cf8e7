"""What every method's configuration has in common: its fields, and the way to `adapter_config.json` and back."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from huggingface_hub import hf_hub_download
from transformers.utils.hub import PushToHubMixin, http_user_agent

from .utils.constants import CONFIG_NAME
from .utils.error import ConfigFileError, SaveLocationError
from .utils.field_types import type_problem
from .utils.files import replacing
from .utils.naming import brief, did_you_mean, near_misses
from .utils.peft_types import PeftType, TaskType
from .utils.registry import config_class
from .utils.warning import PeftWarning

MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
"""A file without these keys was hardly written by this library, whatever else it has."""

_RUNTIME_ONLY = "runtime_config"  # how to run on this machine: never stored


@dataclass
class PeftConfigMixin(PushToHubMixin):
    """Reading, writing and checking a configuration.

    Args:
        task_type: a `TaskType`, or its value as a string.
        peft_type: the method; each method's class sets its own.
        auto_mapping: class and module of a base model that no `AutoModel` class knows.
        peft_version: the version of this library that made the configuration; filled in when absent.
    """

    module_patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    """Fields, where the method has them, that map patterns of module names to values."""
    pattern_form: ClassVar[str] = r"(.*\.)?({})$"
    """The expression that such a pattern, in place of `{}`, is a part of; a name must match it from its start."""
    fractional: ClassVar[tuple[str, ...]] = ()
    """Fields annotated as whole numbers, and patterns, whose numbers may be fractions all the same."""

    task_type: TaskType | None = field(default=None, metadata={"help": "What the model is for"})
    peft_type: PeftType | None = field(default=None, metadata={"help": "The method"})
    auto_mapping: dict | None = field(default=None, metadata={"help": "Class and module of a custom base model"})
    peft_version: str | None = field(default=None, metadata={"help": "The version that made this; found by itself"})

    def __post_init__(self) -> None:
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            hint = did_you_mean(str(self.task_type), tasks)
            raise ValueError(f"There is no task_type {self.task_type!r}; there are {', '.join(tasks)}.{hint}")
        if isinstance(getattr(self, "modules_to_save", None), str):
            self.modules_to_save = [self.modules_to_save]  # one name, not one for each letter
        if self.peft_version is None:
            self.peft_version = self._get_peft_version()

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method puts virtual tokens before the input."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is the adaption prompt of LLaMA-Adapter."""
        return False

    # ------------------------------------------------------------------------------------------------- writing

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested configurations as dictionaries too."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, which is made if need be.

        Args:
            save_directory: the folder.
            auto_mapping_dict: written instead of the field `auto_mapping`.

        Raises:
            ValueError: there is a file at `save_directory`.
            TypeError: a field has a value that JSON cannot hold. In both cases nothing is written.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            ignored = ", ".join(sorted(kwargs))
            warnings.warn(f"A configuration is saved without options; ignored: {ignored}.", PeftWarning, stacklevel=2)
        if os.path.isfile(save_directory):
            raise SaveLocationError(f"A configuration is saved into a folder, and {str(save_directory)!r} is a file.")
        content = self.to_dict()
        content.pop(_RUNTIME_ONLY, None)
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        text = json.dumps(content, indent=2, sort_keys=True, default=_as_json)
        os.makedirs(save_directory, exist_ok=True)
        with replacing(os.path.join(save_directory, CONFIG_NAME)) as path, open(path, "w", encoding="utf-8") as file:
            file.write(text)

    # ------------------------------------------------------------------------------------------------- reading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfigMixin:
        """Read a configuration from a folder or from the Hub.

        The file decides the method, whichever class this is called on.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the Hub.
            subfolder: where in there the file is.
            kwargs: options of `huggingface_hub.hf_hub_download`, and values for fields that the file leaves out.

        Raises:
            ValueError: there is no such file, or it can't be used; the message names file and field.
        """
        defaults, download, _ = cls._split_kwargs(kwargs)
        path = _find_config_file(pretrained_model_name_or_path, subfolder, download)
        stored = cls.from_json_file(path)
        _check_types(cls, stored, path)
        try:
            config = cls.from_peft_type(**cls.check_kwargs(**{**defaults, **stored}))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigFileError(f"{path}: {_message(error)}") from error
        config.note_source(pretrained_model_name_or_path, subfolder, kwargs)
        return config

    def note_source(self, source: str | os.PathLike, subfolder: str | None, options: dict[str, Any]) -> None:
        """Called when the configuration was read, for methods whose files refer to others.

        Args:
            source: folder or repository.
            subfolder: where in there the file is.
            options: the keyword arguments that `from_pretrained` was given.
        """

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """Read the fields in a file, without building a configuration of them.

        Args:
            path_json_file: the file.
            kwargs: for classes that override this method; a local file needs none.

        Raises:
            ValueError: the file is no JSON, or not an object.
        """
        with open(path_json_file, "rb") as file:
            data = file.read()
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:  # no JSON, not even text, or nested without end
            raise ConfigFileError(f"{path_json_file}: this is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ConfigFileError(f"{path_json_file}: expected a JSON object, found a {type(content).__name__}.")
        if content.pop(_RUNTIME_ONLY, None) is not None:
            warnings.warn(
                f"{path_json_file}: {_RUNTIME_ONLY!r} is ignored: it says how to run, so pass it when loading.",
                PeftWarning,
                stacklevel=2,
            )
        return content

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfigMixin:
        """Build the configuration class of the method that `peft_type` names, or this class when it names none.

        Fields that the class does not have, as newer versions write, are left out with one warning.

        Args:
            kwargs: the fields.

        Raises:
            KeyError: the method is unknown.
            TypeError: there are unknown fields and no `peft_type`, so this may be anything.
        """
        target = _class_for(cls, kwargs.get("peft_type"))
        return target(**_without_unknown(target, kwargs))

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Look at the fields before a configuration is built of them; for methods to override.

        Returns:
            The fields to use.
        """
        return kwargs

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Sort keyword arguments into values for fields, options of the download, and the rest."""
        names_of_download = inspect.signature(hf_hub_download).parameters
        names_of_fields = {entry.name for entry in dataclasses.fields(cls)}
        of_class, download, rest = {}, {}, {}
        for name, value in kwargs.items():
            if name in names_of_download:
                download[name] = value
            elif name in names_of_fields:
                of_class[name] = value
            else:
                rest[name] = value
        return of_class, {"user_agent": http_user_agent(), **download}, rest

    @classmethod
    def _get_peft_type(cls, model_id: str | os.PathLike, **hf_hub_download_kwargs: Any) -> str:
        """Which method an adapter in a folder or on the Hub is of, without building its configuration."""
        subfolder = hf_hub_download_kwargs.pop("subfolder", None)
        _, download, _ = cls._split_kwargs(hf_hub_download_kwargs)
        path = _find_config_file(model_id, subfolder, download)
        content = cls.from_json_file(path)
        if "peft_type" not in content:
            near = did_you_mean("peft_type", content)
            raise ConfigFileError(f"{path}: expected the field 'peft_type', found {sorted(content)}.{near}")
        return content["peft_type"]

    @staticmethod
    def _get_peft_version() -> str:
        """The version of this library, for a development version with the commit it was installed from."""
        from . import __version__  # lazy: the package has it, and imports this module on demand

        if "dev" not in __version__:
            return __version__
        return f"{__version__}@{_installed_commit()}"


@dataclass
class PeftConfig(PeftConfigMixin):
    """The base of every method's configuration.

    Args:
        task_type: a `TaskType`, or its value as a string.
        peft_type: the method; each method's class sets its own.
        auto_mapping: class and module of a base model that no `AutoModel` class knows.
        peft_version: the version of this library that made the configuration; filled in when absent.
        base_model_name_or_path: the model that is adapted.
        revision: the version of that model on the Hub.
        inference_mode: the adapter is used and not trained.
    """

    task_type: TaskType | str | None = field(default=None, metadata={"help": "What the model is for"})
    peft_type: PeftType | str | None = field(default=None, metadata={"help": "The method"})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "The model that is adapted"})
    revision: str | None = field(default=None, metadata={"help": "The version of the base model on the Hub"})
    inference_mode: bool = field(default=False, metadata={"help": "Use the adapter without training it"})


@dataclass
class PromptLearningConfig(PeftConfig):
    """The base of the methods that learn virtual tokens. What is left None is read from the base model.

    Args:
        num_virtual_tokens: how many tokens are learned.
        token_dim: the size of the base model's embeddings.
        num_transformer_submodules: 2 for an encoder with a decoder, otherwise 1.
        num_attention_heads: the base model's heads.
        num_layers: the base model's layers.
        modules_to_save: modules trained in full and saved with the prompt, such as a classification head.
    """

    num_virtual_tokens: int = field(default=None, metadata={"help": "How many virtual tokens"})
    token_dim: int = field(default=None, metadata={"help": "Size of the base model's embeddings"})
    num_transformer_submodules: int | None = field(default=None, metadata={"help": "2 with encoder and decoder"})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of the base model"})
    num_layers: int | None = field(default=None, metadata={"help": "Layers of the base model"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save in full"})

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method puts virtual tokens before the input."""
        return True


def _find_config_file(source: str | os.PathLike, subfolder: str | None, download: dict[str, Any]) -> str:
    """The local path of an adapter's configuration, downloaded if it is not in a local folder."""
    folder = os.path.join(source, subfolder) if subfolder else os.fspath(source)
    local = os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(local):
        return local
    try:
        return hf_hub_download(os.fspath(source), CONFIG_NAME, subfolder=subfolder, **download)
    except Exception as error:  # the Hub has many ways to fail, and each means that there is no configuration
        raise ConfigFileError(_not_found(folder, local, error)) from error


def _not_found(folder: str, local: str, error: Exception) -> str:
    if not os.path.isdir(folder):
        return f"There is no folder {folder!r}, and the Hub gave no {CONFIG_NAME} for it either: {error}"
    nested = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, CONFIG_NAME)))
    hint = f" There are adapters in its subfolders: {', '.join(map(repr, nested))}." if nested else ""
    return f"Expected the file {local!r}, and the folder has none.{hint}"


def _class_for(cls: type, peft_type: str | None) -> type:
    return cls if peft_type is None else config_class(peft_type)


def _check_types(cls: type, stored: dict[str, Any], path: str) -> None:
    """Refuse a file with a value that its field cannot have, before the constructor trips over it somewhere."""
    peft_type = stored.get("peft_type")
    if not isinstance(peft_type, str | None):
        raise ConfigFileError(f"{path}: field 'peft_type': expected the name of a method, found {peft_type!r}.")
    try:
        target = _class_for(cls, peft_type)
    except KeyError as error:
        raise ConfigFileError(f"{path}: field 'peft_type': {_message(error)}") from error
    for name, value in stored.items():
        problem = type_problem(target, name, value)
        if problem:
            raise ConfigFileError(f"{path}: field {name!r}: {problem}")


def _without_unknown(target: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values that the class's constructor takes; one warning names the others."""
    known = inspect.signature(target.__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return values
    unknown = sorted(set(values) - set(known))
    if not unknown:
        return values
    hints = ", ".join(f"{brief(name)}{_closest(name, known)}" for name in unknown[:20])
    hints += f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
    if not values.keys() >= MIN_EXPECTED_CONFIG_KEYS:
        raise TypeError(f"{target.__name__} has no fields {hints}, and there is no 'peft_type' either.")
    warnings.warn(
        f"{target.__name__} has no fields {hints}: they are left out. The configuration may come from a newer version "
        "of PEFT; what they ask for does not happen here.",
        PeftWarning,
        stacklevel=4,
    )
    return {name: value for name, value in values.items() if name in known}


def _closest(name: str, known: Iterable[str]) -> str:
    close = near_misses(name, known, n=1)
    return f" (there is {close[0]!r})" if close else ""


def _message(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _as_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)  # the same file for the same configuration
    raise TypeError(f"{CONFIG_NAME} cannot hold a {type(value).__name__}: {value!r}.")


def _installed_commit() -> str:
    """The commit that pip installed this library from, `UNKNOWN` if it came another way."""
    import importlib.metadata

    try:
        record = importlib.metadata.distribution("peft").read_text("direct_url.json")
        return json.loads(record)["vcs_info"]["commit_id"] if record else "UNKNOWN"
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return "UNKNOWN"
    except (OSError, ValueError) as error:
        warnings.warn(f"The commit that PEFT was installed from can't be read: {error}.", PeftWarning, stacklevel=2)
        return "UNKNOWN"
