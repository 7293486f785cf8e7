"""LoRA on linear layers of GPTQModel; see `peft.engine.backends.gptq` for how these keep their weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...import_utils import is_gptqmodel_available
from .config import LoraConfig
from .layer import Linear, LoraLayer
from .qalora import QALoraLinearVariant
from .quantized import dispatch_to
from .variant import LoraVariant, requested_variants


class GPTQLoraLinear(Linear):
    """LoRA on a linear layer quantised by GPTQ. With `use_qalora`, A sees groups of inputs (see `qalora`)."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """As `LoraLayer`'s, and QA-LoRA where it is asked for.

        Raises:
            ValueError: it is asked for together with another variant.
        """
        if not config.use_qalora:
            return super().resolve_lora_variant(config=config, **kwargs)
        others = requested_variants(config)
        if others:
            raise ValueError(
                f"{self.called} does not support use_qalora with {' and '.join(others)}. Ask for one of them."
            )
        return QALoraLinearVariant()


LAYER_CLASSES: dict[tuple[str, str], type[AdapterLayer]] = {("gptq", "linear"): GPTQLoraLinear}


def dispatch_gptq(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for a linear layer of GPTQModel, None for another target; arguments as `dispatch_to`."""
    return dispatch_to(GPTQLoraLinear, "gptq", target, adapter_name, config, **kwargs)


__all__ = [
    "BaseTunerLayer",
    "GPTQLoraLinear",
    "LoraConfig",
    "LoraLayer",
    "LoraVariant",
    "dispatch_gptq",
    "is_gptqmodel_available",
]
