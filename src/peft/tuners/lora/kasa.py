"""KaSA, knowledge-aware singular-value adaptation (arXiv 2412.06071): W' = W⁻ + s·B·diag(d)·A.

W⁻ is the base weight W without its r smallest singular components, which count as noise, and d are the update's own
singular values. With V the right singular vectors of these components as rows, W⁻ = W - (W·Vᵀ)·V.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.lifecycle import holders_of
from ...engine.offload import offload_hook
from ...engine.undo import when_done
from .base_weight import base_weight_at_hand, write_base_matrices
from .variant import LoraVariant, register_variant

if TYPE_CHECKING:
    from .config import KasaConfig, LoraConfig
    from .layer import LoraLayer

Removed = tuple[torch.Tensor, torch.Tensor]
"""What was taken out of a base weight: V (r, in) and W·Vᵀ (out, r)."""

# -------------------------------------------------------------------------------------------------------- the mathematics


def smallest_directions(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The right singular vectors of a matrix for its smallest singular values.

    Args:
        weight: W, (out, in).
        rank: how many, fewer than the smaller side of W.

    Returns:
        (rank, in), orthonormal.
    """
    return torch.linalg.svd(weight, full_matrices=False).Vh[-rank:].clone()  # not a view that keeps the others


def penalty(A: torch.Tensor, B: torch.Tensor, d: torch.Tensor, config: KasaConfig) -> torch.Tensor:
    """β·‖d‖² + γ·(‖BᵀB - I‖ + ‖AAᵀ - I‖) in float32: singular values small, singular vectors orthonormal.

    Args:
        A: (r, ...).
        B: (out, r, ...).
        d: (r,).
        config: has β and γ.
    """
    A, B, d = A.flatten(1).float(), B.flatten(1).float(), d.float()
    eye = torch.eye(len(d), device=d.device)
    apart = torch.linalg.norm(B.T @ B - eye) + torch.linalg.norm(A @ A.T - eye)
    return config.beta * d.square().sum() + config.gamma * apart


# ------------------------------------------------------------------------------------------------ the base weight's part


def removed_from(module: LoraLayer) -> list[Removed]:
    """What KaSA has taken out of a layer's base weight so far."""
    return module.__dict__.setdefault("kasa_removed", [])


def wanted_rank(module: LoraLayer) -> int:
    """How many components a layer's KaSA adapters need to be out of its base weight."""
    return max((module.r[name] for name, kind in module.lora_variant.items() if _is_kasa(kind)), default=0)


def is_truncated(module: LoraLayer, rank: int) -> bool:
    """Whether that many components are out of the base weight."""
    return rank <= max((len(V) for V, _ in removed_from(module)), default=0)


def truncate_when_done(module: LoraLayer, rank: int) -> None:
    """Take the smallest components out of the base weight once the adapter is in place, or has been loaded.

    Until then only the directions are kept, so that nothing has to be brought back if that fails. A base weight without
    values is truncated when the layer is first called or merged.

    Raises:
        ValueError: adapters are merged into the base weight.
    """
    if is_truncated(module, rank):
        return
    if _has_no_values(module):
        when_done(_truncate_when_called, module)
        return
    when_done(_take_out, module, _directions_to_take(module, rank))


def truncate(module: LoraLayer) -> None:
    """Take out of the base weight what the layer's adapters need to be out of it.

    Raises:
        RuntimeError: it has no values.
    """
    rank = wanted_rank(module)
    if is_truncated(module, rank):
        return
    if _has_no_values(module):
        raise RuntimeError(
            f"{module.called}: KaSA takes the {rank} smallest singular components out of the base weight, which is on the "
            "meta device. Load the model's weights first."
        )
    _take_out(module, _directions_to_take(module, rank))


def _directions_to_take(module: LoraLayer, rank: int) -> torch.Tensor:
    with base_weight_at_hand(module):
        return smallest_directions(_matrix(module), rank)


def _has_no_values(module: LoraLayer) -> bool:
    return module.weight.is_meta and offload_hook(module.get_base_layer()) is None


def _matrix(module: LoraLayer) -> torch.Tensor:
    """The base weight as (out, in), in float32 or wider."""
    if module.merged_adapters:
        raise ValueError(
            f"{module.called}: KaSA changes the base weight, but {module.merged_adapters} are merged into it. Call "
            "unmerge_adapter() first."
        )
    weight = module.kind.flip(module.get_base_weight()).flatten(1)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _take_out(module: LoraLayer, directions: torch.Tensor) -> None:
    # Twice is once: of a weight that layers share, the second one finds nothing left to take.
    with base_weight_at_hand(module):
        weight = _matrix(module)
        parts = weight @ directions.T
        write_base_matrices(module, weight - parts @ directions)
        removed_from(module).append((directions.cpu(), parts.cpu()))


def _truncate_when_called(module: LoraLayer) -> None:
    if "kasa_hook" not in module.__dict__:
        module.__dict__["kasa_hook"] = module.register_forward_pre_hook(_truncate_before)


def _truncate_before(module: LoraLayer, args: tuple) -> None:
    truncate(module)
    module.__dict__.pop("kasa_hook").remove()


def restore_base_weights(model: nn.Module) -> None:
    """Put back what KaSA has taken out of the base weights of a model, up to rounding.

    For a base model that is to be used without its KaSA adapters: they compute something else afterwards, so unload or
    delete them next. To get the weights back bit for bit, load the base model anew.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Raises:
        ValueError: adapters are merged into a base weight.
    """
    layers = [module for _, module in holders_of(model) if module.__dict__.get("kasa_removed")]
    for module in layers:
        with base_weight_at_hand(module):
            weight = _matrix(module)
            for directions, parts in removed_from(module):
                weight = weight + (parts @ directions).to(weight)
            write_base_matrices(module, weight)
        removed_from(module).clear()


# ------------------------------------------------------------------------------------------------------------ the variant


def _is_kasa(variant: LoraVariant) -> bool:
    return isinstance(variant, KasaLinearVariant)


def check_beside(config: Any, others: Iterable[tuple[str, Any]]) -> None:
    """Raise unless an adapter can be in one model with the others, which all use the base weights.

    Args:
        config: the new adapter's configuration.
        others: names and configurations of those that are there.

    Raises:
        ValueError: one uses KaSA, another does not.
    """
    uses = bool(getattr(config, "kasa_config", None))
    unlike = [name for name, other in others if bool(getattr(other, "kasa_config", None)) != uses]
    if unlike:
        new, there = ("uses", "do not") if uses else ("does not use", "do")
        raise ValueError(
            f"KaSA changes the base weights, so all adapters of a model use it or none does: the new one {new} KaSA, while "
            f"{unlike} {there}. Set kasa_config for all, or adapt a model of its own."
        )


def kasa_loss(layers: Iterable[LoraLayer], configs: dict[str, LoraConfig], adapter_names: list[str]) -> Any:
    """The sum of KaSA's penalties over the layers of adapters; 0.0 if none of them uses it.

    Args:
        layers: LoRA layers.
        configs: configurations by adapter name.
        adapter_names: which adapters.
    """
    total: Any = 0.0
    for layer in layers:
        for name in adapter_names:
            if _is_kasa(layer.lora_variant.get(name)):
                term = penalty(*layer.factors(name), layer.lora_diag[name], configs[name].kasa_config)
                total = total + (term.to(total.device) if torch.is_tensor(total) else term)
    return total


@register_variant("kasa_config", kinds=("linear", "conv1d_transformers", "embedding", "conv1d", "conv2d", "conv3d"))
class KasaLinearVariant(LoraVariant):
    """LoRA with singular values of its own on a base weight without its r smallest singular components.

    The truncated weight is what the adapter is trained on and what its files are computed with, so that it counts as the
    base weight: it stays when the adapter is disabled, unmerged, unloaded or deleted. `restore_base_weights` puts the
    components back, up to rounding; they are kept for that, as large as the adapter and not saved. An adapter of a
    larger rank takes more out, also for those that are there already.
    """

    containers = {"lora_diag": nn.ParameterDict}
    can_be_padded = False

    @staticmethod
    def check(module: LoraLayer, adapter_name: str, r: int, config: LoraConfig, **kwargs: Any) -> None:
        out, *inner = module.kind.shape(module.get_base_layer())
        rank = min(out, torch.Size(inner).numel())
        if r >= rank:
            raise ValueError(
                f"{module.called}: KaSA takes as many singular components out of the base weight as the adapter "
                f"{adapter_name!r} has ranks, r={r}, but it has {rank}. The largest rank here is {rank - 1}."
            )

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        A, _ = module.factors(adapter_name)
        rank = module.r[adapter_name]
        module.lora_diag[adapter_name] = nn.Parameter(torch.randn(rank, dtype=A.dtype, device=A.device))
        truncate_when_done(module, rank)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return result + module.term(x, active_adapter, gains=module.lora_diag[active_adapter])

    @staticmethod
    def delta_weight(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        return module.plain_delta(active_adapter, gains=module.lora_diag[active_adapter])

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if not is_truncated(module, wanted_rank(module)):
            truncate(module)
            orig_weight = module.get_base_weight()
        return LoraVariant.merge_safe(module, active_adapter, orig_weight)

    def supports_lora_conversion(self) -> bool:
        """No: a plain adapter would need the truncated base weight."""
        return False
