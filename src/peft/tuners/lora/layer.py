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

from ...engine.calls import RowGroups, rows_of
from ...engine.kinds import EMBEDDING, kind_of
from ...engine.layer import AdditiveLayer, BaseTunerLayer, check_adapters_to_merge
from ...engine.scaling import Scaling
from ...utils.buffer_dict import BufferDict
from ...utils.constants import ALLOWED_COMPUTE_DTYPES, UPCAST_DTYPES
from ...utils.integrations import dequantize_module_weight, gather_params_ctx, get_bnb_param_type, skip_init_on_device
from ...utils.tensors import add_product, bare_linear, is_bare, is_spread, product, transpose
from ...utils.warning import PeftWarning
from .initialisers import initialise
from .loraga import start_by_gradient
from .tensor_parallel import look_up, spread
from .variant import LoraVariant, VariantTable, requested_variants, resolve_variant, variants_on

if TYPE_CHECKING:
    from .config import LoraConfig, LoraGAConfig

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
            _scaling=Scaling(),
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
        return resolve_variant(self.lora_variants, requested_variants(config), where=self.called)

    @property
    def called(self) -> str:
        """What messages call this layer."""
        return self._label or self.kwargs.get("target_name") or type(self).__name__

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
            raise ValueError(f"The rank of {self.called} must be positive, got r={r}.")
        variant = self.resolve_lora_variant(config=config, **kwargs)
        self._check_config(adapter_name, r, config)
        if variant is not None:
            variant.check(self, adapter_name, r=r, config=config, **kwargs)
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
            initialise(self, adapter_name, config.init_lora_weights, config)
        self._forget_variant(adapter_name)
        if variant is not None:
            self._add_variant(variant, adapter_name, config, **kwargs)
        if kwargs.get("tensor_parallel") is not None:
            self._move_adapter_to_device_of_base_layer(adapter_name)
            spread(self, adapter_name, *kwargs["tensor_parallel"])
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
        if adapter_name in self.frozen_peft_weight_names:
            frozen = self.frozen_peft_weight_names
            self.frozen_peft_weight_names = {name: kept for name, kept in frozen.items() if name != adapter_name}

    def _check_config(self, adapter_name: str, r: int, config: LoraConfig) -> None:
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            warnings.warn(
                f"{self.called} has no bias, so the adapter {adapter_name!r} with lora_bias=True "
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

    # Each initialiser is a file of its own; these names are the ones that programs know them by.

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start an adapter by PiSSA: "pissa" or "pissa_niter_N"."""
        initialise(self, adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        """Start an adapter by OLoRA."""
        initialise(self, adapter_name, "olora")

    def orthogonal_init(self, adapter_name: str) -> None:
        """Start an adapter with A and B not zero and B·A = 0."""
        initialise(self, adapter_name, "orthogonal")

    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start an adapter by CorDA, from what `preprocess_corda` found."""
        initialise(self, adapter_name, init_lora_weights)

    def lora_ga_init(self, adapter_name: str, lora_ga_config: LoraGAConfig | None) -> None:
        """Start an adapter by LoRA-GA, from the gradients of `preprocess_loraga`."""
        start_by_gradient(self, adapter_name, lora_ga_config)

    def mica_init(self, adapter_name: str) -> None:
        """Start an adapter by MiCA."""
        initialise(self, adapter_name, "mica")

    def loftq_init(self, adapter_name: str, config: LoraConfig) -> None:
        """Start an adapter by LoftQ, with the settings in `config.loftq_config`."""
        initialise(self, adapter_name, "loftq", config)

    def _drop(self, adapter_name: str) -> None:
        super()._drop(adapter_name)
        self._forget_variant(adapter_name)

    # ----------------------------------------------------------------------------------------------------- forward

    def _make_plan(self) -> tuple:
        for name, variant in self.lora_variant.items():
            variant.adapters_changed(self, name)
        return tuple(entry for name in super()._make_plan() for entry in self.plan_for(name))

    def plan_for(self, adapter: str) -> tuple:
        return ((adapter, self._computing_variant(adapter)),)

    def _computing_variant(self, adapter: str) -> LoraVariant | None:
        variant = self.lora_variant.get(adapter)
        return None if variant is None or variant.computes_plainly else variant

    def factor_dtype(self, adapter: str) -> torch.dtype:
        """The dtype that an adapter computes in."""
        return self.lora_A[adapter].weight.dtype

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of an adapter."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

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

    def term(self, x: torch.Tensor, adapter: str, gains: torch.Tensor | None = None) -> torch.Tensor:
        """s·B(A(dropout(x))), without forming B·A.

        Args:
            x: the layer's input.
            adapter: the adapter.
            gains: (r,), factors of what A gives.
        """
        x = self._cast_term_input(x, self.factor_dtype(adapter))
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        hidden = A(self.lora_dropout[adapter](x))
        if gains is not None:
            hidden = hidden * gains.view(-1, *[1] * (A.weight.dim() - 2))
        return B(hidden) * self.scaling[adapter]

    def mixed_forward(self, x: torch.Tensor, rows: RowGroups, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self._modules["base_layer"](x, *args, **kwargs)
        varied = [name for name in self.lora_variant and rows if self._computing_variant(name) is not None]
        for name in varied:
            index, variant = rows[name], self.lora_variant[name]
            part = self._cast_term_input(x[index], self.factor_dtype(name))
            inputs = {key: rows_of(self.call_input(key, len(x)), index, len(x)) for key in variant.inputs}
            adapted = variant.forward(self, active_adapter=name, x=part, result=result[index], **inputs)
            result = result.index_copy(0, index, adapted.to(result.dtype))
        if not varied:
            return self._add_plain_terms(x, result, rows)
        return self._add_plain_terms(x, result, rows.without(varied))

    def _add_plain_terms(self, x: torch.Tensor, result: torch.Tensor, rows: RowGroups) -> torch.Tensor:
        for name, index in rows.items():
            result = result.index_add(0, index, self.term(x[index], name).to(result.dtype))
        return result

    # ----------------------------------------------------------------------------------------------------- merging

    def delta_weight(self, adapter: str) -> torch.Tensor:
        variant = self.lora_variant.get(adapter)
        return self.plain_delta(adapter) if variant is None else variant.delta_weight(self, adapter)

    def plain_delta(self, adapter: str, gains: torch.Tensor | None = None) -> torch.Tensor:
        """s·B·A, canonical; half precision on the CPU is multiplied in float32.

        Args:
            adapter: the adapter.
            gains: (r,), factors of the columns of B.
        """
        A, B = self.factors(adapter)
        return self.scaling[adapter] * product(B, A, gains)

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        name = self.kind.weight_name
        variant = self.lora_variant.get(adapter)
        if variant is None:
            folded = {name: self.with_delta(tensors[name], adapter)}
        else:
            folded = {name: variant.merge_safe(self, adapter, tensors[name])}
        if self.lora_bias.get(adapter):
            folded[self.kind.bias_name] = self._folded_bias(tensors, adapter)
        return folded

    def _folded_bias(self, tensors: dict[str, torch.Tensor], adapter: str) -> torch.Tensor:
        bias = tensors.get(self.kind.bias_name)
        if bias is None:
            raise RuntimeError(f"{self.called} has no bias to merge the lora_bias of the adapter {adapter!r} into.")
        return bias + self.lora_B[adapter].bias * self.scaling[adapter]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        variant = self.lora_variant.get(adapter_name)
        supported = variant is None or variant.supports_lora_conversion()
        return supported and super().supports_lora_conversion(adapter_name)

    def effective_delta(self, adapter: str) -> torch.Tensor:
        variant = self.lora_variant.get(adapter)
        if variant is None or type(variant).merge_safe is LoraVariant.merge_safe:
            return self.delta_weight(adapter)
        weight = self.unmerged_weight().float()
        return self.kind.flip(variant.merge_safe(self, adapter, weight) - weight)

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

    def factor_dtype(self, adapter: str) -> torch.dtype:
        return self._modules["lora_A"]._modules[adapter].weight.dtype

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
        if plan is None or kwargs:
            return super().forward(x, *args, **kwargs)
        if roster is not None and roster.batch is not None:
            return self._mixed_batch_forward(x, *args)
        result = self._modules["base_layer"](x, *args)
        return self._with_terms(x, result, plan) if plan else result

    def _add_term(self, x: torch.Tensor, result: torch.Tensor, adapter: str) -> torch.Tensor:
        modules = self._modules
        A, B = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
        if not (is_bare(A) and is_bare(B) and result.dtype is x.dtype is A._parameters["weight"].dtype):
            return result + self.term(x, adapter)
        dropout = modules["lora_dropout"]._modules[adapter]
        hidden = F.linear(x if type(dropout) is nn.Identity else dropout(x), A._parameters["weight"])
        return add_product(result, hidden, B._parameters["weight"], self._scaling[adapter])

    def _add_plain_terms(self, x: torch.Tensor, result: torch.Tensor, rows: RowGroups) -> torch.Tensor:
        if len(rows) < 2 or x.dim() not in (2, 3) or any(map(self.lora_bias.get, rows)):
            return super()._add_plain_terms(x, result, rows)
        index = None if rows.complete else rows.flat
        part, onto = (x, result) if index is None else (x[index], result[index])
        if x.dim() == 2:
            part, onto = part.unsqueeze(1), onto.unsqueeze(1)
        adapted = self._add_batched(part, onto, rows.names)
        adapted = adapted.squeeze(1) if x.dim() == 2 else adapted
        return adapted if index is None else result.index_copy(0, index, adapted)

    def _add_batched(self, x: torch.Tensor, result: torch.Tensor, names: list[str]) -> torch.Tensor:
        """result + s·B(A(x)) of another adapter for each row; x is (rows, tokens, in)."""
        A, B = self._stacked_factors(names)
        factors = list(map(self._scaling.get, names))
        scaling: Any = factors[0]
        if factors.count(scaling) < len(factors):
            scaling = torch.tensor([float(factor) for factor in factors], dtype=A.dtype, device=A.device).view(
                -1, 1, 1
            )
        hidden = torch.bmm(self._cast_term_input(x, A.dtype), A.mT)
        if torch.is_tensor(scaling):
            hidden, scaling = hidden * scaling, 1.0
        if result.dtype is hidden.dtype:
            return torch.baddbmm(result, hidden, B.mT, alpha=scaling)
        return result + (torch.bmm(hidden, B.mT) * scaling).to(result.dtype)

    def _stacked_factors(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """A (n, r, in) and B (n, out, r) of adapters of any rank, padded by zeros."""
        # By their shapes: factors that are prepared for hotswapping are padded already.
        lora_A, lora_B = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules
        A = [lora_A[name]._parameters["weight"] for name in names]
        B = [lora_B[name]._parameters["weight"] for name in names]
        if len({factor.shape for factor in A}) > 1:
            ranks = [factor.size(0) for factor in A]
            A = [F.pad(factor, (0, 0, 0, max(ranks) - rank)) for factor, rank in zip(A, ranks)]
            B = [F.pad(factor, (0, max(ranks) - rank)) for factor, rank in zip(B, ranks)]
        return torch.stack(A), torch.stack(B)

    def with_delta(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        A, B = self.factors(adapter)
        if self.fan_in_fan_out or not (weight.dtype is A.dtype in (torch.float32, torch.float64)):
            return super().with_delta(weight, adapter)
        return add_product(weight, B, A.T, self.scaling[adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        delta = self.delta_weight(adapter)
        return transpose(delta, self.fan_in_fan_out)


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
            raise ValueError(f"{self.called} has no bias: lora_bias is not supported on an Embedding.")

    def _make_factors(self, adapter_name: str, r: int, bias: bool) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(self.empty(r, self.in_features))
        self.lora_embedding_B[adapter_name] = nn.Parameter(self.empty(self.out_features, r))

    def factor_dtype(self, adapter: str) -> torch.dtype:
        return self.lora_embedding_A[adapter].dtype

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def term(self, x: torch.Tensor, adapter: str, gains: torch.Tensor | None = None) -> torch.Tensor:
        A, B = self.factors(adapter)
        hidden, B = self.embed(x, A.T), B.to_local() if is_spread(B) else B
        return ((hidden if gains is None else hidden * gains) @ B.T) * self.scaling[adapter]

    def embed(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of a table (entries, r), looked up and scaled as the base layer does it."""
        if is_spread(table):
            return look_up(self.get_base_layer(), x, table)
        return EMBEDDING.apply(self.get_base_layer(), x, table)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        return self.delta_weight(adapter).T


from .attention import MultiheadAttention  # noqa: E402  (they derive from the classes above)
from .convolution import Conv1d, Conv2d, Conv3d, _ConvNd  # noqa: E402
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
    "_ConvNd",
    "_LoraParameterProxy",
    "check_adapters_to_merge",
    "dequantize_module_weight",
    "dispatch_default",
    "gather_params_ctx",
    "get_bnb_param_type",
    "skip_init_on_device",
    "transpose",
]
