"""The LoRA experts of an X-LoRA model: where their files are, and what is in them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...config import PeftConfig
from ...engine.checkpoint import load_adapter_state, load_peft_weights
from ...engine.loading import finish_loading
from ...engine.state import BASE_PREFIX, AdapterState
from ...utils.constants import CONFIG_NAME
from ...utils.naming import near_misses
from ...utils.peft_types import PeftType
from ..lora.config import LoraConfig
from ..lora.model import LoraModel
from ..lora.variant import requested_variants
from .config import XLoraConfig

PREFIX_INSIDE = "base_model.lora_model.model."
"""What the names in an expert's file start with if another release saved it as part of an X-LoRA model."""
WEIGHTED_VARIANTS = {"mica", "monteclora_config", "use_bdlora", "velora_config"}
"""Variants of LoRA whose terms can be weighted token by token."""


@dataclass(frozen=True)
class Place:
    """Where the files of an expert may be.

    Args:
        source: folder or repository.
        subfolder: where in there.
        options: of the hub client.
    """

    source: str
    subfolder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return os.path.join(self.source, self.subfolder or "")

    @property
    def is_local(self) -> bool:
        return os.path.isfile(os.path.join(str(self), CONFIG_NAME))

    def config(self) -> PeftConfig:
        return PeftConfig.from_pretrained(self.source, subfolder=self.subfolder, **self.options)

    def weights(self, device: str | None) -> dict[str, Tensor]:
        options = {**self.options, "subfolder": self.subfolder} if self.subfolder else self.options
        return load_peft_weights(self.source, device=device, **options)


@dataclass
class Expert:
    """One expert as its files have it.

    Args:
        name: its name in the configuration.
        number: its number, which is its name in the model.
        place: where the files are.
        config: its configuration.
        state: its weights by their names on disk.
        may_lack: whether the file may lack weights, so that what is missing is an error.
    """

    name: str
    number: int
    place: Place
    config: LoraConfig
    state: dict[str, Tensor]
    may_lack: bool = False

    def fill(self, tuner: LoraModel, autocast_adapter_dtype: bool) -> None:
        """Load the weights into a model that the expert's configuration has been injected into.

        Raises:
            ValueError: the file has names that the model has no place for, or is a copy that lacks some.
        """
        model, adapter = tuner.model, str(self.number)
        result = load_adapter_state(model, self.state, adapter)
        if result.unexpected:
            near = near_misses(result.unexpected[0], AdapterState(model, adapter).slots, 1)
            raise ValueError(
                f"The weights of the expert {self.name!r} at '{self.place}' do not fit the model, which has no place for "
                f"{result.unexpected[:5]}." + (f" Nearest: {near[0]!r}." if near else "")
            )
        if result.missing:
            self._report_missing(result.missing)
        finish_loading(tuner, model, adapter)
        tuner._cast_adapter_dtype(adapter, autocast_adapter_dtype)

    def _report_missing(self, names: list[str]) -> None:
        lacking = (
            f"The weights of the expert {self.name!r} at '{self.place}' lack {len(names)} tensors, such as {names[:5]}"
        )
        if self.may_lack:
            raise ValueError(
                f"{lacking}. They were saved as part of an X-LoRA model by a release that left these out; pass the original "
                f"expert: adapters={{{self.name!r}: 'path', ...}}."
            )
        warnings.warn(f"{lacking}, which keep their initial values.")


def read_experts(config: XLoraConfig, device: str | None, ephemeral_gpu_offload: bool) -> list[Expert]:
    """The experts that a configuration names; nothing is changed.

    Args:
        config: the configuration.
        device: where the weights go.
        ephemeral_gpu_offload: of the experts' runtime configuration.

    Raises:
        ValueError: none is named; files that are missing or no LoRA adapter's; a variant whose terms cannot be weighted.
    """
    if not config.adapters:
        raise ValueError(
            "X-LoRA needs at least one LoRA expert; name them in XLoraConfig.adapters as {'name': 'path'}."
        )
    experts = [_read(config, name, number, device) for number, name in enumerate(config.adapters)]
    for expert in experts:
        expert.config.inference_mode = False
        expert.config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
    return experts


def _read(config: XLoraConfig, name: str, number: int, device: str | None) -> Expert:
    errors = []
    for place in _places(config, name, number):
        try:
            found = place.config()
        except (OSError, ValueError) as error:
            errors.append(error)
            continue
        _check_config(found, name, place)
        state = place.weights(device)
        return Expert(name, number, place, found, _plain_names(state), may_lack=_was_saved_inside(state))
    raise ValueError(
        f"The files of the expert {name!r} are neither at {config.adapters[name]!r} nor beside the X-LoRA model: "
        f"{errors[0]} Pass adapters={{{name!r}: 'path', ...}}."
    ) from errors[0]


def _check_config(config: PeftConfig, name: str, place: Place) -> None:
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"The expert {name!r} at '{place}' is a {kind} adapter; X-LoRA takes LoRA adapters.")
    refused = sorted({*requested_variants(config)} - WEIGHTED_VARIANTS)
    if refused:
        raise ValueError(
            f"The expert {name!r} at '{place}' uses {', '.join(refused)}, whose terms cannot be weighted token by token."
        )


def _places(config: XLoraConfig, name: str, number: int) -> list[Place]:
    """Where to look for an expert, best first.

    That is the place that the configuration names. If it is gone, or the experts were trained along, it is the copy that
    was saved with the X-LoRA model.
    """
    source, subfolder, hub = config.source or ("", "", {})
    named = Place(config.adapters[name], None, {key: value for key, value in hub.items() if key != "revision"})
    copies = []
    if source:
        own, beside = os.path.join(subfolder, str(number)), os.path.join(os.path.dirname(subfolder), str(number))
        copies = [Place(source, folder, hub) for folder in dict.fromkeys([own, beside])]
        if os.path.isdir(source):
            # An X-LoRA adapter that is not called "default" is in a folder beside those of its experts.
            copies.append(Place(os.path.dirname(os.path.abspath(source)), str(number)))
            copies = [place for place in copies if place.is_local]
    if named.is_local and not config.use_trainable_adapters:
        return [named, *copies]
    whole = [place for place in copies if place.is_local and not _was_saved_inside(place.weights("cpu"))]
    return [*whole, named, *(place for place in copies if place not in whole)]


def _was_saved_inside(state: dict[str, Tensor]) -> bool:
    """Whether another release saved this file as part of an X-LoRA model, with the base weights and without some of its own."""
    return any(key.startswith(PREFIX_INSIDE) for key in state)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The expert's tensors under the names that they have in a file of their own."""
    if not _was_saved_inside(state):
        return state
    inside = {key.removeprefix(PREFIX_INSIDE): state[key] for key in state if key.startswith(PREFIX_INSIDE)}
    return {BASE_PREFIX + key: value for key, value in inside.items() if ".lora_" in key}
