"""LoRA on models that transformers has spread by tensor parallelism: each rank holds a part of most weights, as a `DTensor`.

Of an adapter, the factor on the split side is split like the base weight, and the other one is the same on every rank:

    colwise              W by rows          B by rows
    rowwise              W by columns       A by columns
    embedding_rowwise    W by entries       A by entries

so that the adapter's term comes out as the base layer's output does. Files always hold whole factors. Where activations
that all ranks share are dropped out, all ranks must drop the same: give them one seed.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.kinds import embed_scale
from ...utils.tensors import is_spread, spread_like
from .config import MUTATES_BASE, LoraConfig
from .variant import requested_variants

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .layer import LoraLayer

OLDEST_TRANSFORMERS = (5, 17)
"""The first release whose tensor-parallel weights are `DTensor`s."""
REPLICATED = "local_params"
"""The style of a module whose parameters are whole on every rank."""


def split_factor(tp_plan_name: str) -> str | None:
    """The factor that is split where the base layer has this style: "lora_A", "lora_B", or None if that is not known."""
    for style, factor in (("colwise", "lora_B"), ("rowwise", "lora_A")):
        if tp_plan_name == style or tp_plan_name.startswith(f"{style}_"):
            return factor
    return None


def get_tp_plan_and_mesh(model: nn.Module, current_key: str) -> tuple[str | None, DeviceMesh | None]:
    """How a module of a tensor-parallel model is spread.

    Args:
        model: the base model.
        current_key: the module's dotted name in it.

    Returns:
        The name of its style and the mesh of devices; None for both if it is not spread.

    Raises:
        RuntimeError: a release of transformers that spreads models in another way.
    """
    mesh = getattr(model, "_device_mesh", None)
    plan = getattr(model, "_tp_plan", None) or {}
    if mesh is None or not plan:
        return None, None
    name = ".".join("*" if part.isdecimal() else part for part in current_key.split("."))
    style = plan.get(current_key, plan.get(name))
    if style is None:
        return None, None
    _check_transformers()
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and "tp" not in names:
        return None, None
    return style, mesh["tp"] if mesh.ndim > 1 else mesh


def _check_transformers() -> None:
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise RuntimeError(
            f"Adapters of tensor-parallel models need transformers {oldest} or newer, this is {transformers.__version__}."
        )


def placement_for(model: nn.Module, key: str, base: nn.Module, config: LoraConfig) -> tuple[str, DeviceMesh] | None:
    """Style and mesh by which the adapter of a module is spread; None if its weight is whole.

    Args:
        model: the base model.
        key: the module's dotted name in it.
        base: the module.
        config: the adapter's configuration.

    Raises:
        ValueError: a variant, or a start that reads the base weight, which is not whole on any rank.
    """
    if not is_spread(getattr(base, "weight", None)):
        return None
    style, mesh = get_tp_plan_and_mesh(model, key)
    if style is None:
        return None
    start = config.init_lora_weights
    refused = [*requested_variants(config)]
    if isinstance(start, str) and start.startswith(MUTATES_BASE):
        refused.append(f"init_lora_weights={start!r}")
    if refused:
        raise ValueError(
            f"{key!r} is spread over {mesh.size()} devices ({style}), where {', '.join(refused)} cannot be used: it reads the "
            "whole base weight."
        )
    return style, mesh


def spread(layer: LoraLayer, adapter_name: str, style: str, mesh: DeviceMesh) -> None:
    """Spread one adapter of a layer like the layer's base weight.

    Args:
        layer: the layer; the adapter's factors are whole.
        adapter_name: the adapter.
        style: of the base layer.
        mesh: the mesh of devices.
    """
    base = layer.get_base_layer()
    if adapter_name in layer.lora_embedding_A:
        _spread_embedding(layer, adapter_name, style, mesh)
        return
    for name in ("lora_A", "lora_B"):
        add_lora_tp_hooks_dtensor(getattr(layer, name)[adapter_name], style, mesh, base_layer=base, module_name=name)


def add_lora_tp_hooks_dtensor(
    tp_module: nn.Module, tp_plan_name: str, device_mesh: DeviceMesh, *, base_layer: nn.Module, module_name: str
) -> None:
    """Spread one factor of an adapter and let its module's forward run on the parts.

    Args:
        tp_module: the factor, an `nn.Linear` that is whole on every rank; its values become those of the first rank.
        tp_plan_name: the style of the base layer.
        device_mesh: the mesh of devices.
        base_layer: the base layer, for messages.
        module_name: which factor it is: "lora_A" or "lora_B".
    """
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    split = split_factor(tp_plan_name)
    if split is None:
        _warn_about_style(tp_plan_name, base_layer, module_name)
        return
    _make_equal(tp_module, device_mesh)
    if module_name == split:
        style = ALL_PARALLEL_STYLES[tp_plan_name]
        for parameter in list(tp_module._parameters):
            style.shard_param(tp_module, parameter, device_mesh)
    else:
        style = ALL_PARALLEL_STYLES[REPLICATED]
        _replicate(tp_module, device_mesh)
    style.install_forward(tp_module, device_mesh)


def _warn_about_style(style: str, base_layer: nn.Module, module_name: str) -> None:
    warnings.warn(
        f"{module_name} of the adapter of a {type(base_layer).__name__} is left whole: the base layer is spread by the style "
        f"{style!r}, and only colwise, rowwise and embedding_rowwise styles are known. The output may be wrong."
    )


@torch.no_grad()
def _make_equal(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give all ranks the values of the first."""
    group = mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    for parameter in module.parameters():
        if not parameter.is_meta:
            torch.distributed.broadcast(parameter.data, src=first, group=group)


def _replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate

    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = _placed(parameter, mesh, Replicate())


def _placed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Any) -> nn.Parameter:
    from torch.distributed.tensor import distribute_tensor

    tensor = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _spread_embedding(layer: LoraLayer, adapter_name: str, style: str, mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate, Shard

    if style != "embedding_rowwise":
        _warn_about_style(style, layer.get_base_layer(), "lora_embedding_A")
        return
    for container, placement in ((layer.lora_embedding_A, Shard(1)), (layer.lora_embedding_B, Replicate())):
        _make_equal(nn.ParameterList([container[adapter_name]]), mesh)
        container._parameters[adapter_name] = _placed(container[adapter_name], mesh, placement)


def look_up(layer: nn.Embedding, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of a table that is spread by entries, whole on every rank, scaled as the layer does it.

    Args:
        layer: the embedding.
        ids: the same on every rank.
        table: (entries, r).
    """
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()]
    ids = DTensor.from_local(ids, table.device_mesh, everywhere, run_check=False)
    rows = nn.functional.embedding(ids, table, padding_idx=layer.padding_idx)
    rows = rows.redistribute(placements=everywhere).to_local()
    scale = embed_scale(layer)
    return rows if scale is None else rows * scale


__all__ = ["add_lora_tp_hooks_dtensor", "get_tp_plan_and_mesh", "look_up", "placement_for", "spread", "spread_like"]
