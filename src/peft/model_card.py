"""The model card that is saved beside adapters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .peft_model import PeftModel


def write_model_card(model: PeftModel, output_dir: str | os.PathLike) -> None:
    """Write it."""
    with open(os.path.join(output_dir, "README.md"), "w") as file:
        file.write("x")
