"""AdaLoRA on linear layers of GPTQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...engine.kinds import LINEAR
from .layer import SVDLayer


class SVDQuantLinear(SVDLayer):
    """AdaLoRA on a linear layer whose weight is quantised by GPTQ; the base layer's own forward does the rest.

    Args:
        base_layer: a layer with `in_features` and `out_features`.
        adapter_name: the adapter.
        config: its configuration.
        r: rank to start with.
        lora_alpha: the scaling.
    """

    def _wrap(self, base_layer: nn.Module, **options: Any) -> None:
        super()._wrap(base_layer, **options)
        self.__dict__["kind"] = LINEAR

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        """Not possible: a weight quantised by GPTQ cannot be written.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self._label or type(self).__name__} keeps its weight quantised by GPTQ, into which the adapter {adapter!r} "
            "cannot be merged. Merge it into the model before that is quantised."
        )
