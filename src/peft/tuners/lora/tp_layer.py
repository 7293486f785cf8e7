"""LoRA on the tensor-parallel linear layers of Megatron-Core.

A column-parallel layer holds some rows of W, and so does B; a row-parallel one some columns, and so does A. The other
factor is whole on every rank. Like Megatron's own, these layers give their output and a bias that is still to be added.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...engine.layer import BaseTunerLayer, check_adapters_to_merge
from ...utils.integrations import gather_params_ctx
from ...utils.tensors import bare_linear, product, transpose
from .config import LoraConfig
from .layer import LoraLayer

if TYPE_CHECKING:
    from .variant import VariantTable

STARTS = (True, False, "gaussian")
"""Values of `init_lora_weights` that read nothing of the base weight, of which each rank has a part."""


def get_default_module_allowlist() -> list[str]:
    """The packages that `LoraConfig.megatron_core` may name a module of: loading an adapter must not import anything else."""
    return ["megatron"]


class LoraParallelLinear(LoraLayer, nn.Module):
    """LoRA on a `ColumnParallelLinear` or `RowParallelLinear`.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the first adapter.
        config: its configuration, with `megatron_config`.
        backend: Megatron's module `tensor_parallel`.
        r: rank of this layer.
        lora_alpha: numerator of the scaling.
        is_target_conv_1d_layer: of no effect.
        kwargs: `parallel_config`, the `TransformerConfig` that the parallel factors are made with, and what depends on the
            module.

    Raises:
        ValueError: a variant, a bias, or a start that reads the base weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        backend: Any,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        base = self.get_base_layer()
        self.backend = backend
        self.is_parallel_a = isinstance(base, backend.RowParallelLinear)
        self.in_features, self.out_features = base.input_size, base.output_size
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def lora_variants(self) -> VariantTable:
        return {}

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        init_method: Callable[[torch.Tensor], Any] = nn.init.xavier_normal_,
        input_is_parallel: bool = True,
        gather_output: bool = False,
        inference_mode: bool = False,
        **parallel_linear_kwargs: Any,
    ) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            r: rank of this layer.
            lora_alpha: numerator of the scaling.
            config: everything else.
            init_method: what Megatron fills the parallel factor with before it is initialised.
            input_is_parallel: whether a row-parallel A is given a part of the input; what the base layer says counts.
            gather_output: whether a column-parallel B gives the whole output; what the base layer says counts.
            inference_mode: of no effect beside `config.inference_mode`.
            parallel_linear_kwargs: `parallel_config`, by default that of the first adapter.

        Raises:
            ValueError: as the constructor.
        """
        base = self.get_base_layer()
        self._parallel_options = {
            "init_method": init_method,
            "config": parallel_linear_kwargs.get("parallel_config", self.kwargs.get("parallel_config")),
            **(
                {"input_is_parallel": getattr(base, "input_is_parallel", input_is_parallel), "skip_bias_add": True}
                if self.is_parallel_a
                else {"gather_output": getattr(base, "gather_output", gather_output)}
            ),
        }
        LoraLayer.update_layer(self, adapter_name, r, lora_alpha, config, **parallel_linear_kwargs)

    def _check_config(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(
                f"{self.called}: lora_bias is not supported on a parallel layer (adapter {adapter_name!r})."
            )
        if config.init_lora_weights not in STARTS:
            raise ValueError(
                f"{self.called}: init_lora_weights={config.init_lora_weights!r} of the adapter {adapter_name!r} is not "
                f"supported on a parallel layer, of whose weight each rank has a part. Use {', '.join(map(repr, STARTS))}."
            )

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        parallel = self._parallel_options
        if self.is_parallel_a:
            A = self.backend.RowParallelLinear(self.in_features, r, bias=False, **parallel)
            B = bare_linear(self.empty(self.out_features, r, dtype=torch.float32))
        else:
            A = bare_linear(self.empty(r, self.in_features, dtype=torch.float32))
            B = self.backend.ColumnParallelLinear(r, self.out_features, bias=False, **parallel)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = A, B

    # -------------------------------------------------------------------------------------------------------- forward

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Raise if a mixed batch is asked for: the first dimension of Megatron's activations is not the batch.

        Raises:
            ValueError: `adapter_names` is given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"{self.called}: a parallel layer does not support mixed batches (adapter_names).")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base layer's output with the active adapters' terms, and its bias.

        Args:
            x: (..., in), or this rank's part of it; as the base layer takes it.
            args: the base layer's further arguments.
            kwargs: the same.
        """
        return LoraLayer.forward(self, x, *args, **kwargs)

    def adapted_forward(
        self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        result, bias = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for adapter, _ in plan:
            result = result + self.term(x, adapter)
        return result.to(dtype), bias

    def term(self, x: torch.Tensor, adapter: str, gains: torch.Tensor | None = None) -> torch.Tensor:
        x = self._cast_term_input(x, self.factor_dtype(adapter))
        hidden = _output(self.lora_A[adapter](self.lora_dropout[adapter](x)))
        hidden = hidden if gains is None else hidden * gains
        return _output(self.lora_B[adapter](hidden)) * self.scaling[adapter]

    # -------------------------------------------------------------------------------------------------------- merging

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """This rank's part of s·B·A, (out, in) but for the side that is split.

        Args:
            adapter: a name this layer holds.
        """
        A, B = self.factors(adapter)
        return self.scaling[adapter] * product(B, A)

    def delta_weight(self, adapter: str) -> torch.Tensor:
        return self.get_delta_weight(adapter)

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        return {"weight": tensors["weight"] + self.get_delta_weight(adapter)}


def _output(result: Any) -> torch.Tensor:
    """What a layer gives, without the bias that Megatron's give beside it."""
    return result[0] if isinstance(result, tuple) else result


def dispatch_megatron(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> LoraParallelLinear | None:
    """The LoRA layer for a parallel layer of Megatron-Core; None if the target is none, or no `megatron_config` is given.

    Args:
        target: the module to adapt, possibly a tuner layer already.
        adapter_name: the adapter.
        config: its configuration.
        kwargs: the layer's constructor arguments.

    Raises:
        ValueError: `megatron_core` is no module of Megatron.
    """
    if not config.megatron_config:
        return None
    backend = _module(config.megatron_core, "tensor_parallel")
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, (backend.ColumnParallelLinear, backend.RowParallelLinear)):
        return None
    settings = _module(config.megatron_core, "transformer.transformer_config")
    parallel = settings.TransformerConfig(**config.megatron_config)
    return LoraParallelLinear(target, adapter_name, config=config, backend=backend, parallel_config=parallel, **kwargs)


def _module(core: str, name: str) -> ModuleType:
    allowed = get_default_module_allowlist()
    if not any(core.startswith(f"{package}.") for package in allowed):
        raise ValueError(
            f"megatron_core must name a module of {' or '.join(allowed)}, such as 'megatron.core', got {core!r}."
        )
    try:
        return importlib.import_module(f"{core}.{name}")
    except ImportError as error:
        raise ImportError(f"megatron_config is set, which needs {core}.{name}: {error}.") from error


__all__ = [
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "LoraParallelLinear",
    "check_adapters_to_merge",
    "dispatch_megatron",
    "gather_params_ctx",
    "get_default_module_allowlist",
    "transpose",
]
