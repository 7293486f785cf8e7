"""Putting one adapter into a model, whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..utils.constants import DUMMY_MODEL_CONFIG, DUMMY_TARGET_MODULES
from ..utils.error import NoMatchingPeftModuleError
from ..utils.field_types import check_numbers
from .additional import set_additional_trainable_modules
from .backends import make_trainable
from .layer import deferred_parameters
from .lifecycle import AdapterHolder, holders_of, modules_of, set_trains
from .matching import (
    EXCLUDED,
    TargetMatcher,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    get_pattern_key,
    is_suffix,
    maybe_condense,
    without_hits,
)
from .operations import refresh_biases
from .roster import Roster
from .sharding import gathered, is_sharded, reshard, warn_if_trained
from .tying import check_tied_weights, note_shared_weights
from .undo import Undo

if TYPE_CHECKING:
    from .tuner import BaseTuner


class AdapterConfigs(dict):
    """Configurations by adapter name, as `model.peft_config` holds them.

    Client libraries clean up after a failed injection by popping the adapter's entry; the injection has taken it back
    by then, and their error must stay the one that is seen. So popping a name that is not there gives None.
    """

    def pop(self, name: str, *default: Any) -> Any:
        return super().pop(name, *default) if default else super().pop(name, None)

    def put_back(self, entries: dict[str, Any]) -> None:
        """Hold exactly these entries."""
        self.clear()
        self.update(entries)


class Injection:
    """One adapter being put into one model.

    Args:
        tuner: the method's tuner; its `peft_config` has the adapter's configuration.
        model: the model.
        adapter_name: the adapter.
        low_cpu_mem_usage: make the parameters on the meta device.
        state_dict: target what this adapter state has weights for.
    """

    def __init__(
        self,
        tuner: BaseTuner,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, torch.Tensor] | None,
    ) -> None:
        self.tuner, self.model, self.adapter_name = tuner, model, adapter_name
        self.low_cpu_mem_usage, self.state_dict = low_cpu_mem_usage, state_dict
        self.config = tuner.peft_config[adapter_name]
        self.excluded: list[str] = []
        self.unmatched: list[str] = []
        self.matched: list[str] = []
        self.parameters: list[str] = []
        self.placed: dict[str, AdapterHolder] = {}

    def run(self) -> None:
        """Do it.

        Raises:
            NoMatchingPeftModuleError: nothing was selected. Whatever is raised, the model is as it was.
        """
        tuner, config = self.tuner, self.config
        check_numbers(config)
        reshard(tuner)
        self.sharded = is_sharded(self.model)
        tuner._convert_adapter_config(config, self.model)
        tuner._check_new_adapter_config(config)
        self._check_bias()
        model_config = self.model_config(self.model)
        check_tied_weights(tuner, config, self.model)
        self.config = config = tuner._prepare_adapter_config(config, model_config)
        tuner._prepare_model(config, self.model)
        if self.state_dict is not None and getattr(config, "target_parameters", None):
            raise ValueError(
                "target_parameters cannot be combined with a state_dict: the keys of a file do not say which of a "
                "module's parameters they belong to."
            )
        with Undo() as undo, collection_paused():
            before = dict(holders_of(self.model))
            roster = next(iter(before.values())).roster if before else Roster()
            undo.push(_forget, roster, copy.deepcopy((roster.holders, roster.exclusive, roster.rows)))
            if not before:
                self._freeze_base(undo)
            with deferred_parameters(self.low_cpu_mem_usage):
                self._place(undo)
            self._check_outcome()
            self._join(before, roster)
            wrappers = set_additional_trainable_modules(
                self.model, config, model_config, self.adapter_name, roster=roster, undo=undo
            )
            self._activate(before, wrappers, roster)
            if not config.inference_mode:
                make_trainable(self.model)
        self._report()
        if self.sharded:
            warn_if_trained(self.adapter_name, config)

    # ------------------------------------------------------------------------------------------------------ before placing

    @staticmethod
    def model_config(model: nn.Module) -> dict[str, Any]:
        config = getattr(model, "config", None)
        if config is None:
            return dict(DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config

    def _check_bias(self) -> None:
        bias = getattr(self.config, "bias", "none")
        if bias not in ("none", "all") and not bias.endswith("_only"):
            raise NotImplementedError(
                f"bias={bias!r} of {type(self.config).__name__} is none of 'none', 'all' and '<method>_only'."
            )

    def _freeze_base(self, undo: Undo) -> None:
        # The first adapter freezes the base model; later ones leave the flags of what is there alone.
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        undo.push(_set_all, trainable, True)
        _set_all(trainable, False)

    # ------------------------------------------------------------------------------------------------------------- placing

    def _place(self, undo: Undo) -> None:
        config = self.config
        if getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES:
            return
        _maybe_include_all_linear_layers(config, self.model)
        modules = dict(modules_of(self.model))
        if not getattr(self.tuner, "keeps_target_list", False):
            maybe_condense(config, modules)
        check = self._checker()
        tied = set(getattr(config, "target_modules_to_tie", None) or ())
        # A tied module may be the embedding itself under another name, which is not listed twice.
        modules |= {key: self.model.get_submodule(key) for key in sorted(tied - modules.keys())}
        inside = ""
        for key, module in modules.items():
            if not key or (inside and key.startswith(inside)):
                continue
            if isinstance(module, AdapterHolder):
                inside = f"{key}."
            answer = key in tied or check(key)
            if answer is EXCLUDED or isinstance(answer, _ExcludedModule):
                self.excluded.append(key)
            elif not answer:
                self.unmatched.append(key)
            else:
                inside = f"{key}."
                self.matched.append(key)
        self.tuner._prepare_shared_state(config, self.adapter_name, {key: modules[key] for key in self.matched}, undo)
        # A tied module comes last: it needs the adapter of the embedding that it shares.
        for key in sorted(self.matched, key=tied.__contains__):
            self._place_one(key, modules, undo)
        if getattr(config, "target_parameters", None):
            self._place_parameters(undo)

    def _checker(self) -> Callable[[str], Any]:
        if self.state_dict is not None:
            return self._targets_of_state().__contains__
        tuner_cls = type(self.tuner)
        from .tuner import BaseTuner  # at run time: tuner imports this module

        if tuner_cls._check_target_module_exists is not BaseTuner._check_target_module_exists:
            return lambda key: self.tuner._check_target_module_exists(self.config, key)
        self.matcher = TargetMatcher(self.config)
        return self.matcher.check

    def _targets_of_state(self) -> set[str]:
        marker = f".{self.tuner.prefix}"
        keys = (key.removeprefix("_orig_mod.") for key in self.state_dict)
        names = {key.rsplit(marker, 1)[0] for key in keys if marker in key}
        self._compare_with_config(names)
        return names

    def _compare_with_config(self, names: set[str]) -> None:
        if getattr(self.config, "target_modules", None) is None:
            return
        matcher = TargetMatcher(self.config)
        by_config = {key for key, _ in modules_of(self.model) if key and matcher.check(key) is True}
        if by_config != names:
            warnings.warn(
                "The state_dict and the configuration select different modules; the state_dict is followed. Only in "
                f"the state_dict: {sorted(names - by_config)}. Only in the configuration: {sorted(by_config - names)}.",
                RuntimeWarning,
            )

    def _place_one(
        self, key: str, modules: dict[str, nn.Module], undo: Undo, parameter_name: str | None = None
    ) -> None:
        parent_key, _, name = key.rpartition(".")
        parent = self.model.get_submodule(parent_key)
        target = getattr(parent, name)
        self._guard(parent, name, target, undo)
        self.tuner._check_target_module_compatiblity(self.config, self.model, key)
        extra = {} if parameter_name is None else {"parameter_name": parameter_name}
        with gathered(target) if self.sharded else nullcontext():
            self.tuner._create_and_replace(
                self.config, self.adapter_name, target, name, parent, current_key=key, **extra
            )
        self._note_placed(key, getattr(parent, name))

    def _note_placed(self, key: str, placed: nn.Module) -> None:
        """Remember a new layer, and the layers that it holds itself."""
        if not isinstance(placed, AdapterHolder):
            return
        placed._label = placed._label or key
        self.placed[key] = placed
        inner = placed.base_layer
        if inner._modules:
            for name, holder in holders_of(inner):
                self.placed[f"{key}.base_layer.{name}".rstrip(".")] = holder

    def _guard(self, parent: nn.Module, name: str, target: nn.Module, undo: Undo) -> None:
        undo.push(setattr, parent, name, target)
        if isinstance(target, AdapterHolder) and self.adapter_name not in target._get_available_adapters():
            undo.push(_take_out, target, self.adapter_name)

    def _place_parameters(self, undo: Undo) -> None:
        """Wrap the owner of each parameter that `target_parameters` names; several of one module nest."""
        wanted = sorted(set(self.config.target_parameters))
        found = list(self._matching_parameters(wanted))
        for module_key, parameter_name in found:
            if not module_key:
                raise ValueError(
                    f"The parameter {parameter_name!r} belongs to the root module, which cannot be wrapped. Put the "
                    "model into a module of its own."
                )
            outermost = self.model.get_submodule(module_key)
            if isinstance(outermost, AdapterHolder) and not hasattr(outermost, "parameter_name"):
                raise ValueError(
                    f"{module_key!r} is a target of target_modules already; its parameter {parameter_name!r} cannot be "
                    "targeted as well."
                )
            self._place_one(module_key, {}, undo, parameter_name=parameter_name)
            self.parameters.append(f"{module_key}.{parameter_name}")

    def _matching_parameters(self, wanted: list[str]) -> Iterator[tuple[str, str]]:
        seen: set[str] = set()
        for key, module in self.model.named_modules():
            if isinstance(module, AdapterHolder):
                continue
            plain_key = ".".join(part for part in key.split(".") if part != "base_layer")
            names = [name for name, _ in module.named_parameters(recurse=False)]
            for name in names:
                full = f"{plain_key}.{name}" if plain_key else name
                if full not in seen and any(is_suffix(full, entry) for entry in wanted):
                    seen.add(full)
                    yield plain_key, name

    # -------------------------------------------------------------------------------------------------------- after placing

    def _check_outcome(self) -> None:
        config = self.config
        targets = getattr(config, "target_modules", None)
        if self.matched or self.parameters or targets == DUMMY_TARGET_MODULES:
            self._warn_about_partial_matches()
            return
        cls = type(self.tuner).__name__
        if self.state_dict is not None:
            problem = f"The state_dict has no key of {cls} (a module's name, then {self.tuner.prefix!r}...)."
        elif self.excluded and not self.unmatched:
            problem = "Every module is ruled out by exclude_modules or modules_to_save."
        elif not targets and not getattr(config, "target_parameters", None):
            problem = "target_modules is empty."
        else:
            entries = (
                without_hits(self.matcher.targets, [*self.unmatched, *self.excluded])
                if hasattr(self, "matcher")
                else []
            )
            problem = f"No module matches target_modules: {'; '.join(entries) or targets}."
            if self.excluded:
                problem += f" {len(self.excluded)} modules are ruled out by exclude_modules or modules_to_save."
            if getattr(config, "layers_to_transform", None) is not None:
                problem += (
                    f" layers_to_transform={config.layers_to_transform} and layers_pattern={config.layers_pattern} "
                    "narrow the selection."
                )
        raise NoMatchingPeftModuleError(f"{problem} Nothing was injected for the adapter {self.adapter_name!r}.")

    def _warn_about_partial_matches(self) -> None:
        config = self.config
        if getattr(config, "exclude_modules", None) and not self.excluded:
            warnings.warn(f"exclude_modules={config.exclude_modules} excludes no module.")
        elif getattr(config, "target_modules", None) and not self.matched and self.parameters:
            warnings.warn(
                f"target_modules={config.target_modules} matches no module; only target_parameters did.",
                RuntimeWarning,
            )
        elif getattr(config, "target_parameters", None) and not self.parameters:
            warnings.warn(
                f"target_parameters={config.target_parameters} matches no parameter; only target_modules did.",
                RuntimeWarning,
            )

    def _report(self) -> None:
        """Record what was targeted, and warn about entries that selected nothing."""
        tuner = self.tuner
        tuner.targeted_module_names += [name for name in self.matched if name not in tuner.targeted_module_names]
        tuner.targeted_parameter_names += [
            name for name in self.parameters if name not in tuner.targeted_parameter_names
        ]
        if hasattr(self, "matcher") and self.matched and not self.matcher.targets.pattern:
            # An entry whose modules are ruled out is no misspelling.
            for entry in filter(None, map(self.matcher.targets.find, self.excluded)):
                self.matcher.targets.hits[entry] += 1
            missed = without_hits(self.matcher.targets, [*self.unmatched, *self.matched])
            if missed:
                warnings.warn(f"These entries of target_modules match no module: {'; '.join(missed)}.")
        for attribute in self.config.module_patterns:
            self._warn_about_patterns(attribute)

    def _warn_about_patterns(self, attribute: str) -> None:
        patterns = getattr(self.config, attribute, None) or {}
        if not patterns:
            return
        names, form = self.matched + self.parameters, self.config.pattern_form
        used = {get_pattern_key(patterns, name, form) for name in names}
        for pattern in patterns:
            if pattern not in used and not any(get_pattern_key([pattern], name, form) == pattern for name in names):
                warnings.warn(f"{attribute}: {pattern!r} matches none of the targeted modules.", RuntimeWarning)

    def _join(self, before: dict[str, AdapterHolder], roster: Roster) -> None:
        """Let new layers share the roster, and take the state of the layers there already."""
        known = set(map(id, before.values()))
        peer = next(iter(before.values()), None)
        note_shared_weights(self.model, self.placed.values())
        for name, holder in self.placed.items():
            holder.join_roster(roster, name)
            if id(holder) not in known:
                adopt(holder, peer, self.adapter_name)
        for name, holder in before.items():
            if holder._roster is not roster:
                holder.join_roster(roster, holder._label or name)

    def _activate(self, before: dict[str, AdapterHolder], wrappers: list[AdapterHolder], roster: Roster) -> None:
        """Make the active adapters of the tuner active everywhere; an inactive new one is frozen."""
        tuner, name = self.tuner, self.adapter_name
        bias = getattr(self.config, "bias", "none")
        active = name in tuner.active_adapters
        if active:
            # A re-injected or first adapter: the whole model follows the tuner.
            roster.check(tuner.active_adapters, extra=tuner.peft_config)
        everyone = {id(holder): holder for holder in [*before.values(), *self.placed.values(), *wrappers]}
        for holder in everyone.values():
            if (
                bias != "none"
                and name in holder._get_available_adapters()
                and isinstance(holder, tuner.tuner_layer_cls)
            ):
                holder._trains_bias_of |= {name}
            if active:
                holder.activate(tuner.active_adapters, inference_mode=self.config.inference_mode)
            else:
                if self.config.inference_mode:
                    holder._inference |= {name}
                holder.refresh([name])
        if bias == "all" and active:
            refresh_biases(self.model, tuner.peft_config, tuner.active_adapters, not self.config.inference_mode)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Context without garbage collection: thousands of new modules make it go through the whole model again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def adopt(holder: AdapterHolder, peer: AdapterHolder | None, adapter_name: str) -> None:
    """Give a new holder the state of the model's other holders; the first of all activates its adapter."""
    holder._active_adapter = [adapter_name] if peer is None else list(peer.active_adapters)
    holder._disable_adapters = False if peer is None else peer.disable_adapters
    holder._inference = frozenset() if peer is None else peer._inference


def _set_all(parameters: list[nn.Parameter], flag: bool) -> None:
    for parameter in parameters:
        set_trains(parameter, flag)


def _take_out(holder: AdapterHolder, adapter_name: str) -> None:
    holder.forget(adapter_name)
    holder.refresh(())  # the flags of other adapters are as they were


def _forget(roster: Roster, known: tuple[dict, set, dict]) -> None:
    roster.holders, roster.exclusive, roster.rows = known
