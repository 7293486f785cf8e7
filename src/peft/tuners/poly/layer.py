"""Poly on linear layers (arXiv 2202.13914): y = W·x + (1/r)·B̂ᵀ·Âᵀ·x, with Â and B̂ mixed from skills by each row's task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.calls import RowGroups
from ...engine.layer import AdapterLayer, BaseTunerLayer
from .router import check_task_ids, get_router

if TYPE_CHECKING:
    from .config import PolyConfig


class PolyLayer(AdapterLayer):
    """Holds the skills of any number of adapters beside a base layer, and how tasks mix them.

    `poly_lora_A` is (splits, skills, in / splits, r), `poly_lora_B` (splits, skills, r, out / splits). As the weight that
    they make up is another one for each row of a batch, there is none to merge.

    Args:
        base_layer: the layer to adapt.
    """

    adapter_layer_names = ("poly_lora_A", "poly_lora_B", "poly_router")
    other_param_names = ("r", "n_tasks", "n_skills", "n_splits", "poly_type")
    config_argument = "poly_config"

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.kwargs = kwargs
        self.r: dict[str, int] = {}
        self.n_tasks: dict[str, int] = {}
        self.n_skills: dict[str, int] = {}
        self.n_splits: dict[str, int] = {}
        self.poly_type: dict[str, str] = {}
        # In this order, which is that of the parameters of an optimiser.
        self.poly_router, self.poly_lora_A, self.poly_lora_B = nn.ModuleDict(), nn.ParameterDict(), nn.ParameterDict()

    # ----------------------------------------------------------------------------------------------------- adding

    def update_layer(self, adapter_name: str, config: PolyConfig, inference_mode: bool = False, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            config: everything about it.
            inference_mode: use it, but do not train it.
            kwargs: `target_name`, to name the module in errors.

        Raises:
            ValueError: a rank that is not positive, features that cannot be split, or an unknown `poly_type`.
        """
        self._check(adapter_name, config, kwargs.get("target_name") or self._label or type(self).__name__)
        splits, skills, r = config.n_splits, config.n_skills, config.r
        self.r[adapter_name], self.n_tasks[adapter_name] = r, config.n_tasks
        self.n_skills[adapter_name], self.n_splits[adapter_name] = skills, splits
        self.poly_type[adapter_name] = config.poly_type
        A = self.empty(splits, skills, self.in_features // splits, r)
        B = self.empty(splits, skills, r, self.out_features // splits)
        self.poly_lora_A[adapter_name], self.poly_lora_B[adapter_name] = nn.Parameter(A), nn.Parameter(B)
        with A.device:
            self.poly_router[adapter_name] = get_router(config)
        self.reset_poly_parameters(adapter_name, config.init_weights)
        self._settle(adapter_name, inference_mode=inference_mode or config.inference_mode)

    def _check(self, adapter_name: str, config: PolyConfig, where: str) -> None:
        where = f"{where}, adapter {adapter_name!r}"
        if config.r <= 0:
            raise ValueError(f"{where}: the rank must be positive, got r={config.r}; the smallest is 1.")
        for name in ("n_tasks", "n_skills", "n_splits"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{where}: {name} must be positive, got {getattr(config, name)}; the smallest is 1.")
        if self.in_features % config.n_splits or self.out_features % config.n_splits:
            highest = math.gcd(self.in_features, self.out_features)
            raise ValueError(
                f"{where}: n_splits={config.n_splits} must divide the {self.in_features} input and "
                f"{self.out_features} output features, as the divisors of {highest} do."
            )

    def reset_poly_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Start A uniformly within ±1/√fan_in, B with zeros, and all skills weighted nearly the same.

        Args:
            adapter_name: the adapter.
            init_weights: False to start B as A.
        """
        A, B = self.poly_lora_A[adapter_name], self.poly_lora_B[adapter_name]
        if A.is_meta:
            return  # its values will be loaded
        draw_skills(A)
        if init_weights:
            nn.init.zeros_(B)
        else:
            draw_skills(B)
        self.poly_router[adapter_name].reset()

    # ---------------------------------------------------------------------------------------------------- forward

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter in plan:
            result = result + self.term(x, adapter, self._task_ids(adapter, len(x)))
        return result.to(dtype)

    def mixed_forward(self, x: torch.Tensor, rows: RowGroups, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for adapter, index in rows.items():
            task_ids = self._task_ids(adapter, len(x)).to(index.device)
            term = self.term(x[index], adapter, task_ids[index])
            result = result.index_add(0, index, term.to(result.dtype))
        return result

    def _task_ids(self, adapter: str, rows: int) -> torch.Tensor:
        """The task of each row that the layer sees.

        Raises:
            ValueError: none are given, or not as many as there are rows.
        """
        task_ids = self.call_input("task_ids", rows)
        where = self._label or type(self).__name__
        if task_ids is None:
            check_task_ids(None, self.n_tasks[adapter], where)
        if len(task_ids) != rows:
            raise ValueError(f"{where}: task_ids must name one task per row, got {len(task_ids)} for {rows} rows.")
        return task_ids

    def term(self, x: torch.Tensor, adapter: str, task_ids: torch.Tensor) -> torch.Tensor:
        """What one adapter adds to the output.

        Args:
            x: (batch, ..., in).
            adapter: a name this layer holds.
            task_ids: (batch,), long.

        Returns:
            (batch, ..., out).
        """
        A, B = self.poly_lora_A[adapter], self.poly_lora_B[adapter]
        weights = self.poly_router[adapter].weights(task_ids).to(A.dtype)
        A = torch.einsum("bqk,qkir->bqir", weights, A).flatten(1, 2)
        B = torch.einsum("bqk,qkro->brqo", weights, B).flatten(2)
        rows = self._cast_input_dtype(x, A.dtype)
        rows = rows.unsqueeze(1) if x.dim() == 2 else rows.flatten(1, -2)
        return (rows @ A @ B / self.r[adapter]).view(*x.shape[:-1], self.out_features)

    def __repr__(self) -> str:
        return f"poly.{super().__repr__()}"


@torch.no_grad()
def draw_skills(skills: torch.Tensor) -> None:
    """Start each skill as a linear layer does.

    Args:
        skills: (splits, skills, fan_in, fan_out).
    """
    for skill in range(skills.shape[1]):
        for split in range(skills.shape[0]):
            # Drawn in the layout of a linear layer, on the CPU: the same numbers wherever the skills are.
            drawn = torch.empty(skills.shape[3], skills.shape[2], dtype=skills.dtype)
            skills[split, skill] = nn.init.kaiming_uniform_(drawn, a=math.sqrt(5)).T


class Linear(PolyLayer, nn.Module):
    """Poly on `nn.Linear` and transformers' `Conv1D`.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the adapter.
        poly_config: its configuration.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, poly_config: PolyConfig, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        PolyLayer.__init__(self, base_layer, **kwargs)
        self.update_layer(adapter_name, poly_config, **kwargs)

    def forward(
        self, x: torch.Tensor, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output with what the skills of each row's task add.

        Args:
            x: (batch, ..., in).
            args: the base layer's further arguments.
            task_ids: (batch,), long; by default what the call of the model gives.
            kwargs: as `args`; `adapter_names` makes it a mixed batch.

        Returns:
            (batch, ..., out) in the base layer's dtype.

        Raises:
            ValueError: a task that there is not, or no tasks given.
        """
        if task_ids is None:
            return super().forward(x, *args, **kwargs)
        for adapter in self.plan:
            check_task_ids(task_ids, self.n_tasks[adapter], self._label or type(self).__name__)
        with self.roster.inputs.given({"task_ids": task_ids}):
            return super().forward(x, *args, **kwargs)


__all__ = ["BaseTunerLayer", "Linear", "PolyLayer", "get_router"]
