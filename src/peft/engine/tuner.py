"""The tuner: one model with its adapters of one method, and the operations over all of its layers.

A method's tuner declares `prefix`, `tuner_layer_cls`, `target_module_mapping`, `layer_classes` (which layer class wraps
which kind of base layer) and `layer_options` (what its configuration says about one layer).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from ..utils.forwarding import ForwardsAttributes
from ..utils.naming import check_adapter_name
from ..utils.registry import METHODS
from .backends import QuantizationBackend, make_trainable, resolve_quantization_backend
from .calls import MixedBatch
from .injection import AdapterConfigs, Injection
from .kinds import kind_of
from .layer import AdapterLayer, BaseTunerLayer
from .lifecycle import AdapterHolder, as_names, holders_of, set_merged
from .matching import TargetMatcher, _ExcludedModule
from .offload import onload_layer
from .operations import (
    cast_holders,
    check_mixed_batch,
    check_one_name_per_row,
    enable_biases,
    refresh_biases,
    uses_checkpointing,
)
from .roster import Roster
from .sharding import check_deletable, check_merges_alone, reshard
from .undo import Undo
from .unloading import TiedEmbeddings, places_of, unloaded


class BaseTuner(ForwardsAttributes, nn.Module):
    """Injects the adapters of a method into a model and steers them.

    Attributes that the tuner does not have are the model's.

    Args:
        model: the model to adapt, in place.
        peft_config: the configuration of the adapter, or a dictionary of configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device, to be loaded afterwards.
        state_dict: target what this adapter state has weights for, instead of what the configuration selects.
    """

    forwards_to = "model"
    prefix: ClassVar[str]
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]] = BaseTunerLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {}
    uses_shared_state: ClassVar[bool] = False
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = {}
    """Kind name -> layer class; the key "any" stands for every module."""
    quantized_layer_classes: ClassVar[dict[tuple[str, str], type[AdapterLayer]]] = {}
    """Weight backend and kind name -> layer class, where clients know one by a name of its own."""
    special_forward_args: ClassVar[tuple[str, ...]] = ()
    """Keywords of the model's forward and generate that are for the layers, not for the base model."""
    unsupported_error: ClassVar[type[Exception]] = TypeError
    """What is raised for a target that no layer class fits."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_adapter_name(adapter_name)
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        with Undo() as undo:
            self.peft_config = self._join_configs(model, configs, undo)
            self.active_adapter: str | list[str] = [adapter_name]
            self._pre_injection_hook(self.model, self.peft_config[adapter_name], adapter_name)
            self.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
            self._post_injection_hook(self.model, self.peft_config[adapter_name], adapter_name)
        self.model.peft_config = self.peft_config

    def _join_configs(self, model: nn.Module, configs: dict[str, Any], undo: Undo) -> AdapterConfigs:
        existing = getattr(model, "peft_config", None)
        if not existing:
            return AdapterConfigs(configs)
        taken = sorted(set(existing) & set(configs))
        warnings.warn(
            f"The model carries adapters already: {sorted(existing)}. "
            + (f"{taken} will be made anew." if taken else f"{sorted(configs)} will be added to them.")
        )
        joined = existing if isinstance(existing, AdapterConfigs) else AdapterConfigs(existing)
        undo.push(joined.put_back, dict(joined))
        joined.update(configs)
        return joined

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        return as_names(self.active_adapter)

    # ---------------------------------------------------------------------------------------- what a method may override

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Called before an adapter is injected, with nothing changed yet."""

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Called when an adapter has been injected."""

    def _convert_adapter_config(self, peft_config: Any, model: nn.Module) -> None:
        """Rewrite a configuration (in place) that names modules of an older form of this architecture."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Change the model's structure before its modules are matched."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Fill in the targets that the method has for this type of model.

        Raises:
            ValueError: no targets given, and none known for the type.
        """
        if peft_config.target_modules is None and getattr(peft_config, "target_parameters", None) is None:
            model_type = model_config.get("model_type")
            targets = self.target_module_mapping.get(model_type)
            if targets is None:
                raise ValueError(
                    f"target_modules is not set, and {type(peft_config).__name__} has no default for the model type "
                    f"{model_type!r}. Name the modules to adapt, or use target_modules='all-linear'."
                )
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        return peft_config

    @classmethod
    def check_file(cls, config: Any, state: dict[str, torch.Tensor]) -> None:
        """Raise if a file's tensors are of other sizes than its configuration says; for what is not found out cheaply.

        An adapter to be loaded is made without storage and then compared with the file. Here is the place for sizes of
        what has storage all the same.

        Args:
            config: the adapter's configuration.
            state: the file's tensors.

        Raises:
            RuntimeError: they are.
        """

    def _check_new_adapter_config(self, config: Any) -> None:
        """Raise unless the configuration goes with those of the adapters there already.

        Raises:
            ValueError: a second adapter with a `bias` other than "none".
        """
        biased = [name for name, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"]
        if len(biased) > 1 and getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"{type(self).__name__} supports one adapter that trains biases, since they are trained in place; of "
                f"{biased} set bias='none' for all but one, got bias={config.bias!r}."
            )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool | _ExcludedModule:
        """Whether a module is a target; overriding it replaces the compiled matcher."""
        return TargetMatcher(peft_config).check(key)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Raise if this architecture breaks when that module is adapted."""

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Keep copies of tied modules tied; a method that cannot says so."""
        warnings.warn(f"{type(self).__name__} cannot keep copies of tied modules tied: {tied_weight_keys}.")

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Keep adapters of tied modules tied; a method that cannot says so."""
        warnings.warn(f"{type(self).__name__} cannot keep adapters of tied modules tied: {tied_weight_keys}.")

    def _prepare_shared_state(self, config: Any, adapter_name: str, targets: dict[str, nn.Module], undo: Undo) -> None:
        """Make what all layers of an adapter share, before they are made.

        Args:
            config: the adapter's configuration, its targets resolved.
            adapter_name: the adapter.
            targets: the selected modules by name, adapted already or not.
            undo: where to leave word how to take changes back.
        """

    def layer_options(self, config: Any, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        """Keyword arguments of the layer's constructor and `update_layer` that depend on the module, such as its rank."""
        return {}

    def _layer_class(
        self, base: nn.Module, config: Any, backend: QuantizationBackend | None = None
    ) -> type[AdapterLayer] | None:
        kind = kind_of(base)
        if backend is not None:
            name = backend.layer_type if kind is None else kind.name
            return self.quantized_layer_classes.get((backend.backend_name, name)) or self.layer_classes.get(name)
        if kind is not None and kind.name in self.layer_classes:
            return self.layer_classes[kind.name]
        return self.layer_classes.get("any")

    def _create_new_module(self, config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
        """The layer that takes the place of a target.

        Raises:
            Exception: `unsupported_error`, for a target that the method cannot adapt.
        """
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = resolve_quantization_backend(base, **self._quantization_options())
        layer_cls = self._layer_class(base, config, backend)
        if layer_cls is None:
            raise self.unsupported_error(
                f"{type(self).__name__} cannot adapt {options.get('target_name') or 'the target'}: it is a "
                f"{type(base).__name__}, and supported are {', '.join(sorted(self.layer_classes))}."
            )
        if backend is not None:
            options["quantization_backend"] = backend
        _correct_fan_in_fan_out(config, base)
        options[layer_cls.config_argument] = config
        return layer_cls(target, adapter_name=adapter_name, **options)

    def _quantization_options(self) -> dict[str, Any]:
        return {"model": self.model}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Give a target the adapter: wrap it, or add to the layer that it is already."""
        options = self.layer_options(peft_config, adapter_name, current_key, target)
        if self._owns(target):
            target.update_layer(adapter_name, config=peft_config, **options)
        else:
            new_module = self._create_new_module(peft_config, adapter_name, target, **options)
            self._replace_module(parent, target_name, new_module, target)

    def _owns(self, module: nn.Module) -> bool:
        """Whether a module is a layer of this method, and not of one whose layers derive from this method's."""
        derived = (getattr(entry.model_cls, "tuner_layer_cls", None) for entry in METHODS.values())
        return isinstance(module, self.tuner_layer_cls) and not any(
            isinstance(module, cls) and issubclass(cls, self.tuner_layer_cls) and cls is not self.tuner_layer_cls
            for cls in derived
            if cls is not None
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of the module that it wraps."""
        setattr(parent, child_name, new_module)
        if not child.training:  # a new module is in training mode
            new_module.train(False)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Context in which the layers know what a call gives them: `adapter_names` and `special_forward_args`."""
        given = {name: kwargs[name] for name in self.special_forward_args if kwargs.get(name) is not None}
        if not given and kwargs.get("adapter_names") is None:
            return nullcontext()  # torch 2.6 cannot compile one that is written as a generator
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is not None:
            check_one_name_per_row(adapter_names, args, kwargs)
        return self.call_inputs(adapter_names, **given)

    # ---------------------------------------------------------------------------------------------------------- injection

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a dictionary; `{"model_type": "custom"}` for a model without one."""
        return Injection.model_config(model)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put the adapter of that name into the model; `peft_config` has its configuration already.

        Args:
            model: the model to change.
            adapter_name: a key of `peft_config`.
            autocast_adapter_dtype: of no effect here; see `cast_adapter_dtype`.
            low_cpu_mem_usage: make the parameters on the meta device, to be loaded afterwards.
            state_dict: target what this adapter state has weights for.

        Raises:
            NoMatchingPeftModuleError: nothing was selected. Whatever is raised, the model is as it was.
        """
        with Undo() as undo:
            undo.push(self._set_structure, list(self.targeted_module_names), list(self.targeted_parameter_names))
            Injection(self, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict).run()
        self.__dict__.pop("_holders", None)

    def _set_structure(self, modules: list[str], parameters: list[str]) -> None:
        """Go back to what was targeted; which layers there are is found out anew."""
        self.targeted_module_names, self.targeted_parameter_names = modules, parameters
        self.__dict__.pop("_holders", None)

    # ------------------------------------------------------------------------------------------------------ all the layers

    @property
    def holders(self) -> list[tuple[str, AdapterHolder]]:
        """Name and module of every tuner layer and wrapper, found once and remembered until the structure changes."""
        if "_holders" not in self.__dict__:
            self.__dict__["_holders"] = list(holders_of(self.model))
        return self.__dict__["_holders"]

    @property
    def roster(self) -> Roster:
        return self.holders[0][1].roster if self.holders else Roster()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones everywhere, and exactly their weights trainable.

        Args:
            adapter_name: one name or several.
            inference_mode: use them, but train nothing.

        Raises:
            ValueError: an unknown name, or adapters that exclude each other; nothing is changed.
        """
        names = as_names(adapter_name)
        self.roster.check(names, extra=self.peft_config)
        reshard(self)
        for _, holder in self.holders:
            holder.activate(names, inference_mode)
        self.active_adapter = adapter_name
        refresh_biases(self.model, self.peft_config, names, enabled=not inference_mode)
        if not inference_mode:
            make_trainable(self.model)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Set the flag of all weights of these adapters by hand."""
        reshard(self)
        for _, holder in self.holders:
            holder.set_requires_grad(adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Use the active adapters again, and train what trained before."""
        reshard(self)
        for _, holder in self.holders:
            holder.enable_adapters(True)
        enable_biases(self.model, self.peft_config, self.active_adapters, enabled=True)

    def disable_adapter_layers(self) -> None:
        """Use the base model alone; nothing trains."""
        for name in self.active_adapters:
            bias = getattr(self.peft_config.get(name), "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"The adapter {name!r} trains biases in place (bias={bias!r}); with it disabled the output is not "
                    "the base model's, since the biases stay as trained."
                )
        reshard(self)
        for _, holder in self.holders:
            holder.enable_adapters(False)
        enable_biases(self.model, self.peft_config, self.active_adapters, enabled=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with all its weights.

        Raises:
            ValueError: an unknown name, or it is merged into some layer.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}; known are {sorted(self.peft_config)}.")
        merged = [name for name, holder in self.holders if adapter_name in holder.merged_adapters]
        if merged:
            raise ValueError(
                f"The adapter {adapter_name!r} is merged (into {merged[0]} and {len(merged) - 1} others) and cannot be "
                "deleted. Call unmerge_adapter() first."
            )
        check_deletable(adapter_name, self.holders)
        refresh_biases(self.model, {adapter_name: self.peft_config[adapter_name]}, [], enabled=False)
        del self.peft_config[adapter_name]
        for _, holder in self.holders:
            holder.delete_adapter(adapter_name)
        self.active_adapter = self.holders[0][1].active_adapters if self.holders else []

    @contextmanager
    def call_inputs(self, adapter_names: list[str] | None = None, **inputs: Any) -> Iterator[None]:
        """Context of one call of the model, in which its layers know what the call gives them.

        Args:
            adapter_names: the adapter of each row, `"__base__"` for the base model; None for an ordinary batch.
            inputs: what the layers ask for by `call_input(name)`.

        Raises:
            ValueError: `adapter_names` in training mode, or an unknown name.
        """
        if adapter_names is None and not inputs:
            yield
            return
        roster = self.roster
        if adapter_names is not None:
            check_mixed_batch(self.model, roster, adapter_names)
        before = roster.batch, roster.inputs.current
        roster.batch = roster.batch if adapter_names is None else MixedBatch(list(adapter_names))
        if inputs:
            roster.inputs.current = inputs
            if torch.is_grad_enabled() and uses_checkpointing(self.model):
                roster.inputs.remember(inputs)
        try:
            yield
        finally:
            roster.batch, roster.inputs.current = before

    # ------------------------------------------------------------------------------------------------------------ merging

    def _check_merge_allowed(self) -> None:
        """Raise or warn if this model must not have its adapters merged."""
        config = self.get_model_config(self.model)
        leaves = {name.rsplit(".", 1)[-1] for name in self.targeted_module_names}
        if config.get("tie_word_embeddings") and leaves & {"embed_tokens", "lm_head"}:
            warnings.warn(
                "The model ties its word embeddings and one of them is adapted: merging changes one of the two, so "
                "that they are not tied afterwards."
            )

    def _check_names_to_merge(self, adapter_names: list[str] | None) -> None:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list, got {adapter_names!r}; pass [{adapter_names!r}].")
        self.roster.check_known(adapter_names or (), extra=self.peft_config)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights; `unmerge_adapter` brings these back bit for bit.

        Args:
            adapter_names: which adapters; the active ones by default.
            safe_merge: check the results for NaN and infinity.

        Raises:
            ValueError: an unknown name, or with `safe_merge` a result is not finite. Whatever is raised, the model is
                as it was.
        """
        self._check_names_to_merge(adapter_names)
        self._check_merge_allowed()
        reshard(self)
        check_merges_alone(self.model, self.holders)
        with Undo() as undo:
            # Backwards: of layers around each other the inner one is applied first, so it is merged first.
            for _, holder in reversed(self.holders):
                with onload_layer(holder):
                    before = list(holder.merged_adapters)
                    undo.push(set_merged, holder, before)
                    holder.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Bring the base weights back as they were before merging."""
        reshard(self)
        # The other way round than merging: layers that share a weight were merged one on top of the other.
        for _, holder in self.holders:
            with onload_layer(holder):
                holder.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold the adapters into the base weights for good and give back the plain model.

        Args:
            progressbar: show one.
            safe_merge: check the results for NaN and infinity before anything is written.
            adapter_names: which adapters; the active ones by default.

        Raises:
            TypeError: `adapter_names` is a string.
            ValueError: a result is not finite; the model is as it was.
        """
        return self._unload_and_optionally_merge(
            merge=True, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def unload(self) -> nn.Module:
        """Take all adapters out and give back the base model as it was."""
        return self._unload_and_optionally_merge(merge=False)

    def _try_folding(self, adapter_names: list[str] | None) -> None:
        """Raise what folding some layer would raise, before the first layer is taken out."""
        for _, holder in self.holders:
            if isinstance(holder, AdapterLayer):
                held = holder._get_available_adapters()
                wanted = holder.active_adapters if adapter_names is None else adapter_names
                with onload_layer(holder):
                    fresh = [name for name in wanted if name in held and name not in holder.merged_adapters]
                    holder.check_writable(holder.folded(fresh))

    def _try_merging(self, adapter_names: list[str] | None) -> None:
        """Raise what merging with a check would raise; one layer at a time, so that one needs its weight twice."""
        if any(isinstance(getattr(holder, "base_layer", None), AdapterHolder) for _, holder in self.holders):
            self.merge_adapter(adapter_names, safe_merge=True)  # what is inside another counts with it
            self.unmerge_adapter()
            return
        for _, holder in self.holders:
            before = list(holder.merged_adapters)
            with onload_layer(holder):
                holder.merge(safe_merge=True, adapter_names=adapter_names)
            set_merged(holder, before)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_names_to_merge(adapter_names)
        reshard(self)
        if merge:
            self._check_merge_allowed()
        check_merges_alone(self.model, self.holders)
        if merge and safe_merge:
            self._try_merging(adapter_names)
        elif merge:
            self._try_folding(adapter_names)
        places = places_of(self.model)
        ties = TiedEmbeddings(self.model)
        inside: tuple[str, ...] = ()
        names = [name for name, _ in self.holders]
        for name, holder in tqdm(
            list(self.holders), disable=not progressbar, desc="Unloading " + ("and merging" if merge else "")
        ):
            if inside and name.startswith(inside):
                continue
            inside = (f"{name}.",)
            with onload_layer(holder):
                plain = unloaded(holder, merge, adapter_names)
            for owner, child_name in places[id(holder)]:
                owner._modules[child_name] = plain
        self.__dict__.pop("_holders", None)
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        if merge and names:
            ties.update_config()
        return self.model

    # ------------------------------------------------------------------------------------------------------------ others

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's adapter can be turned into a LoRA adapter."""
        layers = [holder for _, holder in self.holders if isinstance(holder, self.tuner_layer_cls)]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            cast_holders([holder for _, holder in self.holders], adapter_name)


def _correct_fan_in_fan_out(config: Any, base: nn.Module) -> None:
    """Make `fan_in_fan_out` of a configuration say how the layer at hand stores its weight."""
    if not hasattr(config, "fan_in_fan_out"):
        return
    kind = kind_of(base)
    if kind is not None and kind.name in ("linear", "conv1d_transformers"):
        stored = kind.transposed
        if config.fan_in_fan_out != stored:
            warnings.warn(
                f"fan_in_fan_out is set to {stored}, since a {type(base).__name__} stores its weight "
                f"{'(in, out)' if stored else '(out, in)'}."
            )
            config.fan_in_fan_out = stored
