"""LoRA on a bare parameter of a module, such as the stacked weights of fused experts (`target_parameters`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.lifecycle import AdapterHolder
from ...engine.offload import call_with, fetched
from ...utils.tensors import bare_linear
from .layer import LoraLayer
from .variant import VariantTable

if TYPE_CHECKING:
    from .config import LoraConfig


class _LoraParameterProxy(nn.Module):
    """A parametrisation that adds a fixed ΔW to a parameter.

    Args:
        delta_weight: ΔW, of the parameter's shape.
    """

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.delta_weight.to(W.dtype)


class ParamWrapper(LoraLayer, nn.Module):
    """Adapts one parameter of the wrapped module; several parameters of one module nest their wrappers.

    A 2-d parameter (out, in) is adapted as a linear layer's. A 3-d one holds E experts as (E, out, in), or (E, in, out)
    where the module says `is_transposed`; their factors are packed as A (E·r, in), expert by expert, and B (out, r·E),
    rank by rank.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        LoraLayer.__init__(self, base_layer, **kwargs)
        parameter = self.get_param()
        if parameter.dim() not in (2, 3):
            raise ValueError(
                f"The parameter {parameter_name!r} has {parameter.dim()} dimensions; 2 and 3 can be adapted."
            )
        if self.quantization_backend is not None or not parameter.is_floating_point():
            backend = self.quantization_backend
            kept = f"by {backend.backend_name}" if backend is not None else f"in {parameter.dtype}"
            raise TypeError(
                f"{kwargs.get('target_name') or parameter_name} of the adapter {adapter_name!r} is quantised ({kept}); only a "
                "dense parameter can be adapted by target_parameters. Name the module in target_modules instead."
            )
        self.num_experts = parameter.shape[0] if parameter.dim() == 3 else 1
        self.is_transposed = parameter.dim() == 3 and bool(getattr(self.get_base_layer(), "is_transposed", False))
        out_features, in_features = parameter.shape[-2:]
        self.in_features, self.out_features = (
            (out_features, in_features) if self.is_transposed else (in_features, out_features)
        )
        self.fan_in_fan_out = False
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def lora_variants(self) -> VariantTable:
        return {}

    def get_param(self) -> nn.Parameter:
        """The parameter that is adapted."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        return self.get_param()

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha, config, **kwargs)

    def _check_config(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        for name in ("lora_dropout", "fan_in_fan_out", "lora_bias"):
            if getattr(config, name):
                raise ValueError(
                    f"{name}={getattr(config, name)!r} is not supported on a bare parameter, which {self.called} is."
                )

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        rows = r * self.num_experts
        self.lora_A[adapter_name] = bare_linear(self.empty(rows, self.in_features))
        self.lora_B[adapter_name] = bare_linear(self.empty(self.out_features, rows))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        LoraLayer._move_adapter_to_device_of_base_layer(self, adapter_name, device)

    def _adapter_device_and_dtype(self) -> tuple[torch.device, torch.dtype | None]:
        parameter = self.get_param()
        return parameter.device, parameter.dtype if parameter.is_floating_point() else None

    # ------------------------------------------------------------------------------------------------------ the delta

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Left and right factor per expert whose product is ΔW / s in the parameter's own layout."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        if self.num_experts == 1 and self.get_param().dim() == 2:
            return B, A
        experts = self.num_experts
        A = A.view(experts, -1, self.in_features)
        B = B.view(self.out_features, -1, experts).permute(2, 0, 1)
        return (A.mT, B.mT) if self.is_transposed else (B, A)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """ΔW in the parameter's own layout."""
        left, right = self.get_delta_factors(adapter_name)
        return self.scaling[adapter_name] * (left @ right)

    def _adapted(self, parameter: torch.Tensor, names: list[str]) -> torch.Tensor:
        if len(names) == 1 and parameter.dim() == 3 and parameter.dtype.itemsize > 1:
            left, right = (factor.to(parameter.dtype) for factor in self.get_delta_factors(names[0]))
            with torch.autocast(parameter.device.type, enabled=False):
                return torch.baddbmm(parameter, left, right, alpha=self.scaling[names[0]])
        delta = sum(self.get_delta_weight(name) for name in names)
        if parameter.dtype.itemsize > 1:
            return parameter + delta.to(parameter.dtype)
        limit = torch.finfo(parameter.dtype).max
        return (parameter.to(delta.dtype) + delta).clamp(-limit, limit).to(parameter.dtype)

    # -------------------------------------------------------------------------------------------------------- forward

    def _check_forward_args(self, x: Any, *args: Any, **kwargs: Any) -> None:
        """Raise if a mixed batch is asked for: a parameter is one for all rows.

        Raises:
            ValueError: `adapter_names` is given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"{self.called} is adapted by target_parameters, which does not support mixed batches.")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output with its adapted parameters in place."""
        batch = self.roster.batch
        self._check_forward_args(x, adapter_names=kwargs.get("adapter_names", batch and batch.adapter_names))
        module: Any = self
        tensors: dict[str, torch.Tensor] = {}
        while isinstance(module, ParamWrapper):
            names = [name for name, _ in module.plan]
            if names:
                parameter = fetched(module.get_base_layer(), module.get_param())
                tensors[module.parameter_name] = module._adapted(parameter, names)
            module = module.base_layer
        if not tensors:
            return module(x, *args, **kwargs)
        return call_with(module, tensors, (x, *args), kwargs)

    # -------------------------------------------------------------------------------------------------------- merging

    def base_tensors(self) -> dict[str, torch.Tensor]:
        return {self.parameter_name: self.get_param().data}

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        return {self.parameter_name: self._adapted(tensors[self.parameter_name], [adapter])}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a bare parameter is adapted by `target_parameters`, which a conversion does not give."""
        return False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module inside all wrappers, adapters folded in if asked."""
        plain = inner = self.base_layer
        if isinstance(inner, AdapterHolder):
            plain = inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if merge:
            self.merge_for_good(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged_adapters:
            self.unmerge()
        return plain

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()
        return "\n".join([lines[0], f"  parameter_name={self.parameter_name!r}", *lines[1:]])
