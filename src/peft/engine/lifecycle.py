"""The life cycle of adapters on one module: which it holds, which are active, enabled, merged, and which train.

`AdapterHolder` is the base of tuner layers and of the auxiliary wrappers alike. Every transition (add, set, enable,
disable, delete, merge) ends in `refresh`, the one place where the library decides about `requires_grad`.

What all holders of a model know in common is in its `Roster`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .offload import onload_layer
from .roster import Roster


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter: its names in memory and on disk (relative to the holder), and where it is kept."""

    live: str
    saved: str
    owner: nn.Module
    attribute: str
    outside: bool = False
    """Whether the model does not register the tensor, so that its `state_dict` lacks it."""

    @property
    def tensor(self) -> torch.Tensor:
        owner = self.owner
        return (
            owner._parameters[self.attribute]
            if self.attribute in owner._parameters
            else owner._buffers[self.attribute]
        )

    def saved_as(self, name: str) -> Entry:
        return replace(self, saved=name)


def entries_of(container: nn.Module, name: str, adapter: str) -> Iterator[Entry]:
    """The tensors that a container of a holder keeps for an adapter.

    Args:
        container: a ModuleDict, ParameterDict or BufferDict.
        name: the container's name in the holder.
        adapter: a key of it.
    """
    entry = container[adapter]
    if not isinstance(entry, nn.Module):
        yield Entry(f"{name}.{adapter}", name, container, adapter)
        return
    for path, module in entry.named_modules():
        for attribute in [*module._parameters, *module._buffers]:
            tensor = module._parameters.get(attribute, module._buffers.get(attribute))
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                # FSDP1 makes one parameter of several, which knows their names.
                for part in getattr(tensor, "_fqns", (attribute,)):
                    inner = f"{path}.{part}" if path else part
                    yield Entry(f"{name}.{adapter}.{inner}", f"{name}.{inner}", module, attribute)


def _existing(module: Any, name: str) -> Any:
    """The attribute of that dotted name, None if there is none (yet)."""
    found = module._modules.get(name)
    if found is not None:
        return found
    for part in name.split("."):
        if module is None:
            return None
        found = module.__dict__.get(part)
        module = module._modules.get(part) if found is None else found
    return module


def as_names(adapter_names: str | Iterable[str]) -> list[str]:
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


def parameters_of(entry: Any) -> Iterator[nn.Parameter]:
    """The parameters of one adapter's entry in a container: of a module, or the entry itself."""
    if isinstance(entry, nn.Module):
        if entry._modules:
            yield from entry.parameters()
        else:
            yield from (parameter for parameter in entry._parameters.values() if parameter is not None)
    elif isinstance(entry, nn.Parameter):
        yield entry


def set_trains(parameter: torch.Tensor, flag: bool) -> None:
    # A non-leaf (sharded view) follows the tensor it was made from; integer tensors cannot train.
    if parameter.requires_grad != flag and parameter.is_leaf and (parameter.is_floating_point() or not flag):
        parameter.requires_grad_(flag)


BEFORE_DISABLING = "_trained_before_disabling"


def flag_before_disabling(parameter: nn.Parameter) -> bool:
    """Whether a parameter trained before the first of the holders that share it was disabled."""
    return parameter.__dict__.setdefault(BEFORE_DISABLING, parameter.requires_grad)


class AdapterHolder:
    """A module with any number of named adapters, of which some are active.

    A mixin beside `nn.Module`. State: `_active_adapter` (ordered names), `_disable_adapters`, `merged_adapters`, the
    names in inference mode, and the roster it shares with the other holders of its model.
    """

    adapter_layer_names: tuple[str, ...] = ()
    """Attributes keyed by adapter name that hold weights."""
    other_param_names: tuple[str, ...] = ()
    """Further attributes keyed by adapter name."""
    frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
    """Adapter name -> containers whose tensors never train for it."""
    inner_modules: tuple[str, ...] = ("base_layer", "original_module", "token_adapter")
    """Submodules that are of the base model, or lead to what is; all others are adapters'."""
    exclusive = False
    """Whether one adapter replaces the module as a whole, so that two cannot be active together."""
    cast_input_dtype_enabled = True

    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    merged_adapters: list[str] = []

    _inference: frozenset[str] = frozenset()
    _flags_before_disabling: dict[tuple[str, str, int], bool] | None = None
    _merged_before_disabling: tuple[tuple[str, ...], bool] | None = None
    _trains_bias_of: frozenset[str] = frozenset()
    _roster: Roster | None = None
    _label: str = ""
    _plan: tuple | None = None
    _held: frozenset[str] | None = None

    # ------------------------------------------------------------------------------------------ what the module holds

    @property
    def roster(self) -> Roster:
        if self._roster is None:
            self._roster = Roster()
            self._join_as_is()
        return self._roster

    def join_roster(self, roster: Roster, label: str) -> None:
        """Become one of the holders of a model, under the module's dotted name there."""
        self._roster, self._label = roster, label
        self._join_as_is()

    def _join_as_is(self) -> None:
        for name in self._get_available_adapters():
            self._roster.join(name, self._label, self.exclusive, self.rows_of(name))

    def rows_of(self, adapter_name: str) -> Iterable[int]:
        """The rows of a table that an adapter replaces here, of which each can be only one adapter's."""
        return ()

    def adapter_containers(self) -> Iterator[tuple[str, Any]]:
        """Dotted name and object of each attribute that holds adapter weights."""
        for name in self.adapter_layer_names:
            container = _existing(self, name)
            if container is not None:
                yield name, container

    @property
    def containers(self) -> tuple[str, ...]:
        """The attributes that hold what adapters brought."""
        return self.adapter_layer_names + self.other_param_names

    def adapter_parameters(
        self, adapter_names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, str, int, nn.Parameter]]:
        """Adapter, container, index and parameter, of all adapters or of those named."""
        wanted = None if adapter_names is None else set(adapter_names)
        for container_name, container in self.adapter_containers():
            for adapter in list(container.keys()):
                if wanted is None or adapter in wanted:
                    for index, parameter in enumerate(parameters_of(container[adapter])):
                        yield adapter, container_name, index, parameter

    def state_entries(self, adapter: str) -> Iterator[Entry]:
        """The tensors that are saved for an adapter; none if the module does not hold it."""
        for name, container in self.adapter_containers():
            if isinstance(container, nn.Module) and adapter in container:
                yield from entries_of(container, name, adapter)

    def _get_available_adapters(self) -> set[str]:
        return {adapter for _, container in self.adapter_containers() for adapter in container.keys()}

    def _all_available_adapter_names(self) -> list[str]:
        names: set[str] = set()
        for attribute in self.adapter_layer_names + self.other_param_names:
            keyed = _existing(self, attribute)
            if hasattr(keyed, "keys"):
                names.update(keyed.keys())
        return sorted(names | self._get_available_adapters())

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return as_names(self._active_adapter)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def r(self) -> dict[str, int | None]:
        """Rank by adapter name; clients count its entries to find a free name."""
        ranks = self.__dict__.get("_ranks")
        return dict.fromkeys(sorted(self.roster.holders)) if ranks is None else ranks

    @r.setter
    def r(self, ranks: dict[str, int]) -> None:
        self.__dict__["_ranks"] = ranks

    # -------------------------------------------------------------------------------------------------- the one place

    def trains(self, adapter: str, container: str) -> bool:
        """Whether the tensors of an adapter in a container require grad, by the state of this module."""
        return (
            not self._disable_adapters
            and adapter in self.active_adapters
            and adapter not in self._inference
            and container not in self.frozen_peft_weight_names.get(adapter, ())
        )

    def refresh(self, adapter_names: Iterable[str] | None = None) -> None:
        """Make `requires_grad` and the plan of the forward agree with the state.

        Args:
            adapter_names: the adapters to look at; all by default.
        """
        decided: dict[tuple[str, str], bool] = {}
        for adapter, container, _, parameter in self.adapter_parameters(adapter_names):
            flag = decided.get((adapter, container))
            if flag is None:
                flag = decided[adapter, container] = self.trains(adapter, container)
            set_trains(parameter, flag)
        for parameter in self.bias_parameters():
            set_trains(parameter, any(self.trains(adapter, "bias") for adapter in self._trains_bias_of))
        self.__dict__["_held"] = None
        self.__dict__["_plan"] = self._make_plan()

    def bias_parameters(self) -> Iterator[nn.Parameter]:
        """The base module's bias, if the `bias` option of an adapter asked for it."""
        bias = getattr(self.get_base_layer(), "bias", None) if self._trains_bias_of else None
        if isinstance(bias, nn.Parameter):
            yield bias

    def _make_plan(self) -> tuple:
        """What the forward goes through: the active adapters that this module holds, none while disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return ()
        held = self.held
        return tuple(name for name in self.active_adapters if name in held)

    @property
    def held(self) -> frozenset[str]:
        """The adapters of which this module has weights."""
        if self._held is None:
            self.__dict__["_held"] = frozenset(self._get_available_adapters())
        return self._held

    @property
    def plan(self) -> tuple:
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    # ------------------------------------------------------------------------------------------------------ transitions

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, and exactly their weights trainable.

        An adapter in inference mode that is active already stays in it: a client that activates what it has just
        injected for inference does not ask to train it.

        A pipeline of several models sends the same list of names to each. Those of them that are adapters of other
        models do nothing here.

        Args:
            adapter_names: one name or several; none for the base module's own behaviour.
            inference_mode: use them, but train nothing.

        Raises:
            ValueError: an unknown name or adapters that exclude each other; nothing is changed.
        """
        names = as_names(adapter_names)
        elsewhere = set() if isinstance(adapter_names, str) else self.roster.elsewhere(names)
        self.roster.check(names, extra=elsewhere.union(self.active_adapters))
        keeps_inference = not inference_mode and names == self.active_adapters and self._inference.issuperset(names)
        self.activate(names, inference_mode or (keeps_inference and bool(names)))

    def activate(self, adapter_names: list[str], inference_mode: bool = False) -> None:
        """`set_adapter` without its checks, for callers that have made them for the whole model."""
        if self.merged_adapters:
            warnings.warn(
                f"The adapters {self.merged_adapters} are merged into {self._label or type(self).__name__}; they are "
                "unmerged before others are activated."
            )
            with onload_layer(self):
                self.unmerge()
        changed = frozenset(adapter_names)
        # Past Module.__setattr__: this is done for every layer of a model at each switch.
        self.__dict__.update(
            _inference=self._inference | changed if inference_mode else self._inference - changed,
            _active_adapter=list(adapter_names),
            _flags_before_disabling=None,
            _merged_before_disabling=None,
        )
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active adapters, or the base module alone.

        Disabling freezes every adapter tensor and takes merged weights out; enabling brings back what trained before,
        including what the user froze by hand, and merges again what was merged.

        Args:
            enabled: the state to be in; being in it already changes nothing.
        """
        if enabled != self._disable_adapters:
            return
        if enabled:
            self._enable()
        else:
            self._disable()

    def _disable(self) -> None:
        self._flags_before_disabling = {key: flag_before_disabling(parameter) for key, parameter in self._flagged()}
        if self.merged_adapters:
            self._merged_before_disabling = (tuple(self.merged_adapters), False)
            with onload_layer(self):
                self.unmerge()
        self._disable_adapters = True
        self.refresh()

    def _flagged(self) -> Iterator[tuple[tuple[str, str, int], nn.Parameter]]:
        """What trains by way of this module: adapter, container and index (no adapter for the base's bias), parameter."""
        for *key, parameter in self.adapter_parameters():
            yield tuple(key), parameter
        for index, parameter in enumerate(self.bias_parameters()):
            yield ("", "bias", index), parameter

    def _enable(self) -> None:
        flags, self._flags_before_disabling = self._flags_before_disabling or {}, None
        merged, self._merged_before_disabling = self._merged_before_disabling, None
        self._disable_adapters = False
        self.refresh()
        for key, parameter in self._flagged():
            set_trains(parameter, flags.get(key, parameter.requires_grad))
            parameter.__dict__.pop(BEFORE_DISABLING, None)
        if merged is not None:
            with onload_layer(self):
                self.merge(adapter_names=list(merged[0]))

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Set the flag of all weights of these adapters by hand; names that the module does not hold are ignored."""
        for _, _, _, parameter in self.adapter_parameters(as_names(adapter_names)):
            set_trains(parameter, requires_grad)
        if not requires_grad:
            return
        for name in as_names(adapter_names):
            self._freeze_non_trainable_peft_weights([name])

    def declare_frozen(self, adapter_name: str, *containers: str) -> None:
        """Declare that the tensors that some containers have of an adapter do not train, from now on."""
        declared = self.frozen_peft_weight_names.get(adapter_name, ())
        names = (*declared, *(name for name in containers if name not in declared))
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: names}
        self._freeze_non_trainable_peft_weights([adapter_name])

    def _freeze_non_trainable_peft_weights(self, adapter_names: list[str] | None = None) -> None:
        for adapter, container, _, parameter in self.adapter_parameters(adapter_names):
            if container in self.frozen_peft_weight_names.get(adapter, ()):
                set_trains(parameter, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove every tensor of an adapter from this module.

        If it was active, the other active adapters stay; without any, the first one that the model knows becomes
        active, the same in all its modules; without any, the module behaves as its base.
        """
        was_active = adapter_name in self.active_adapters
        active = self.roster.fallback(self.active_adapters, adapter_name) if was_active else self.active_adapters
        if adapter_name in self.merged_adapters or (was_active and self.merged_adapters):
            with onload_layer(self):
                self.unmerge()
        if was_active and active and active != [n for n in self.active_adapters if n != adapter_name]:
            warnings.warn(f"The active adapter {adapter_name!r} was deleted; {active[0]!r} becomes the active one.")
        succeeding = set(active).difference(self.active_adapters)
        self.forget(adapter_name)
        self.roster.leave(adapter_name, self._label)
        if was_active:
            self._active_adapter = active
        self._flags_before_disabling = {
            key: flag for key, flag in (self._flags_before_disabling or {}).items() if key[0] not in succeeding
        } or None
        self.refresh(succeeding)

    def forget(self, adapter_name: str) -> None:
        """Drop all that this module has of an adapter, the active one or not; `refresh` is yet to be called."""
        self._drop(adapter_name)
        self._inference -= {adapter_name}
        if self._trains_bias_of == {adapter_name}:
            for parameter in self.bias_parameters():
                set_trains(parameter, False)
        self._trains_bias_of -= {adapter_name}
        self.frozen_peft_weight_names = {k: v for k, v in self.frozen_peft_weight_names.items() if k != adapter_name}
        flags, merged = self._flags_before_disabling, self._merged_before_disabling
        self._flags_before_disabling = flags and {key: flag for key, flag in flags.items() if key[0] != adapter_name}
        if merged is not None and adapter_name in merged[0]:
            names = tuple(name for name in merged[0] if name != adapter_name)
            self._merged_before_disabling = (names, merged[1]) if names else None

    def _drop(self, adapter_name: str) -> None:
        for attribute in self.adapter_layer_names + self.other_param_names:
            keyed = _existing(self, attribute)
            if keyed is not None and adapter_name in keyed:
                del keyed[adapter_name]
        self.r.pop(adapter_name, None)

    # ------------------------------------------------------------------- what clients call on every holder, and parts

    def get_base_layer(self) -> nn.Module:
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(f"{type(self).__name__} cannot be merged into its base module.")

    def unmerge(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} cannot be merged, so there is nothing to unmerge.")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Nothing to scale here: only an additive term has a scale."""

    def scale_layer(self, scale: float) -> None:
        """Nothing to scale here: only an additive term has a scale."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Nothing to scale here: only an additive term has a scale."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be turned into a LoRA adapter."""
        return False


def set_merged(holder: AdapterHolder, adapter_names: list[str]) -> None:
    """Merge or unmerge until exactly these adapters are merged, in this order.

    Args:
        holder: a tuner layer or wrapper.
        adapter_names: what is to be merged into its base module.
    """
    if holder.merged_adapters == adapter_names:
        return
    with onload_layer(holder):
        if holder.merged_adapters:
            holder.unmerge()
        if adapter_names:
            holder.merge(adapter_names=adapter_names)


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted name and module of a model and of everything in it but what adapters brought, outermost first.

    A module that is there under several names comes once. What adapters brought holds no adapters itself, and would make
    each walk longer by every adapter.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        own = module.containers if isinstance(module, AdapterHolder) else ()
        prefix = f"{name}." if name else ""
        children = [
            (prefix + key, child) for key, child in module._modules.items() if child is not None and key not in own
        ]
        stack.extend(reversed(children))


def holders_of(model: nn.Module) -> Iterator[tuple[str, AdapterHolder]]:
    """Dotted name and module of everything in a model that holds adapters, outermost first."""
    return ((name, module) for name, module in modules_of(model) if isinstance(module, AdapterHolder))


def roster_of(model: nn.Module) -> Roster:
    """The roster that a model's holders share; a fresh one if it has none yet."""
    return next((holder.roster for _, holder in holders_of(model)), None) or Roster()


def belongs_to_adapter(model: nn.Module, name: str) -> bool:
    """Whether the tensor of that dotted name is an adapter's, and not the base model's."""
    module: Any = model
    for part in name.split(".")[:-1]:
        if isinstance(module, AdapterHolder) and part not in module.inner_modules:
            return True
        module = module._modules.get(part)
        if module is None:  # a packed weight comes with tensors of its own, as in "weight.absmax"
            return False
    return isinstance(module, AdapterHolder)
