"""Weights that cannot be written, and in general not even read: their layers can only be applied."""

from __future__ import annotations

import torch
from torch import nn

from ...utils.error import FixedWeightError
from . import QuantizationBackend


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """Adapters that add to a layer's output work with such layers; merging into them does not.

    A subclass that can tell the weight's values has `get_base_weight`, so that the other adapters work as well.

    Args:
        backend_name: what to call the form, for a backend without a class of its own.
    """

    supports_merge = False
    layer_type = "linear"

    def __init__(self, backend_name: str = "") -> None:
        if backend_name:
            self.backend_name = backend_name

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """Not possible.

        Raises:
            FixedWeightError: always.
        """
        raise FixedWeightError(
            f"The weight of a {type(base_layer).__name__}, kept by {self.backend_name or type(self).__name__}, cannot be "
            "read. Only adapters that add to the layer's output, such as LoRA, can be used with it."
        )
