"""MiCA, minor component adaptation (arXiv 2604.01694): only A trains; B spans what the base weight uses least.

B's columns are the left singular vectors of the base weight for its r smallest singular values, and stay so; A starts
as zero. Beyond that an adapter is a plain one.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from .base_weight import DECOMPOSABLE, base_weight_at_hand
from .initialisers import initialiser
from .variant import LoraVariant, register_variant

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer


def minor_directions(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The left singular vectors of a matrix for its smallest singular values, the smallest last.

    Args:
        weight: W, (out, in), in float32.
        rank: how many, at most the smaller side of W.

    Returns:
        (out, rank), orthonormal.
    """
    U = torch.linalg.svd(weight, full_matrices=False).U
    return U[:, U.shape[1] - rank :]


def _check(module: LoraLayer, adapter: str, r: int) -> None:
    out, *inner = module.kind.shape(module.get_base_layer())
    rank = min(out, torch.Size(inner).numel())
    if r > rank:
        raise ValueError(
            f"{module.called}: MiCA's B has singular vectors of the base weight as columns, r={r} for the adapter "
            f"{adapter!r}, but there are {rank}. That is the largest rank here."
        )
    dtype = module.weight.dtype
    if dtype not in DECOMPOSABLE and module.quantization_backend is None:
        raise TypeError(
            f"{module.called}: MiCA decomposes the base weight for the adapter {adapter!r}, which must be in float32, "
            f"float16 or bfloat16, got {str(dtype).removeprefix('torch.')}."
        )


@initialiser("mica", embeddings=True)
def mica(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """Start B as the base weight's minor left singular vectors, and A as zero.

    Args:
        layer: a LoRA layer that holds the adapter.
        adapter: the adapter.
        value: of no effect.
        config: of no effect.

    Raises:
        TypeError: the base weight has a dtype that cannot be decomposed.
        ValueError: the adapter's rank is larger than the base weight's.
    """
    A, B = layer.factors(adapter)
    if A.is_meta:
        return  # its values will be loaded
    _check(layer, adapter, layer.r[adapter])
    with base_weight_at_hand(layer):
        A.zero_()
        if layer.weight.is_meta:
            warnings.warn(
                f"{layer.called}: MiCA decomposes the base weight for the adapter {adapter!r}, but it is on the meta device, "
                "so B is random. Load the model's weights first, or load the adapter's."
            )
            return
        weight = layer.kind.flip(layer.unmerged_weight()).flatten(1).float()
        B.copy_(minor_directions(weight, layer.r[adapter]).view_as(B))


class _MiCAVariant(LoraVariant):
    computes_plainly = True

    @staticmethod
    def check(module: LoraLayer, adapter_name: str, r: int, config: LoraConfig, **kwargs: Any) -> None:
        _check(module, adapter_name, r)
        if kwargs.get("tied_adapter") is not None:
            raise ValueError(
                f"{module.called} is to share the factors of the embedding that it is tied to, of which MiCA trains only "
                f"one, for the adapter {adapter_name!r}. Use MiCA without ensure_weight_tying."
            )

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing beyond how A and B start."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return result + module.term(x, active_adapter)


@register_variant("mica", kinds=("linear", "conv1d_transformers", "conv1d", "conv2d", "conv3d"))
class MiCALinearVariant(_MiCAVariant):
    """A plain adapter of which only A trains, on linear layers and convolutions."""

    frozen_containers = ("lora_B",)


@register_variant("mica", kinds=("embedding",))
class MiCAEmbeddingVariant(_MiCAVariant):
    """A plain adapter of an embedding, of which only A trains; B comes from the transposed table."""

    frozen_containers = ("lora_embedding_B",)
