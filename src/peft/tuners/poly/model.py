"""The Poly tuner (arXiv 2202.13914)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...engine.tuner import BaseTuner
from ...utils.constants import TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING
from .config import PolyConfig
from .layer import Linear, PolyLayer
from .router import check_task_ids


class PolyModel(BaseTuner):
    """Adapts a model by skills that the tasks of a batch share.

    Args:
        model: the model to adapt.
        config: a `PolyConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device.
    """

    prefix: ClassVar[str] = "poly_"
    tuner_layer_cls = PolyLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = {"linear": Linear, "conv1d_transformers": Linear}
    special_forward_args: ClassVar[tuple[str, ...]] = ("task_ids",)

    def layer_options(self, config: PolyConfig, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        return {"target_name": key}

    def call_inputs(self, adapter_names: list[str] | None = None, **inputs: Any) -> AbstractContextManager[None]:
        """As `BaseTuner.call_inputs`; the tasks are checked once, for all layers.

        Raises:
            ValueError: a task that an adapter in use does not have.
        """
        if inputs.get("task_ids") is not None:
            inputs["task_ids"] = task_ids = torch.as_tensor(inputs["task_ids"])
            for name in {*(self.active_adapters if adapter_names is None else adapter_names)} & {*self.peft_config}:
                check_task_ids(task_ids, self.peft_config[name].n_tasks, f"The adapter {name!r}")
        return super().call_inputs(adapter_names, **inputs)

    def forward(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's output.

        Args:
            args: the base model's arguments.
            task_ids: (batch,), long, the task of each row.
            kwargs: as `args`.
        """
        with self._enable_peft_forward_hooks(task_ids=task_ids):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """What the base model generates.

        Args:
            args: arguments of the base model's generate.
            task_ids: (batch,), long, the task of each row.
            kwargs: as `args`.
        """
        with self._enable_peft_forward_hooks(task_ids=task_ids):
            return self.model.generate(*args, **kwargs)


__all__ = [
    "TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "Linear",
    "PolyConfig",
    "PolyLayer",
    "PolyModel",
]
