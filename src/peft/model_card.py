"""The model card that is saved beside adapters: what says on the hub which model they are for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from . import __version__
from .utils.files import replacing
from .utils.peft_types import PeftType, TaskType

if TYPE_CHECKING:
    from .peft_model import PeftModel

VERSIONS_HEADING = "### Framework versions"
_BASE_TAG = "base_model:adapter:"


def write_model_card(model: PeftModel, output_dir: str | os.PathLike) -> None:
    """Write the model card of a model's adapters, or bring the one that is there up to date.

    What the card says already, its tags included, stays.

    Args:
        model: the model.
        output_dir: an existing folder.
    """
    path = Path(output_dir, "README.md")
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    base = model.get_base_model()
    name = _base_name(base)
    card.data["library_name"] = "peft"
    if name:
        card.data["base_model"] = name
    tags = _tags(model, base, name, card.data.get("tags") or [])
    if tags:
        card.data["tags"] = tags
    if card.data.get("pipeline_tag") is None and _generates_text(model):
        card.data["pipeline_tag"] = "text-generation"
    card.text = _with_version(card.text)
    with replacing(path) as temporary:
        Path(temporary).write_text(str(card), encoding="utf-8")


def _base_name(base: Any) -> str | None:
    config = getattr(base, "config", None)
    if isinstance(config, dict):
        return config.get("_name_or_path")
    return getattr(config, "_name_or_path", None)


def _tags(model: PeftModel, base: Any, name: str | None, present: list[str]) -> list[str]:
    kinds = {config.peft_type for config in model.peft_config.values()}
    tags = {tag for tag in present if not tag.startswith(_BASE_TAG)} | set(getattr(base, "model_tags", None) or ())
    if any(cls.__name__ == "PreTrainedModel" for cls in type(base).__mro__):
        tags.add("transformers")
    if PeftType.LORA in kinds:
        tags.add("lora")
    if name:
        tags.add(f"{_BASE_TAG}{name}")
    return sorted(tags)


def _generates_text(model: PeftModel) -> bool:
    return any(config.task_type == TaskType.CAUSAL_LM for config in model.peft_config.values())


def _with_version(text: str) -> str:
    """The text with the version of this library under its heading, which is made if there is none."""
    lines = text.splitlines()
    if any(line.startswith("- PEFT ") for line in lines):
        return text
    at = lines.index(VERSIONS_HEADING) if VERSIONS_HEADING in lines else len(lines)
    others = lines[at + 1 :]
    while others and not others[0].strip():
        del others[0]
    return "\n".join([*lines[:at], VERSIONS_HEADING, "", f"- PEFT {__version__}", *others]) + "\n"
