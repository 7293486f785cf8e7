"""Dense modules in the place of quantised ones: what a copy of them is, which is to be trained in full."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kinds import kind_of
from . import QuantizationBackend, resolve_quantization_backend

_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class DenseLinear(nn.Linear):
    """A linear layer that takes inputs of any dtype and answers in theirs, as quantised layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W·x + b.

        Args:
            x: (..., in).

        Returns:
            (..., out) in the dtype of `x`.
        """
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def with_dense_weights(module: nn.Module) -> nn.Module:
    """The module with the values of every quantised weight in a dense one; what is not quantised is changed in place.

    Args:
        module: one that nobody else uses.

    Raises:
        TypeError: a weight cannot be read, or its layer is of another kind than torch's.
    """
    backend = resolve_quantization_backend(module)
    if backend is not None:
        return _dense(module, backend)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = with_dense_weights(child)
    return module


def _dense(module: Any, backend: QuantizationBackend) -> nn.Module:
    weight = backend.get_base_weight(module).detach().clone()
    if type(module) in _PLAIN:
        module.weight = nn.Parameter(weight)
        module.__dict__.pop("extra_repr", None)  # which tells of the quantised weight
        return module
    kind = kind_of(module)
    name = backend.layer_type if kind is None else kind.name
    if name == "embedding":
        dense = nn.Embedding(*weight.shape, padding_idx=module.padding_idx, _weight=weight)
    elif name == "linear":
        dense = nn.utils.skip_init(DenseLinear, weight.shape[1], weight.shape[0], bias=module.bias is not None)
        dense.weight = nn.Parameter(weight)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.detach().to(weight.dtype, copy=True))
    else:
        raise TypeError(
            f"A {type(module).__name__}, whose weight is kept by {backend.backend_name}, cannot be copied to be trained in "
            "full; only linear layers and embeddings can. Leave it out of the quantisation."
        )
    return dense.train(module.training)
