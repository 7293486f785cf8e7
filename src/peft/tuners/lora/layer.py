"""LoRA on every kind of layer (arXiv 2106.09685): W' = W + s·B·A.

`LoraLayer` is the part common to all kinds; `Linear`, `Embedding` and the convolutions say how A and B look for theirs.
`MultiheadAttention` and `ParamWrapper` have files of their own.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ...engine.kinds import EMBEDDING, kind_of, same_kind_layer
from ...engine.layer import AdditiveLayer, BaseTunerLayer, check_adapters_to_merge
from ...utils.buffer_dict import BufferDict
from ...utils.constants import ALLOWED_COMPUTE_DTYPES, UPCAST_DTYPES
from ...utils.integrations import dequantize_module_weight, gather_params_ctx, get_bnb_param_type, skip_init_on_device
from ...utils.tensors import bare_linear, transpose
from ...utils.warning import PeftWarning
from .initialisers import initialise
from .variant import LoraVariant, VariantTable, requested_variants, resolve_variant, variants_on

if TYPE_CHECKING:
    from .config import LoraConfig

VARIANT_KWARG_KEYS = ["alora_offsets"]


class LoraLayer(AdditiveLayer):
    """Holds the factors A and B of any number of adapters beside a base layer.

    Args:
        base_layer: the layer to adapt.
        ephemeral_gpu_offload: compute DoRA's initial norms on an accelerator.
    """

    lora_alpha: dict[str, float]
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_variant: dict[str, LoraVariant]
    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self._wrap(base_layer, **kwargs)
        self.lora_dropout = nn.ModuleDict()
        self.__dict__.update(
            _ranks={},
            lora_alpha={},
            scaling={},
            use_dora={},
            use_rslora={},
            lora_bias={},
            lora_variant={},
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            _caches={},
            kwargs=kwargs,
            fan_in_fan_out=self.kind is not None and self.kind.transposed,
        )

    def _new_container(self, name: str) -> nn.Module:
        return nn.ParameterDict() if "embedding" in name else nn.ModuleDict()

    @property
    def lora_variants(self) -> VariantTable:
        """Sorted tuple of requested variant names -> the variant that serves it on this kind of layer."""
        return {} if self.kind is None else variants_on(self.kind.name)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The variant that a configuration asks for on this layer, None for plain LoRA.

        Raises:
            ValueError: this kind of layer does not support it.
        """
        return resolve_variant(
            self.lora_variants, requested_variants(config), where=self._label or type(self).__name__
        )

    # ------------------------------------------------------------------------------------------------------ adding

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: its name.
            r: rank of this layer.
            lora_alpha: numerator of the scaling.
            config: everything else.
            kwargs: what depends on the module, such as `target_name`.

        Raises:
            ValueError: `r` is not positive, or an option is not supported on this kind of layer.
        """
        if r <= 0:
            raise ValueError(f"The rank of {self._label or 'a LoRA layer'} must be positive, got r={r}.")
        variant = self.resolve_lora_variant(config=config, **kwargs)
        self._check_config(adapter_name, r, config)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_bias[adapter_name] = config.lora_bias
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.scaling[adapter_name] = self.initial_scaling(adapter_name)
        self._make_factors(adapter_name, r, config.lora_bias)
        tied = kwargs.get("tied_adapter")
        if tied is not None:
            self._share_factors(adapter_name, tied)
        else:
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._forget_variant(adapter_name)
        if variant is not None:
            self._add_variant(variant, adapter_name, config, **kwargs)
        self._settle(adapter_name, inference_mode=config.inference_mode)

    def _add_variant(self, variant: LoraVariant, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        for name, make in variant.containers.items():
            if name not in self.adapter_layer_names:
                setattr(self, name, make())
                self.adapter_layer_names = (*self.adapter_layer_names, name)
        if variant.frozen_containers:
            self.frozen_peft_weight_names = self.frozen_peft_weight_names | {adapter_name: variant.frozen_containers}
        self._move_adapter_to_device_of_base_layer(adapter_name)
        variant.init(self, adapter_name=adapter_name, config=config, **kwargs)
        self.lora_variant[adapter_name] = variant

    def _forget_variant(self, adapter_name: str) -> None:
        variant = self.lora_variant.pop(adapter_name, None)
        for name in variant.containers if variant is not None else ():
            container = getattr(self, name)
            if adapter_name in container:
                del container[adapter_name]
        self.frozen_peft_weight_names = {
            name: frozen for name, frozen in self.frozen_peft_weight_names.items() if name != adapter_name
        }

    def _check_config(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            warnings.warn(
                f"{self._label or type(self).__name__} has no bias, so the adapter {adapter_name!r} with lora_bias=True "
                "cannot be merged into it.",
                PeftWarning,
            )

    def initial_scaling(self, adapter: str) -> float:
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        raise NotImplementedError

    def _share_factors(self, adapter_name: str, tied: dict[str, torch.Tensor]) -> None:
        raise ValueError(f"{type(self).__name__} cannot share its factors with a tied embedding; only a Linear can.")

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Start A and B over.

        Args:
            adapter_name: the adapter.
            init_lora_weights: as in `LoraConfig`.

        Raises:
            ValueError: an initialiser that does not exist or does not go with this kind of layer.
        """
        initialise(self, adapter_name, init_lora_weights)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget_variant(adapter_name)

    # ----------------------------------------------------------------------------------------------------- forward

    def _make_plan(self) -> tuple:
        return tuple(entry for name in super()._make_plan() for entry in self.plan_for(name))

    def plan_for(self, adapter: str) -> tuple:
        return ((adapter, self.lora_variant.get(adapter)),)

    def factor_dtype(self, adapter: str) -> torch.dtype:
        """The dtype that an adapter computes in."""
        return self.lora_A[adapter].weight.dtype

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer with the active adapters applied.

        Args:
            x: the base layer's input.
            args: the base layer's further arguments.
            kwargs: the same; `adapter_names` makes it a mixed batch, and `VARIANT_KWARG_KEYS` are for the variants.
        """
        given = {key: kwargs.pop(key) for key in VARIANT_KWARG_KEYS if key in kwargs}
        if not given:
            return super().forward(x, *args, **kwargs)
        with self.roster.inputs.given(given):
            return super().forward(x, *args, **kwargs)

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return self._with_terms(x, result, plan)

    def _with_terms(self, x: torch.Tensor, result: torch.Tensor, plan: tuple) -> torch.Tensor:
        dtype = result.dtype
        for adapter, variant in plan:
            x = self._cast_term_input(x, self.factor_dtype(adapter))
            if variant is None:
                result = self._add_term(x, result, adapter)
            else:
                inputs = {name: self.call_input(name, len(x)) for name in variant.inputs}
                result = variant.forward(self, active_adapter=adapter, x=x, result=result, **inputs)
        return result if result.dtype is dtype else result.to(dtype)

    def _add_term(self, x: torch.Tensor, result: torch.Tensor, adapter: str) -> torch.Tensor:
        """The output with what one plain adapter adds."""
        return result + self.term(x, adapter)

    def term(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """s·B(A(dropout(x))), without forming B·A."""
        x = self._cast_term_input(x, self.factor_dtype(adapter))
        return self.lora_B[adapter](self.lora_A[adapter](self.lora_dropout[adapter](x))) * self.scaling[adapter]

    def mixed_forward(self, x: torch.Tensor, rows: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        plain = {name: index for name, index in rows.items() if self.lora_variant.get(name) is None}
        for name in [name for name in rows if name not in plain]:
            index, variant = rows[name], self.lora_variant[name]
            part = self._cast_term_input(x[index], self.factor_dtype(name))
            inputs = {key: _rows_of(self.call_input(key, len(x)), index) for key in variant.inputs}
            adapted = variant.forward(self, active_adapter=name, x=part, result=result[index], **inputs)
            result = result.index_copy(0, index, adapted.to(result.dtype))
        return self._add_plain_terms(x, result, plain)

    def _add_plain_terms(self, x: torch.Tensor, result: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, index in rows.items():
            result = result.index_add(0, index, self.term(x[index], name).to(result.dtype))
        return result

    # ----------------------------------------------------------------------------------------------------- merging

    def delta_weight(self, adapter: str) -> torch.Tensor:
        variant = self.lora_variant.get(adapter)
        return self.plain_delta(adapter) if variant is None else variant.delta_weight(self, adapter)

    def plain_delta(self, adapter: str) -> torch.Tensor:
        """s·B·A, canonical; half precision on the CPU is multiplied in float32."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return self.scaling[adapter] * _product(B, A)

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        name = self.kind.weight_name
        variant = self.lora_variant.get(adapter)
        if variant is None:
            folded = super().fold(tensors, adapter)
        else:
            folded = {name: variant.merge_safe(self, adapter, tensors[name])}
        if self.lora_bias.get(adapter):
            folded[self.kind.bias_name] = self._folded_bias(tensors, adapter)
        return folded

    def _folded_bias(self, tensors: dict[str, torch.Tensor], adapter: str) -> torch.Tensor:
        bias = tensors.get(self.kind.bias_name)
        if bias is None:
            raise RuntimeError(
                f"{self._label or type(self).__name__} has no bias to merge the lora_bias of the adapter {adapter!r} into."
            )
        return bias + self.lora_B[adapter].bias * self.scaling[adapter]

    def state_entries(self, adapter: str):
        """As the engine's, but a DoRA magnitude is saved without the `.weight` of the module that holds it."""
        for entry in super().state_entries(adapter):
            yield (
                entry.saved_as(entry.saved.removesuffix(".weight"))
                if "lora_magnitude_vector" in entry.saved
                else entry
            )

    def __repr__(self) -> str:
        return f"lora.{super().__repr__()}"


def _rows_of(value: Any, index: torch.Tensor) -> Any:
    """The entries of a per-row input for some rows of the batch."""
    if value is None:
        return None
    return value[index] if torch.is_tensor(value) else [value[row] for row in index.tolist()]


def _product(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """B·A over the rank; in float32 for half precision on a CPU, which is faster and rounds once."""
    if A.device.type == "cpu" and A.dtype in (torch.float16, torch.bfloat16):
        return (B.float() @ A.float()).to(A.dtype)
    return B @ A


def _is_bare(factor: nn.Module) -> bool:
    """Whether calling a factor is nothing but its product: no bias, no hook, no wrapper of a sharding library."""
    return (
        type(factor) is nn.Linear
        and factor._parameters["bias"] is None
        and not factor._forward_hooks
        and not factor._forward_pre_hooks
        and not factor._backward_hooks
        and not factor._backward_pre_hooks
    )


def add_product(result: torch.Tensor, hidden: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """result + s·hidden·Bᵀ in one kernel.

    Args:
        result: (..., out).
        hidden: (..., r).
        B: (out, r).
        scaling: s.
    """
    if result.dim() == 2:
        return torch.addmm(result, hidden, B.T, alpha=scaling)
    return torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), B.T, alpha=scaling).view(result.shape)


class Linear(LoraLayer, nn.Module):
    """LoRA on `nn.Linear` and transformers' `Conv1D`: A is (r, in), B is (out, r)."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer or (self.kind is not None and self.kind.transposed)
        if self.kind is None:
            self.fan_in_fan_out = config.fan_in_fan_out
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        self.lora_A[adapter_name] = bare_linear(self.empty(r, self.in_features))
        self.lora_B[adapter_name] = bare_linear(
            self.empty(self.out_features, r), self.empty(self.out_features) if bias else None
        )

    def _share_factors(self, adapter_name: str, tied: dict[str, torch.Tensor]) -> None:
        self.lora_A[adapter_name].weight = nn.Parameter(tied["lora_A"])
        self.lora_B[adapter_name].weight = nn.Parameter(tied["lora_B"])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus s·B·A·x of the active adapters.

        Args:
            x: (..., in).
            args: the base layer's further arguments.
            kwargs: the same; `adapter_names` makes it a mixed batch.

        Returns:
            (..., out) in the base layer's dtype.
        """
        plan, roster = self._plan, self._roster
        if plan is None or kwargs or (roster is not None and roster.batch is not None):
            return super().forward(x, *args, **kwargs)
        result = self._modules["base_layer"](x, *args)
        return self._with_terms(x, result, plan) if plan else result

    def _add_term(self, x: torch.Tensor, result: torch.Tensor, adapter: str) -> torch.Tensor:
        modules = self._modules
        A, B = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
        if not (_is_bare(A) and _is_bare(B) and result.dtype is x.dtype is A._parameters["weight"].dtype):
            return result + self.term(x, adapter)
        dropout = modules["lora_dropout"]._modules[adapter]
        hidden = F.linear(x if type(dropout) is nn.Identity else dropout(x), A._parameters["weight"])
        scaling = self.scaling[adapter]
        if torch.is_tensor(scaling):  # prepared for hotswapping: its value must stay a value, not become a constant
            hidden, scaling = hidden * scaling, 1.0
        return add_product(result, hidden, B._parameters["weight"], scaling)

    def _add_plain_terms(self, x: torch.Tensor, result: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(rows) < 2 or x.dim() not in (2, 3) or any(self.lora_bias[name] for name in rows):
            return super()._add_plain_terms(x, result, rows)
        index = torch.cat(list(rows.values()))
        owner = torch.cat([torch.full_like(rows[name], position) for position, name in enumerate(rows)])
        A, B = self._stacked_factors(list(rows))
        part = self._cast_term_input(x[index], A.dtype)
        part = part if part.dim() == 3 else part.unsqueeze(1)
        terms = torch.bmm(torch.bmm(part, A[owner].mT), B[owner].mT)
        return result.index_add(0, index, terms.view(len(index), *result.shape[1:]).to(result.dtype))

    def _stacked_factors(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n, r, in) with the scalings in it, and B (n, out, r), of adapters of any rank, padded by zeros."""
        # By their shapes: factors that are prepared for hotswapping are padded already.
        A, B = [self.lora_A[name].weight for name in names], [self.lora_B[name].weight for name in names]
        rank = max(len(factor) for factor in A)
        A = [F.pad(factor * self.scaling[n], (0, 0, 0, rank - len(factor))) for n, factor in zip(names, A)]
        return torch.stack(A), torch.stack([F.pad(factor, (0, rank - factor.shape[1])) for factor in B])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        delta = self.delta_weight(adapter)
        return transpose(delta, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        variant = self.lora_variant.get(adapter_name)
        return variant is None or variant.supports_lora_conversion()


class LoraEmbeddingATPHolder(nn.Embedding):
    """An embedding over A of an embedding adapter, for tensor-parallel hooks that expect a module.

    Args:
        lora_embedding_A_weight: A, (r, entries).
    """

    def __init__(self, lora_embedding_A_weight: torch.Tensor) -> None:
        rank, entries = lora_embedding_A_weight.shape
        super().__init__(entries, rank, _weight=lora_embedding_A_weight.T)


class Embedding(LoraLayer, nn.Module):
    """LoRA on `nn.Embedding`: A is (r, entries), B is (width, r)."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        init_lora_weights: bool | str = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _check_config(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(
                f"{self._label or 'An embedding'} has no bias: lora_bias is not supported on an Embedding."
            )

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(self.empty(r, self.in_features))
        self.lora_embedding_B[adapter_name] = nn.Parameter(self.empty(self.out_features, r))

    def factor_dtype(self, adapter: str) -> torch.dtype:
        return self.lora_embedding_A[adapter].dtype

    def term(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        A, B = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        return (self.embed(x, A.T) @ B.T) * self.scaling[adapter]

    def embed(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of a table (entries, r), looked up and scaled as the base layer does it."""
        return EMBEDDING.apply(self.get_base_layer(), x, table)

    def plain_delta(self, adapter: str) -> torch.Tensor:
        return self.scaling[adapter] * _product(self.lora_embedding_B[adapter], self.lora_embedding_A[adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return self.delta_weight(adapter).T


class _ConvNd(LoraLayer, nn.Module):
    """LoRA on a convolution: A convolves over the base layer's window into r channels, B is pointwise.

    With groups, A sees all input channels; such an adapter has no merged weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        if self.get_base_layer().groups > 1:
            warnings.warn(
                f"{kwargs.get('target_name') or 'A convolution'} has {self.get_base_layer().groups} groups, while A "
                "sees all channels: the adapter cannot be merged."
            )
        self._kernel_dim = self.weight.dim()
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _check_kernel(self, dimensions: int) -> None:
        if self._kernel_dim != dimensions + 2:
            raise ValueError(
                f"{type(self).__name__} adapts convolutions over {dimensions} dimensions, got a "
                f"{type(self.get_base_layer()).__name__}; use Conv{self._kernel_dim - 2}d."
            )

    def _check_config(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        super()._check_config(adapter_name, r, config)
        groups = self.get_base_layer().groups
        if r % groups:
            raise ValueError(
                f"{self._label or 'A convolution'} has {groups} groups, so its rank must be a multiple of {groups}, "
                f"got r={r}; nearest is {max(groups, round(r / groups) * groups)}."
            )

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        layer = self.get_base_layer()
        device = self.empty(0).device
        with device:
            A = same_kind_layer(layer, layer.in_channels, r, pointwise=False, bias=False)
            B = same_kind_layer(layer, r, layer.out_channels, pointwise=True, bias=bias)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = A, B

    def plain_delta(self, adapter: str) -> torch.Tensor:
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if self.get_base_layer().groups > 1:
            raise NotImplementedError(
                f"{self._label or 'A convolution'} has {self.get_base_layer().groups} groups, while LoRA's A sees all "
                f"channels: the adapter {adapter!r} has no weight of the base's shape and cannot be merged."
            )
        return self.scaling[adapter] * _product(B.flatten(1), A.flatten(1)).view(len(B), *A.shape[1:])


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_kernel(1)


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_kernel(2)


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_kernel(3)


from .attention import MultiheadAttention  # noqa: E402  (they derive from the classes above)
from .parameter import ParamWrapper, _LoraParameterProxy  # noqa: E402

LAYER_CLASSES: dict[str, type[LoraLayer]] = {
    "embedding": Embedding,
    "conv1d": Conv1d,
    "conv2d": Conv2d,
    "conv3d": Conv3d,
    "multihead_attention": MultiheadAttention,
    "linear": Linear,
    "conv1d_transformers": Linear,
}


def dispatch_default(
    target: nn.Module, adapter_name: str, config: LoraConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """The LoRA layer for a target with a dense weight, None if there is none for it.

    Args:
        target: the module to adapt, possibly a tuner layer already.
        adapter_name: the adapter.
        config: its configuration.
        parameter_name: the bare parameter to adapt, instead of the module as a layer.
        kwargs: the layer's constructor arguments.
    """
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    kind = kind_of(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)
    layer_cls = None if kind is None else LAYER_CLASSES.get(kind.name)
    return None if layer_cls is None else layer_cls(target, adapter_name, config=config, **kwargs)


__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "UPCAST_DTYPES",
    "VARIANT_KWARG_KEYS",
    "BaseTunerLayer",
    "BufferDict",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoraEmbeddingATPHolder",
    "LoraLayer",
    "LoraVariant",
    "MultiheadAttention",
    "ParamWrapper",
    "_LoraParameterProxy",
    "check_adapters_to_merge",
    "dequantize_module_weight",
    "dispatch_default",
    "gather_params_ctx",
    "get_bnb_param_type",
    "skip_init_on_device",
    "transpose",
]
