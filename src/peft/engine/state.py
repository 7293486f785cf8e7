"""Adapter weights out of a model and into it.

`AdapterState` knows where each tensor of an adapter lives and what it is called on disk. Reading and writing go through
it; nothing else translates keys.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..utils.naming import near_misses
from ..utils.registry import method
from ..utils.tensors import is_spread, spread_like, whole
from .auxiliary import AuxiliaryTrainingWrapper
from .backends import resolve_quantization_backend
from .layer import BaseTunerLayer
from .lifecycle import Entry, belongs_to_adapter, holders_of, set_merged
from .sharding import FLATTENED, is_flattened, partitions_gathered, reshard, whole_tensors, without_wrappers

BASE_PREFIX = "base_model.model."


@dataclass
class Slot:
    """Where one tensor of an adapter lives, with its full names."""

    live: str
    saved: str
    entry: Entry
    holder: Any
    """The layer, wrapper or tuner that it belongs to."""


@dataclass
class LoadResult:
    """What loading an adapter's weights found."""

    missing: list[str] = field(default_factory=list)
    """Names in memory that the file has nothing for."""
    unexpected: list[str] = field(default_factory=list)
    """Names in the file that the model has no place for."""


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model inside a `PeftModel` or `PeftMixedModel`; the model itself if it is neither."""
    if getattr(model, "is_mixed", False):
        return model.base_model.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def file_name(model: nn.Module, name: str, adapter_name: str) -> str:
    """The name by which an adapter's file knows a module.

    It has neither the layers of other adapters' methods around the module nor what stands between two tuners.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        name: the module's dotted name in it.
        adapter_name: the adapter.
    """
    module: Any = model
    parts = []
    for part in name.split("."):
        foreign = isinstance(module, BaseTunerLayer) and adapter_name not in module._get_available_adapters()
        if not (foreign and part == "base_layer") and part != getattr(type(module), "inner_tuner_name", None):
            parts.append(part)
        module = module._modules.get(part)
    return without_wrappers(".".join(parts))


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Within it, nothing is merged into the base weights; afterwards all that was is, as the adapters are by then.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
    """
    merged = [(holder, holder.merged_adapters) for _, holder in holders_of(model) if holder.merged_adapters]
    # Outermost first, and the other way round afterwards: layers that share a weight are merged on top of each other.
    for holder, _ in merged:
        set_merged(holder, [])
    try:
        yield
    finally:
        for holder, names in reversed(merged):
            set_merged(holder, names)


class AdapterState:
    """The tensors of one adapter in one model.

    Args:
        model: a `PeftModel`, or a model with injected adapters.
        adapter_name: a key of its `peft_config`.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        configs = getattr(model, "peft_config", None) or {}
        if adapter_name not in configs:
            near = near_misses(adapter_name, configs)
            raise KeyError(
                f"There is no adapter {adapter_name!r}; known are {sorted(configs)}."
                + (f" Nearest: {near}." if near else "")
            )
        self.model, self.adapter_name, self.config = model, adapter_name, configs[adapter_name]
        self.tuner_cls = method(self.config.peft_type).model_cls
        self.slots = {slot.saved: slot for slot in self._slots()}

    def _slots(self) -> Iterator[Slot]:
        inside = ""
        for name, holder in holders_of(self.model):
            if inside and name.startswith(inside):
                continue  # a wrapper speaks for what is inside it
            if isinstance(holder, AuxiliaryTrainingWrapper):
                inside = f"{name}."
            yield from self._prefixed(name, holder, holder.state_entries(self.adapter_name))
        tuner = getattr(self.model, "base_model", None)
        if tuner is not None and hasattr(tuner, "shared_state_entries"):
            yield from self._prefixed("base_model", tuner, tuner.shared_state_entries(self.adapter_name))

    def _prefixed(self, name: str, holder: Any, entries: Iterator[Entry]) -> Iterator[Slot]:
        live, saved = (f"{path}." if path else "" for path in (name, file_name(self.model, name, self.adapter_name)))
        for entry in entries:
            yield Slot(live + entry.live, without_wrappers(saved + entry.saved), entry, holder)

    # --------------------------------------------------------------------------------------------------------- reading

    def read(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their names on disk; whole ones, if the model's are spread over processes.

        Args:
            state_dict: take the values from here, by their names in memory, instead of from the model.
        """
        of_base = state_dict is None and getattr(self.config, "bias", "none") != "none"
        with unmerged(self.model) if of_base else nullcontext():  # else biases may be those of what is merged
            return self._read(state_dict)

    def _read(self, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        if state_dict is None and _needs_state_dict(self.model):
            state_dict = self.model.state_dict()
        if state_dict is None:
            state = {slot.saved: slot.entry.tensor for slot in self.slots.values()}
        else:
            state_dict = {without_wrappers(key): value for key, value in state_dict.items()}
            names = {slot.saved: without_wrappers(slot.live) for slot in self.slots.values()}
            state = {saved: state_dict[live] for saved, live in names.items() if live in state_dict}
            state |= {key: slot.entry.tensor for key, slot in self.slots.items() if slot.entry.outside}
        biases = {without_wrappers(name): bias for name, bias in self._biases().items()}
        if state_dict is not None:
            biases = {name: state_dict[name] for name in biases if name in state_dict}
        return self._hook("adapter_state_to_save", whole_tensors(state | biases))

    def _biases(self) -> dict[str, torch.Tensor]:
        bias = getattr(self.config, "bias", "none")
        if bias == "none":
            return {}
        found: dict[str, torch.Tensor] = {}
        if bias == "all":
            for name, parameter in self.model.named_parameters():
                if name.rsplit(".", 1)[-1] == "bias" and not belongs_to_adapter(self.model, name):
                    found[name] = parameter
            return found
        for name, holder in holders_of(self.model):
            if self.adapter_name in holder._get_available_adapters() and not holder.exclusive:
                base_bias = getattr(holder.base_layer, "bias", None)
                if torch.is_tensor(base_bias):
                    found[f"{name}.base_layer.bias"] = base_bias
        return found

    def _hook(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # A method whose file is not the plain list of its tensors says how the two translate.
        hook = getattr(self.tuner_cls, name, None)
        return state if hook is None else hook(self.model, self.config, self.adapter_name, state)

    # --------------------------------------------------------------------------------------------------------- writing

    def write(
        self,
        state: dict[str, torch.Tensor],
        ignore_mismatched_sizes: bool = False,
        assign: bool = False,
        given_away: bool = False,
    ) -> LoadResult:
        """Load the adapter's tensors; everything is checked before a value is written.

        If the adapter is merged, it is so afterwards with its new weights, and unmerging brings back the base's.

        Args:
            state: tensors by their names on disk.
            ignore_mismatched_sizes: leave tensors of another shape out, with a warning, instead of raising.
            assign: make the given tensors the parameters instead of copying their values.
            given_away: nobody else is going to use the given tensors, so that parameters which have no storage yet may
                have theirs.

        Raises:
            RuntimeError: a tensor has another shape than its place.
            ValueError: a tensor has NaN or infinite values.
        """
        reshard(self.model)
        state = {self.file_key(key): whole(value) for key, value in state.items()}
        # A part of a model's own state dict has names in memory instead.
        in_memory = {slot.live: saved for saved, slot in self.slots.items() if saved not in state}
        state = {in_memory.get(key, key): value for key, value in state.items()}
        state = self._hook("adapter_state_to_load", state)
        if is_flattened(self.model):
            with self._apart_from_merged(state):
                return self._write_flattened(state)
        with partitions_gathered(self._targets(state)):
            plan, base, unexpected = self._checked(state, ignore_mismatched_sizes)
        with self._apart_from_merged(state), partitions_gathered(self._targets(state), store=True), torch.no_grad():
            own = _with_own_storage(value for _, value in plan.values()) if given_away else set()
            for slot, value in plan.values():
                _store(slot.entry, value, assign, copy=id(value) not in own)
            for key, value in base.items():
                self._store_in_base(key, value)
        for _, holder in holders_of(self.model):
            holder._plan = holder._make_plan()
        missing = [slot.live for key, slot in self.slots.items() if key not in plan]
        return LoadResult(missing, unexpected)

    def _store_in_base(self, key: str, value: torch.Tensor) -> None:
        path, _, attribute = key.rpartition(".")
        owner, target = self.model.get_submodule(path), _tensor_called(self.model, key)
        backend = resolve_quantization_backend(owner) if attribute == "weight" else None
        if backend is not None:
            backend.write(owner, value.to(backend.get_base_weight(owner).dtype), path)
        else:
            target.data.copy_(spread_like(value, target) if is_spread(target) else value)

    def _apart_from_merged(self, state: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Context in which what the state is loaded into is neither merged nor merged into."""
        names = {name for _, holder in holders_of(self.model) for name in holder.merged_adapters}
        concerned = self.adapter_name in names or (names and not state.keys() <= self.slots.keys())
        return unmerged(self.model) if concerned else nullcontext()

    def _targets(self, state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        own = [slot.entry.tensor for key, slot in self.slots.items() if key in state]
        return own + [tensor for tensor in (_tensor_called(self.model, key) for key in state) if tensor is not None]

    def _checked(
        self, state: dict[str, torch.Tensor], ignore_mismatched_sizes: bool
    ) -> tuple[dict[str, tuple[Slot, torch.Tensor]], dict[str, torch.Tensor], list[str]]:
        """What to load into the adapter, what into the base model, and the names that neither has."""
        plan = {key: (slot, state[key]) for key, slot in self.slots.items() if key in state}
        extra = {key: value for key, value in state.items() if key not in self.slots}
        base, unexpected = self._base_tensors(extra)
        self._check_shapes(plan, base, ignore_mismatched_sizes)
        for key, (slot, value) in plan.items():
            check_dtype(key, value, slot.entry.tensor.dtype)
        for key, (target, value) in base.items():
            check_dtype(key, value, target.dtype)
        check_finite(
            {key: value for key, (_, value) in plan.items()} | {key: value for key, (_, value) in base.items()}
        )
        return plan, {key: value for key, (_, value) in base.items()}, unexpected

    def _write_flattened(self, state: dict[str, torch.Tensor]) -> LoadResult:
        """`write` for FSDP1, whose parameters only its own hooks can load."""
        check_finite(state)
        live = {saved: without_wrappers(slot.live) for saved, slot in self.slots.items()}
        own = {live[key]: value for key, value in state.items() if key in live}
        lost = [live[key] for key in _of_unit_around(self.model, self.slots, state)]
        lost = lost or sorted(self.model.load_state_dict(own, strict=False).unexpected_keys)
        if lost:
            raise RuntimeError(
                f"The weights {lost[:5]} of the adapter {self.adapter_name!r} belong to an FSDP unit around this "
                f"{type(self.model).__name__}. Load them into the FSDP module itself."
            )
        others = {key: value for key, value in state.items() if key not in live}
        unexpected = self.model.load_state_dict(others, strict=False).unexpected_keys if others else []
        return LoadResult([slot.live for saved, slot in self.slots.items() if saved not in state], list(unexpected))

    def file_key(self, key: str) -> str:
        """A name on disk as this model has it: with the wrapper's prefix exactly if the model is wrapped."""
        key = key.removeprefix("_orig_mod.")
        if "lora_magnitude_vector.weight" in key:
            key = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        return key if base_model_of(self.model) is not self.model else key.removeprefix(BASE_PREFIX)

    def _base_tensors(
        self, extra: dict[str, torch.Tensor]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[str]]:
        """Entries that are no adapter's: biases and embeddings of the base model, which a file may hold too.

        A dense weight may go where the model keeps a quantised one. Codes mean nothing with scales of other weights: they
        are only taken if they are those that are there, so that there is nothing to do.
        """
        base: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        unexpected = []
        for key, value in extra.items():
            target = _tensor_called(self.model, key)
            path, _, attribute = key.rpartition(".")
            if target is None:
                unexpected.append(key)
                continue
            owner = self.model.get_submodule(path)
            backend = resolve_quantization_backend(owner) if attribute == "weight" else None
            if backend is not None:
                if _is_as_stored(owner, f"{path}.", extra):
                    continue
                if not backend.supports_merge:
                    raise backend.unwritable(path)
                target = backend.get_base_weight(owner).to("meta")
            base[key] = (target, value)
        return base, unexpected

    def _check_shapes(self, plan: dict, base: dict, ignore: bool) -> None:
        wrong = []
        for group, current in ((plan, lambda item: item.entry.tensor), (base, lambda item: item)):
            for key in list(group):
                expected, found = current(group[key][0]).shape, group[key][1].shape
                if expected != found:
                    wrong.append((key, tuple(expected), tuple(found)))
                    if ignore:
                        del group[key]
        if not wrong:
            return
        lines = "; ".join(f"{key}: expected {expected}, found {found}" for key, expected, found in wrong[:5])
        rest = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        if ignore:
            warnings.warn(
                f"Weights of another shape are left out for the adapter {self.adapter_name!r}: {lines}{rest}."
            )
            return
        raise RuntimeError(
            f"The weights do not fit the adapter {self.adapter_name!r} (size mismatch): {lines}{rest}. Load them with the "
            "configuration they were trained with, or pass ignore_mismatched_sizes=True. Nothing was loaded."
        )


def _of_unit_around(model: nn.Module, slots: dict[str, Slot], state: dict[str, torch.Tensor]) -> Iterator[str]:
    """The names on disk of what FSDP1 keeps a part of in a unit that is not the model's, and does not load into."""
    if FLATTENED in model._modules:
        return
    for key, slot in slots.items():
        if key in state and FLATTENED not in slot.live and slot.entry.tensor.shape != state[key].shape:
            yield key


def _needs_state_dict(model: nn.Module) -> bool:
    # Sharded models (FSDP, DeepSpeed) gather their weights in hooks of state_dict().
    return any(module._state_dict_hooks or module._state_dict_pre_hooks for module in model.modules())


def _is_as_stored(owner: nn.Module, prefix: str, state: dict[str, torch.Tensor]) -> bool:
    """Whether what a state has of a quantised module's weight, scales included, is what the module has."""
    stored = owner.state_dict()
    given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    given.pop("bias", None)
    return all(
        key in stored and torch.is_tensor(stored[key]) and _are_equal(stored[key], value)
        for key, value in given.items()
    )


def _are_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    same_sort = first.dtype == second.dtype and first.shape == second.shape
    return same_sort and torch.equal(first, second.to(first.device))


def _tensor_called(model: nn.Module, key: str) -> torch.Tensor | None:
    path, _, attribute = key.rpartition(".")
    module: Any = model
    for part in path.split(".") if path else ():
        module = module._modules.get(part)
        if module is None:
            return None
    return module._parameters.get(attribute, module._buffers.get(attribute))


def check_dtype(key: str, value: torch.Tensor, expected: torch.dtype) -> None:
    """Refuse a tensor of numbers of another sort: real numbers are not made of whole or complex ones.

    Args:
        key: the name to mention.
        value: the tensor.
        expected: the dtype of its place.

    Raises:
        ValueError: it is of another sort.
    """
    if (value.is_floating_point(), value.is_complex()) != (expected.is_floating_point, expected.is_complex):
        raise ValueError(f"The weight {key!r} is of {value.dtype}, expected {expected}. Nothing was loaded.")


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors with NaN or infinite values.

    Args:
        tensors: by the names to mention.

    Raises:
        ValueError: some have.
    """
    floats = {key: value for key, value in tensors.items() if value.is_floating_point() and value.numel()}
    by_sort: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for key, value in floats.items():
        if value.device.type != "meta" and value.dtype.itemsize > 1:
            by_sort.setdefault((value.dtype, value.device), []).append(key)
    for keys in by_sort.values():
        norms = torch.stack(torch._foreach_norm([floats[key].detach() for key in keys], float("inf")))
        bad = [key for key, finite in zip(keys, torch.isfinite(norms).tolist()) if not finite]
        if bad:
            raise ValueError(f"The weights {bad[:5]} have NaN or infinite values. Nothing was loaded.")


def _with_own_storage(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The ids of those tensors that fill a storage of their own, from its start to its end."""
    found = [tensor for tensor in tensors if not is_spread(tensor)]
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in found)
    return {
        id(tensor)
        for tensor in found
        if tensor.is_contiguous()
        and users[tensor.untyped_storage().data_ptr()] == 1
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    }


def _store(entry: Entry, value: torch.Tensor, assign: bool, copy: bool = True) -> None:
    current = entry.tensor
    if is_spread(current):
        value = spread_like(value, current)
        assign = assign and current.is_meta  # whoever spread the others keeps them too
    if not assign and not current.is_meta:
        current.data.copy_(value)
        return
    # A meta tensor has the dtype that the adapter is to have; the value decides the device, unless moved later.
    dtype = current.dtype if current.is_meta and not assign else value.dtype
    fresh = value.to(dtype) if assign else value.detach().to(dtype, copy=copy)
    if isinstance(current, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=current.requires_grad)
    owner = entry.owner
    (owner._parameters if entry.attribute in owner._parameters else owner._buffers)[entry.attribute] = fresh
