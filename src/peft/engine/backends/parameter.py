"""What backends have in common whose layers are torch's own kinds with a parameter `weight` of another class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kinds import kind_of
from . import QuantizationBackend


class ParameterBackend(QuantizationBackend):
    """Gives a layer a new parameter for each weight that is written, so that the old one can come back as it was."""

    supports_merge = True

    @classmethod
    def holds(cls, weight: torch.Tensor) -> bool:
        """Whether a weight is of this backend's sort."""
        raise NotImplementedError

    @classmethod
    def told(cls, options: dict[str, Any]) -> ParameterBackend:
        """A backend that knows what the tuner knows, see `claims`."""
        return cls()

    @classmethod
    def claims(cls, base_layer: nn.Module, options: dict[str, Any]) -> ParameterBackend | None:
        weight = base_layer._parameters.get("weight")
        if weight is None or not cls.holds(weight):
            return None
        backend = cls.told(options)
        kind = kind_of(base_layer)
        if kind is not None:
            backend.layer_type = kind.name
        return backend

    def quantised(self, base_layer: nn.Module, weight: torch.Tensor, label: str) -> nn.Parameter:
        """A parameter that keeps a dense weight in the form of the one that a layer has.

        Args:
            base_layer: the layer, which stays as it is.
            weight: in the layer's own layout, on its device.
            label: what messages call the layer.
        """
        raise NotImplementedError

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        layer = peft_layer.get_base_layer()
        self.write(layer, weight_data, peft_layer._label or type(layer).__name__)

    @torch.no_grad()
    def write(self, base_layer: nn.Module, weight: torch.Tensor, label: str) -> None:
        """Store a dense weight in a layer; arguments as those of `quantised`."""
        weight = weight.detach().to(base_layer.weight.device).contiguous()
        self._put(base_layer, self.quantised(base_layer, weight, label))

    def _put(self, base_layer: nn.Module, weight: nn.Parameter) -> None:
        """Let a layer have this parameter."""
        base_layer.weight = weight

    def snapshot(self, base_layer: nn.Module) -> dict[str, torch.Tensor]:
        """The weight itself, whose place another one takes, and the values of the other parameters."""
        return {
            name: parameter if name == "weight" else parameter.data
            for name, parameter in base_layer._parameters.items()
            if parameter is not None
        }

    def restore(self, peft_layer: nn.Module, snapshot: dict[str, torch.Tensor]) -> None:
        self.put_back(peft_layer.get_base_layer(), snapshot)

    def put_back(self, base_layer: nn.Module, snapshot: dict[str, torch.Tensor]) -> None:
        """Bring the parameters of a layer back as they were."""
        device = base_layer.weight.device  # the model may have been moved in the meantime
        for name, tensor in snapshot.items():
            tensor = tensor if tensor.device == device else tensor.to(device)
            if name == "weight":
                self._put(base_layer, tensor)
            else:
                base_layer._parameters[name].data = tensor
