"""Mitigating intruder dimensions of a LoRA adapter (arXiv 2410.21228).

Fine-tuning by LoRA gives the weight M = W + ΔW singular vectors that W has nothing like. They hold much of what is
forgotten, and scaling them down costs little of what was learnt:

    c_i = max_j |⟨u_i(M), u_j(W)⟩|        I = {i < top_k: c_i < ε}        M' = M + (λ - 1) · Σ_{i in I} σ_i·u_i·v_iᵀ

The adapter is refitted to M' - W, which has no higher rank than r + |I|.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ...engine.checkpoint import load_adapter_state
from ...engine.lifecycle import holders_of
from ...engine.operations import LOW_PRECISION
from ...engine.state import AdapterState
from ...engine.undo import Undo
from ...utils.naming import check_adapter_name, did_you_mean
from ...utils.peft_types import PeftType
from .base_weight import base_weight_at_hand
from .initialisers import changes_base
from .layer import LoraLayer, ParamWrapper
from .rank import factor_of, groups_of
from .variant import is_plain

if TYPE_CHECKING:
    from ...peft_model import PeftModel


def reduce_intruder_dimension(
    peft_model: PeftModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> None:
    """Add a copy of a LoRA adapter with its intruder dimensions scaled down, and make it the active one.

    Args:
        peft_model: a model with the adapter.
        old_adapter_name: the adapter; it stays as it is.
        new_adapter_name: the name of the copy.
        top_k: how many of the largest singular values' vectors to look at.
        threshold_epsilon: ε; a singular vector is an intruder if its cosine similarity with each of the base weight's is
            below.
        mitigation_lambda: λ, what is left of an intruder: 1 for all of it, 0 for nothing.
        logging_sink: takes a line per layer; None for neither these nor a progress bar.

    Raises:
        ValueError: no LoRA adapter of that name, a new name that is taken or not usable, a negative `top_k`, adapters
            that are merged, or an adapter whose change of the weight is not s·B·A. Whatever is raised, the model is as
            it was.
    """
    _check(peft_model, old_adapter_name, new_adapter_name, top_k)
    layers = {
        name: layer
        for name, layer in holders_of(peft_model)
        if isinstance(layer, LoraLayer) and old_adapter_name in layer._get_available_adapters()
    }
    for name, layer in layers.items():
        _check_layer(layer, name, old_adapter_name)
    refitted: dict[str, Refitted] = {}
    for name, layer in tqdm(layers.items(), desc="Intruder dimensions", disable=logging_sink is None):
        refitted[name] = _refit(layer, old_adapter_name, top_k, threshold_epsilon, mitigation_lambda)
    _add(peft_model, old_adapter_name, new_adapter_name, {id(layers[name]): refitted[name] for name in layers})
    if logging_sink is not None:
        for name, result in refitted.items():
            logging_sink(f"{name}: {result.intruders or 'no'} intruder dimensions")
        logging_sink(f"The adapter {new_adapter_name!r} is active now.")


# --------------------------------------------------------------------------------------------------------- the mathematics


def mitigated(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, rank: int, top_k: int, threshold: float, remainder: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Factors of ΔW with the intruder dimensions of W + ΔW scaled down; ΔW is B·A.

    Args:
        weight: W, (..., out, in).
        A: (..., r, in).
        B: (..., out, r), with the scaling in it.
        rank: what A and B are to have afterwards.
        top_k: how many singular vectors to look at.
        threshold: ε.
        remainder: λ.

    Returns:
        A and B of that rank, the singular values divided between them, and the number of intruders; what was passed if
        there are none.
    """
    known = torch.linalg.svd(weight, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(weight + B @ A, full_matrices=False)
    U, S, Vh = U[..., :top_k], S[..., :top_k], Vh[..., :top_k, :]
    similarity = (U.mT @ known).abs().amax(-1)
    is_intruder = similarity < threshold
    if not is_intruder.any():
        return A, B, 0
    shift = U * (is_intruder * (remainder - 1) * S).unsqueeze(-2)
    A, B = balanced(torch.cat([A, Vh], dim=-2), torch.cat([B, shift], dim=-1), rank)
    return A, B, int(is_intruder.sum())


def balanced(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of B·A of a rank, with the roots of its singular values in both; B·A is not formed.

    Args:
        A: (..., n, in).
        B: (..., out, n).
        rank: the factors are padded by zeros if that is more than `out`, `in` or n.

    Returns:
        (..., rank, in) and (..., out, rank).
    """
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.mT, full_matrices=False)
    root = S[..., :rank].sqrt()
    missing = rank - root.shape[-1]
    A = root.unsqueeze(-1) * (Vh[..., :rank, :] @ Q_in.mT)
    B = (Q_out @ U[..., :rank]) * root.unsqueeze(-2)
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))


# ---------------------------------------------------------------------------------------------------------- layer by layer


@dataclass
class Refitted:
    """The factors of a layer's new adapter; None for the old one's, where there are no intruders."""

    intruders: int
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None


@torch.no_grad()
def _refit(layer: LoraLayer, adapter: str, top_k: int, threshold: float, remainder: float) -> Refitted:
    # By the scaling that the configuration gives, since it is what the new adapter starts with.
    scaling = layer.initial_scaling(adapter)
    with base_weight_at_hand(layer):
        weight, A, B = (_wide(tensor) for tensor in _matrices(layer, adapter))
        A, B, intruders = mitigated(weight, A, scaling * B, layer.r[adapter], top_k, threshold, remainder)
    if not intruders:
        return Refitted(0)
    root = scaling**0.5
    A, B = A / root, B / root
    if A.dim() == 3:  # stacked experts: packed expert by expert in A, rank by rank in B
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return Refitted(intruders, A, B)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _matrices(layer: LoraLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (out, in), A (r, in) and B (out, r), windows of convolutions flattened; with a first dimension for experts."""
    weight = layer.get_base_weight()
    if isinstance(layer, ParamWrapper):
        left, right = layer.get_delta_factors(adapter)
        return (weight.mT, left.mT, right.mT) if layer.is_transposed else (weight, right, left)
    A, B = layer.factors(adapter)
    return layer.kind.flip(weight).flatten(1), A.flatten(1), B.flatten(1)


def _check(model: PeftModel, old: str, new: str, top_k: int) -> None:
    check_adapter_name(new)
    configs = model.peft_config
    if old not in configs:
        raise ValueError(f"There is no adapter {old!r}; known are {sorted(configs)}.{did_you_mean(old, configs)}")
    config = configs[old]
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"Intruder dimensions are those of LoRA adapters, but {old!r} is of the method {config.peft_type.value}."
        )
    if new in configs:
        raise ValueError(f"There is an adapter {new!r} already; delete it first or choose another name.")
    if top_k < 0:
        raise ValueError(f"top_k is a number of singular vectors, got {top_k}.")
    if changes_base(config.init_lora_weights):
        raise ValueError(
            f"The adapter {old!r} started by taking a part of the base weight (init_lora_weights="
            f"{config.init_lora_weights!r}), which would count as an intruder. Save it with "
            "path_initial_model_for_weight_conversion, and load that on the original model."
        )


def _check_layer(layer: LoraLayer, name: str, adapter: str) -> None:
    variant = layer.lora_variant.get(adapter)
    if not is_plain(variant):
        raise ValueError(
            f"{name}: the adapter {adapter!r} is no plain LoRA adapter (it has a {type(variant).__name__}), so refitting "
            "B·A would not change the weight as intended."
        )
    if groups_of(layer) > 1:
        raise ValueError(
            f"{name}: a convolution with {groups_of(layer)} groups has a weight of another shape than B·A, so it has no "
            "intruder dimensions to look for."
        )
    if layer.merged_adapters:
        raise ValueError(
            f"{name}: the adapters {layer.merged_adapters} are merged into the base weight. Call unmerge_adapter() first."
        )


def _add(model: PeftModel, old: str, new: str, refitted: dict[int, Refitted]) -> None:
    """Add the new adapter: what the old one has, but for the factors that were refitted."""
    before = AdapterState(model, old)
    state = before.read()
    for name, slot in before.slots.items():
        result, factor = refitted.get(id(slot.holder)), factor_of(slot.entry.live)
        if result is not None and result.intruders and factor is not None:
            window = slot.entry.tensor.shape[2:]
            value = result.A if factor == "A" else result.B
            state[name] = value.unflatten(1, (-1, *window)) if window else value
    config = copy.deepcopy(model.peft_config[old])
    config.inference_mode = False
    half = any(slot.entry.tensor.dtype in LOW_PRECISION for slot in before.slots.values())
    active = model.active_adapter
    with Undo() as undo:
        model.add_adapter(new, config, low_cpu_mem_usage=True, autocast_adapter_dtype=not half)
        undo.push(model.delete_adapter, new)
        load_adapter_state(model, state, new)
        undo.push(model.set_adapter, active)
        model.set_adapter(new)
