"""The engine's layer: one wrapped module with any number of adapters, and the arithmetic common to all methods.

A method derives its layer class from one of
  `AdditiveLayer`         W' = W + ΔW: give `delta_weight(adapter)`, and `term(x, adapter)` where ΔW need not be formed;
  `MultiplicativeLayer`   W' = f(W):   give `adapted_weight(weight, adapter)`;
  `AdapterLayer`          anything else: give `adapted_forward`, and `fold` if it can be merged.
Weights are canonical in these (see `kinds`). The engine does the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..utils.tensors import empty, is_spread
from ..utils.warning import PeftWarning
from .backends import resolve_quantization_backend
from .calls import MixedBatch, RowGroups
from .kinds import Kind, kind_of, kinds
from .protocol import BaseTunerLayer, check_adapters_to_merge
from .scaling import Scaling

BASE_ROW = "__base__"
"""In a mixed batch, the name of a row that uses no adapter."""

DEFERRED: ContextVar[bool] = ContextVar("DEFERRED", default=False)
"""Whether new adapters' parameters are made on the meta device, since their values will be loaded."""


@contextmanager
def deferred_parameters(active: bool = True) -> Iterator[None]:
    """Within it, new adapters get parameters without storage, which loading fills; inactive, it changes nothing."""
    token = DEFERRED.set(active or DEFERRED.get())
    try:
        yield
    finally:
        DEFERRED.reset(token)


class AdapterLayer(BaseTunerLayer):
    """A tuner layer whose forward, merging and mixed batches the engine provides."""

    kind: Kind | None
    _stash: Any = None
    _merged_around: AdapterLayer | None = None
    """The nearest of the layers around this one that are merged into its base layer."""

    def _wrap(self, base_layer: nn.Module, **options: Any) -> None:
        """Set up the state that is common to all methods; the first thing a layer's constructor does."""
        self.base_layer = base_layer
        inner = self.get_base_layer()
        backend = options.get("quantization_backend")
        # Past Module.__setattr__, which asks of every value whether it is a parameter, a module or a buffer.
        self.__dict__.update(
            merged_adapters=[],
            _disable_adapters=False,
            cast_input_dtype_enabled=True,
            quantization_backend=resolve_quantization_backend(inner) if backend is None else backend,
        )
        kind = kind_of(inner)
        if kind is None and self.quantization_backend is not None:
            kind = next(kinds(self.quantization_backend.layer_type))
        self.__dict__["kind"] = kind
        if kind is not None:
            self.__dict__["in_features"], self.__dict__["out_features"] = kind.features(inner)
        elif hasattr(inner, "in_features") and hasattr(inner, "out_features"):
            self.in_features, self.out_features = inner.in_features, inner.out_features

    def _new_container(self, name: str) -> nn.Module:
        """The container for one of `adapter_layer_names`, made when it is first asked for."""
        return nn.ParameterDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in type(self).adapter_layer_names or "_modules" not in self.__dict__:
                raise
            self._modules[name] = container = self._new_container(name)
            return container

    def extra_repr(self) -> str:
        backend = self.quantization_backend
        return "" if backend is None else f"quantization_backend={backend.backend_name!r}"

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor for a new adapter; on the meta device where its values will be loaded.

        Raises:
            SizeError: there is no room for it.
        """
        owner = self._label or type(self).__name__
        return empty(*shape, owner=owner, dtype=dtype, device="meta" if DEFERRED.get() else None)

    def start_over(self, adapter_name: str, config: Any, **options: Any) -> None:
        """Give an adapter that is there its start again.

        Args:
            adapter_name: its name.
            config: its configuration.
            options: what the tuner's `layer_options` gives for this layer.
        """
        self.update_layer(adapter_name, config=config, **options)

    def _settle(self, adapter_name: str, inference_mode: bool = False) -> None:
        """The last thing that adding an adapter does: device, dtype, who trains, and the roster."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if not self.training:  # a new module (dropout) is in training mode
            for attribute in self.containers:
                container = self._modules.get(attribute)
                if isinstance(container, nn.ModuleDict) and adapter_name in container:
                    container[adapter_name].train(False)
        self.__dict__["_held"] = None
        if inference_mode:
            self._inference |= {adapter_name}
        if self._roster is not None:
            self._roster.join(adapter_name, self._label, self.exclusive, self.rows_of(adapter_name))
            self.refresh([adapter_name])
        elif adapter_name not in self.active_adapters:  # otherwise parameters are as they are made: they train
            self.refresh([adapter_name])

    def activate(self, adapter_names: list[str], inference_mode: bool = False) -> None:
        super().activate(adapter_names, inference_mode)
        if adapter_names and not inference_mode and self.quantization_backend is not None:
            self.quantization_backend.make_trainable(self.get_base_layer(), self._label)

    # ---------------------------------------------------------------------------------------------------------- forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer with the active adapters applied.

        Args:
            x: the base layer's input; `args` and `kwargs` go to the base layer.
            kwargs: `adapter_names`, one name per row of `x`, makes it a mixed batch.
        """
        if "adapter_names" in kwargs or self.roster.batch is not None:
            return self._mixed_batch_forward(x, *args, **kwargs)
        plan = self.plan
        if not plan:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(x, plan, *args, **kwargs)

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output with these adapters applied, in order."""
        raise NotImplementedError

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Raise unless the names of a mixed batch fit it.

        Raises:
            ValueError: their number is not that of the rows, or adapters are merged.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            return
        if len(names) != x.shape[0]:
            raise ValueError(
                f"{self._label or type(self).__name__}: adapter_names must name one adapter per row, got {len(names)} "
                f"names for {len(x)} rows."
            )
        if self.merged_adapters:
            raise ValueError(
                f"{self._label or type(self).__name__}: a mixed batch needs unmerged adapters, but "
                f"{self.merged_adapters} are merged. Call unmerge_adapter() first."
            )

    def _batch_names(self, rows: int, given: list[str] | None) -> list[str] | None:
        batch: MixedBatch | None = self.roster.batch
        if given is not None or batch is None:
            return given
        names = batch.adapter_names
        # Beam search repeats each row; an encoder that runs once per prompt sees the rows unrepeated.
        beams = rows // len(names) if names and rows % len(names) == 0 else 1
        return [name for name in names for _ in range(beams)] if beams > 1 else names

    def call_input(self, name: str, rows: int | None = None) -> Any:
        """What the running call of the model gives under a name (see `BaseTuner.call_inputs`), None for nothing.

        Args:
            name: one of the tuner's `special_forward_args`.
            rows: rows that the layer sees; a list or tensor with fewer entries is repeated for the beams of each of them.
        """
        value = self.roster.inputs.get(name)
        if rows is None or not isinstance(value, (list, torch.Tensor)) or not len(value) or rows % len(value):
            return value
        times = rows // len(value)
        if torch.is_tensor(value):
            return value if times == 1 else value.repeat_interleave(times, dim=0)
        return [item for item in value for _ in range(times)]

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        names = self._batch_names(x.shape[0], adapter_names)
        if names is None or self._disable_adapters:
            return self.base_layer(x, *args, **kwargs) if self._disable_adapters else self.forward(x, *args, **kwargs)
        self._check_forward_args(x, adapter_names=names)
        batch = self.roster.batch or MixedBatch(names)
        return self.mixed_forward(x, batch.groups(names, self.held, x.device), *args, **kwargs)

    def mixed_forward(self, x: torch.Tensor, rows: RowGroups, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of a batch in which each group of rows uses one adapter; the other rows use none."""
        result = self.base_layer(x, *args, **kwargs)
        for name, index in rows.items():
            adapted = self.adapted_forward(x[index], self.plan_for(name), *args, **kwargs)
            result = result.index_copy(0, index, adapted.to(result.dtype))
        return result

    def plan_for(self, adapter: str) -> tuple:
        """The plan that a forward with this one adapter follows."""
        return (adapter,)

    # ---------------------------------------------------------------------------------------------------------- merging

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        """The base layer's tensors with one adapter folded in.

        Args:
            tensors: the base layer's tensors by name as `base_tensors` gave them, earlier adapters folded in.
            adapter: a name this layer holds.

        Returns:
            The tensors that change, same shapes; new ones, which the base layer is going to keep.
        """
        raise NotImplementedError(
            f"{self._label or type(self).__name__} acts on activations and has no merged weight. Keep the adapter, or "
            "unload() it."
        )

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """The base layer's tensors that folding may change: by default weight and bias."""
        kind = self.kind
        tensors = {"weight" if kind is None else kind.weight_name: self.get_base_weight()}
        bias = getattr(self.get_base_layer(), "bias" if kind is None else kind.bias_name, None)
        if torch.is_tensor(bias) and bias.numel():
            tensors["bias" if kind is None else kind.bias_name] = bias.data
        return tensors

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight; `unmerge` brings it back bit for bit.

        Args:
            safe_merge: check the result for NaN and infinity before anything is written.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: with `safe_merge`, the result is not finite; nothing is changed.
            TypeError: the base weight is kept in a form that cannot be written.
        """
        held = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in held]
        if not names:
            return
        with self._beneath_others():
            changed = self.folded(names, check=safe_merge)
            self.check_writable(changed)
            if self._stash is None:
                self.__dict__["_stash"] = self._snapshot(changed)
            self._write(changed)
            for layer in self._layers_inside():
                layer.__dict__["_merged_around"] = layer._merged_around or self
        if self.quantization_backend is not None:
            warnings.warn(
                f"Merging into a weight that is quantised ({self.quantization_backend.backend_name}) rounds the result, so "
                "that outputs change a little. Unmerging brings the weight back exactly.",
                PeftWarning,
            )
        self.__dict__["merged_adapters"] = [*self.merged_adapters, *names]
        self.__dict__["_plan"] = self._make_plan()

    def merge_for_good(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """`merge` without a way back, which would keep the weight that was there as long as the layer is."""
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._stash = None

    def _layers_inside(self) -> Iterator[AdapterLayer]:
        """The layers between this one and the base layer, outermost first."""
        layer = self.base_layer
        while isinstance(layer, AdapterLayer):
            yield layer
            layer = layer.base_layer

    @contextmanager
    def _beneath_others(self) -> Iterator[None]:
        """Context in which no layer around this one is merged.

        They are applied after this one, to its output, and what they keep of the base weight is to have it merged.
        """
        around, layer = [], self._merged_around
        while layer is not None:
            around.append((layer, list(layer.merged_adapters)))
            layer = layer._merged_around
        for layer, _ in reversed(around):
            layer.unmerge()
        try:
            yield
        finally:
            for layer, adapter_names in around:
                layer.merge(adapter_names=adapter_names)

    @torch.no_grad()
    def folded(self, adapter_names: list[str], check: bool = False) -> dict[str, torch.Tensor]:
        """The base layer's tensors that change when these adapters are folded in, in order; nothing is written.

        Args:
            adapter_names: names this layer holds.
            check: raise if a value is not finite.
        """
        before = self.base_tensors()
        after = dict(before)
        for name in adapter_names:
            folded = self.fold(after, name)
            if check:
                self._check_finite(folded, name)
            after.update({key: value.to(before[key].dtype) for key, value in folded.items()})
        return {key: value for key, value in after.items() if value is not before[key]}

    def check_writable(self, tensors: Iterable[str]) -> None:
        """Raise unless these of the base layer's tensors can be written.

        Raises:
            FixedWeightError: its weight is kept in a form that can only be read.
        """
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge and any(name.endswith("weight") for name in tensors):
            raise backend.unwritable(self._label or type(self).__name__)

    def _check_finite(self, tensors: dict[str, torch.Tensor], adapter: str) -> None:
        for key, value in tensors.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"Merging the adapter {adapter!r} into {self._label or type(self).__name__} gives NaN or infinite "
                    f"values in {key!r}; nothing was merged."
                )

    shares_merged_weight = False
    """Whether modules that share the base weight are to see it merged; otherwise merging gives this layer its own."""
    _shared: frozenset[str] = frozenset()
    """Names of base tensors that other modules share, such as tied embeddings."""

    def _snapshot(self, changed: dict[str, torch.Tensor]) -> Any:
        layer = self.get_base_layer()
        if self.quantization_backend is not None:
            return self.quantization_backend.snapshot(layer)
        kept = {key: _tensor_at(layer, key) for key in self.base_tensors()}
        for key in self._shared & kept.keys():
            setattr(layer, key, nn.Parameter(kept[key].detach().clone(), kept[key].requires_grad))
        # The tensors themselves: what is merged takes their place and leaves them as they are.
        return {key: old if key in self._shared else _kept(old) for key, old in kept.items()}

    @property
    def lent(self) -> dict[str, nn.Parameter]:
        """Base tensors that this layer shares with others when nothing is merged, and has its own of until then."""
        if self._stash is None or self.quantization_backend is not None:
            return {}
        return {key: self._stash[key] for key in self._shared & self._stash.keys()}

    def _restore(self) -> None:
        layer = self.get_base_layer()
        for key, old in self._stash.items():
            current = _tensor_at(layer, key)
            if key in self._shared:
                if (old.device, old.dtype) != (current.device, current.dtype):  # moved while nobody had it
                    old.data = old.data.to(current.device, current.dtype)
                setattr(layer, key, old)
                continue
            if current.dtype is old.dtype and current.device == old.device and not is_spread(current):
                current.data = old
            else:  # the model was moved while merged
                current.data.copy_(old)

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        layer = self.get_base_layer()
        for key, value in tensors.items():
            if key.endswith("weight") and self.quantization_backend is not None:
                self.quantization_backend.set_base_weight(self, value)
            elif is_spread(current := _tensor_at(layer, key)):
                current.data.copy_(value)
            else:
                same_layout = value.stride() == current.stride() and value.device == current.device
                current.data = value if same_layout else torch.empty_like(current.data).copy_(value)

    def unmerge(self) -> None:
        """Bring back the base weight as it was before the first merge, bit for bit."""
        if not self.merged_adapters:
            warnings.warn(f"{self._label or type(self).__name__}: nothing is merged, so nothing is unmerged.")
            return
        with self._beneath_others():
            if self.quantization_backend is not None:
                self.quantization_backend.restore(self, self._stash)
            else:
                self._restore()
            self.__dict__.update(_stash=None, merged_adapters=[])
            self.__dict__["_plan"] = self._make_plan()
            for layer in self._layers_inside():
                if layer._merged_around is self:
                    layer.__dict__["_merged_around"] = None

    def unmerged_weight(self) -> torch.Tensor:
        """The base weight without any merged adapter, of this layer and of those between it and the base; own layout."""
        stash, layer = self._stash, self.base_layer
        while isinstance(layer, AdapterLayer):  # the innermost was merged first
            stash, layer = stash if layer._stash is None else layer._stash, layer.base_layer
        if stash is None:
            return self.get_base_weight()
        if self.quantization_backend is not None:
            return self.quantization_backend.weight_in(self.get_base_layer(), stash)
        name = "weight" if self.kind is None else self.kind.weight_name
        return stash[name].to(self.weight.device) if name in stash else self.get_base_weight()


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values as they are before others take their place; of a spread tensor, the place itself is written to."""
    return tensor.data.clone() if is_spread(tensor) else tensor.data


def _tensor_at(layer: nn.Module, name: str) -> torch.Tensor:
    tensor: Any = layer
    for part in name.split("."):
        tensor = getattr(tensor, part)
    return tensor


class AdditiveLayer(AdapterLayer):
    """W' = W + Σ scaling · ΔW, added up over the active adapters."""

    def delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter with its scaling, canonical."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW of one adapter with its scaling, in the base weight's own layout.

        Args:
            adapter: a name this layer holds.
        """
        delta = self.delta_weight(adapter)
        return delta if self.kind is None else self.kind.flip(delta)

    def term(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """What one adapter adds to the output, None for nothing; forms ΔW unless the method knows better."""
        delta = self.get_delta_weight(adapter)
        return self.kind.apply(self.get_base_layer(), self._cast_term_input(x, delta.dtype), delta)

    def _cast_term_input(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._cast_input_dtype(x, dtype) if x.is_floating_point() else x

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for adapter in plan:
            term = self.term(x, adapter)
            result = result if term is None else result + term
        return result.to(dtype)

    def mixed_forward(self, x: torch.Tensor, rows: RowGroups, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name, index in rows.items():
            term = self.term(x[index], name)
            if term is not None:
                result = result.index_add(0, index, term.to(result.dtype))
        return result

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        name = self.kind.weight_name
        return {name: self.with_delta(tensors[name], adapter)}

    def with_delta(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """W + ΔW of one adapter, in the base weight's own layout."""
        return weight + self.get_delta_weight(adapter)

    # Conversion to LoRA.

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be turned into a LoRA adapter: where a LoRA layer can represent any ΔW."""
        return self.kind is not None and getattr(self.get_base_layer(), "groups", 1) == 1

    def effective_delta(self, adapter: str) -> torch.Tensor:
        """All that an adapter alone changes about the base weight, canonical: ΔW unless merging does more than add it."""
        return self.delta_weight(adapter)

    def exact_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (r, in, *kernel) and B (out, r) with B·A = ΔW, where the method has them; otherwise ΔW is decomposed."""
        return None

    # Scaling. A method that has `alpha` and a rank says what its scaling starts as.

    _scaling: Scaling

    @property
    def scaling(self) -> Scaling:
        return self._scaling

    @scaling.setter
    def scaling(self, values: dict[str, float]) -> None:
        before = self.__dict__.get("_scaling")
        self.__dict__["_scaling"] = Scaling(values, tensors=None if before is None else before.tensors)

    def _drop(self, adapter_name: str) -> None:
        super()._drop(adapter_name)
        self.scaling.pop(adapter_name, None)

    def initial_scaling(self, adapter: str) -> float:
        """The scaling that an adapter starts with."""
        return 1.0

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times what it started with; unknown names are ignored."""
        if adapter in self.scaling:
            self._set_scaling(adapter, scale * self.initial_scaling(adapter))

    def _set_scaling(self, adapter: str, value: float) -> None:
        current = self.scaling[adapter]
        if torch.is_tensor(current):  # a compiled model is not to notice
            current.fill_(value)
        else:
            self.scaling[adapter] = value

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale == 1:
            return
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self._set_scaling(adapter, self.scaling[adapter] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or set it to what it started as."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                before = self.scaling[adapter]
                self._set_scaling(adapter, self.initial_scaling(adapter) if scale is None else before / scale)


class MultiplicativeLayer(AdapterLayer):
    """W' = f(W): the adapted weight replaces the base weight, applied in the order of activation."""

    def adapted_weight(self, weight: torch.Tensor, adapter: str) -> torch.Tensor:
        """f(W) of one adapter.

        Args:
            weight: canonical, earlier adapters applied.
        """
        raise NotImplementedError

    def adapted_forward(self, x: torch.Tensor, plan: tuple, *args: Any, **kwargs: Any) -> torch.Tensor:
        kind, layer = self.kind, self.get_base_layer()
        tensors = self._tensors_below()
        weight = kind.flip(tensors[kind.weight_name])
        for adapter in plan:
            weight = self.adapted_weight(weight, adapter)
        dtype = x.dtype if x.is_floating_point() else tensors[kind.weight_name].dtype
        # The base layer's own forward with another weight: every subclass, padding mode and option stays its own.
        tensors = {name: tensor.to(weight.dtype) for name, tensor in tensors.items()}
        tensors[kind.weight_name] = kind.flip(weight)
        if x.is_floating_point():
            x = x.to(weight.dtype)
        if self.quantization_backend is not None:
            # The layer's own forward reads the weight in the form it is kept in.
            output = kind.apply(layer, x, tensors[kind.weight_name])
            return (output + tensors[kind.bias_name] if kind.bias_name in tensors else output).to(dtype)
        return kind.call_with(layer, tensors, x, *args, **kwargs).to(dtype)

    def _tensors_below(self) -> dict[str, torch.Tensor]:
        """The base layer's tensors, as the tuner layers between it and this one adapt them."""
        tensors = {**self._other_tensors(), self.kind.weight_name: self.get_base_weight()}
        between, layer = [], self.base_layer
        while isinstance(layer, AdapterLayer):
            between, layer = [layer, *between], layer.base_layer
        for layer in between:
            held = layer._get_available_adapters() if layer.plan else ()
            for adapter in layer.active_adapters:
                if adapter in held:
                    tensors |= layer.fold(tensors, adapter)
        return tensors

    def _other_tensors(self) -> dict[str, torch.Tensor]:
        bias = getattr(self.get_base_layer(), self.kind.bias_name, None)
        return {self.kind.bias_name: bias} if torch.is_tensor(bias) and bias.numel() else {}

    def fold(self, tensors: dict[str, torch.Tensor], adapter: str) -> dict[str, torch.Tensor]:
        name = self.kind.weight_name
        weight = self.kind.flip(tensors[name])
        return {name: self.kind.flip(self.adapted_weight(weight, adapter))}
