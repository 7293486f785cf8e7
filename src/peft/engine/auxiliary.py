"""The wrappers for modules that train beside a tuner: `ModulesToSaveWrapper` and `TrainableTokensWrapper`.

Both take part in the tuner-layer protocol, so that a client that walks a model and calls its `BaseTunerLayer`s reaches
them like any other layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .copies import ModuleCopies
from .layer import BaseTunerLayer
from .lifecycle import as_names, entries_of, set_trains
from .sharding import is_flattened, without_wrappers
from .tokens import TrainableTokensLayer

FORBIDDEN = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class AuxiliaryTrainingWrapper(nn.Module, BaseTunerLayer):
    """A wrapper around a module of the base model of which adapters train a part or a copy.

    Attributes that the wrapper does not have are those of the module in use: the active adapter's, or the original.

    Args:
        module_to_save: the module to wrap.
        adapter_name: the first adapter.
        kwargs: what the subclass needs to add an adapter.

    Raises:
        TypeError: a module that cannot be called, or that holds adapters itself.
    """

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self._set_original(module_to_save)
        self.check_module()
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)

    def _set_original(self, module: nn.Module) -> None:
        self.original_module = module

    def check_module(self) -> None:
        """Raise unless the wrapped module can be wrapped.

        Raises:
            TypeError: it is a mere container, or holds adapters itself.
        """
        module = self.original_module
        if isinstance(module, FORBIDDEN):
            raise TypeError(
                f"modules_to_save cannot be a {type(module).__name__}, which has no forward of its own. Name the "
                "modules inside it."
            )
        if isinstance(module, BaseTunerLayer):
            raise TypeError(
                f"The module to save is a {type(module).__name__} and is adapted already. A module is either targeted "
                "or saved as a whole: take it out of target_modules or out of modules_to_save."
            )

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Create what the wrapper keeps its adapters in."""
        raise NotImplementedError

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter, trainable exactly when it is active."""
        raise NotImplementedError

    @property
    def base_layer(self) -> nn.Module:
        modules = self.__dict__.get("_modules", {})
        if "original_module" not in modules:
            raise AttributeError("base_layer")
        return modules["original_module"]

    def get_base_layer(self) -> nn.Module:
        """The module as it was before it was wrapped."""
        return self.original_module

    def module_in_use(self) -> nn.Module:
        return self.original_module

    @property
    def weight(self) -> torch.Tensor:
        return self.module_in_use().weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.module_in_use().bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Half-built (deepcopy, pickle): there is no module to ask yet.
            if name in ("original_module", "_modules", "modules_to_save", "token_adapter", "base_layer"):
                raise
            if not self.__dict__.get("_modules"):
                raise
            return getattr(self.module_in_use(), name)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The one of these adapters that this wrapper would use, None if it has none of them.

        Raises:
            ValueError: no name at all, or several adapters that each have a part here.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("adapter_name must name at least one adapter, got an empty list.")
        known = [name for name in adapter_name if name in self._get_available_adapters()]
        self.roster.check(known)
        return known[0] if known else None

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Remove an adapter from the wrapper.

        Args:
            adapter_name: the adapter to remove.
            new_active_adapters: what is active afterwards; by default what the rest of the model falls back to.

        Raises:
            ValueError: the new active adapters exclude each other; nothing is changed.
        """
        if new_active_adapters is not None:
            self.roster.check(
                [name for name in new_active_adapters if name != adapter_name], extra=new_active_adapters
            )
        super().delete_adapter(adapter_name)
        if new_active_adapters is not None and list(new_active_adapters) != self.active_adapters:
            self._active_adapter = list(new_active_adapters)
            self.refresh()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module to put in the wrapper's place."""
        raise NotImplementedError

    def state_entries(self, adapter: str):
        mapped = {live: saved for saved, live in self.adapter_state_dict_load_map(adapter).items()}
        for entry in super().state_entries(adapter):
            live = without_wrappers(entry.live)
            if live in mapped:
                yield entry.saved_as(mapped[live])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module in use."""
        return self.module_in_use()(*args, **kwargs)

    def adapter_state_dict(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """One adapter's entries of this module's state, by their names on disk.

        Args:
            adapter_name: the adapter.
        """
        return self._saved_entries(adapter_name, self.state_dict())

    def _saved_entries(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {saved: state_dict[live] for saved, live in self.adapter_state_dict_load_map(adapter_name).items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Name on disk -> name in memory of one adapter's entries, both relative to this module."""
        raise NotImplementedError


class ModulesToSaveWrapper(ModuleCopies, AuxiliaryTrainingWrapper):
    """Trains a copy of a module per adapter beside the tuner, and saves it with the adapter.

    A new copy equals the original and has its own storage. It trains exactly while its adapter is active, enabled and
    not in inference mode, whoever froze the original.

    Args:
        module_to_save: the module to copy.
        adapter_name: the first adapter.
        tied_module: a module whose weight the copy shares instead, for tied embeddings.
    """

    adapter_layer_names = ("modules_to_save",)
    copies_name = "modules_to_save"

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        super().__init__(module_to_save, adapter_name, tied_module=tied_module)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.modules_to_save = nn.ModuleDict()

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Add an adapter's copy; it trains exactly when the adapter is active.

        Args:
            adapter_name: the adapter.
            tied_module: a module whose weight the copy shares.
        """
        if tied_module is not None and adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = _tied_linear(tied_module, self.original_module)
        self.add_copy(adapter_name, inference_mode=kwargs.get("inference_mode", False))

    def module_in_use(self) -> nn.Module:
        return ModuleCopies.module_in_use(self)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One adapter's entries of this wrapper's own `state_dict`, by their names on disk."""
        return self._saved_entries(adapter_name, state_dict)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.modules_to_save:
            return {}
        module, prefix = self.modules_to_save[adapter_name], f"modules_to_save.{adapter_name}."
        if is_flattened(module):  # to ask for its state would be to ask all processes
            entries = entries_of(self.modules_to_save, "modules_to_save", adapter_name)
            keys = [without_wrappers(entry.live).removeprefix(prefix) for entry in entries]
        else:
            keys = module.state_dict()
        return {key: f"{prefix}{key}" for key in keys}


def _tied_linear(tied_module: nn.Module, original: nn.Module) -> nn.Linear:
    weight = tied_module.weight
    if weight.shape != original.weight.shape:
        raise ValueError(
            f"The copy of a {type(original).__name__} with a weight of shape {tuple(original.weight.shape)} cannot be "
            f"tied to a weight of shape {tuple(weight.shape)}."
        )
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear.train(original.training)


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Trains some rows of an embedding (or of a head tied to it) beside the tuner.

    Its whole state is that of the `TrainableTokensLayer` inside.

    Args:
        module_to_save: the embedding or linear layer.
        adapter_name: the first adapter.
        token_indices: the rows to train.
        tied_adapter: a token layer to share the rows of.
    """

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: list[int],
        tied_adapter: TrainableTokensLayer | None = None,
    ) -> None:
        super().__init__(module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter)

    def _set_original(self, module: nn.Module) -> None:
        # The token layer holds the original, so that its weight appears once in the model's state.
        self.__dict__["_wrapped_at_first"] = module

    @property
    def original_module(self) -> nn.Module:
        inner = self.__dict__.get("_modules", {}).get("token_adapter")
        return self.__dict__["_wrapped_at_first"] if inner is None else inner.base_layer

    @property
    def base_layer(self) -> nn.Module:
        return self.original_module

    def init_modules(
        self, adapter_name: str, token_indices: list[int], tied_adapter: TrainableTokensLayer | None
    ) -> None:
        module = self.__dict__.pop("_wrapped_at_first")
        self.token_adapter = TrainableTokensLayer(
            module, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter
        )
        self.token_adapter._in_wrapper = True
        self.token_adapter._active_adapter = [adapter_name]
        for parameter in module.parameters():
            set_trains(parameter, False)

    def update(self, active_adapter: str, **kwargs: Any) -> None:
        """Add an adapter's rows; they train exactly when the adapter is active.

        Args:
            active_adapter: the adapter to add.
            kwargs: `token_indices`, `tied_adapter`, `inference_mode`.
        """
        inner = self.token_adapter
        if active_adapter not in inner.token_indices:
            inner.update_layer(
                active_adapter, token_indices=kwargs["token_indices"], tied_adapter=kwargs.get("tied_adapter")
            )
        if kwargs.get("inference_mode"):
            inner._inference |= {active_adapter}
        inner.refresh([active_adapter])

    # The life cycle is the token layer's.

    def join_roster(self, roster: Any, label: str) -> None:
        self._roster, self._label = roster, label
        self.token_adapter.join_roster(roster, label)

    def activate(self, adapter_names: list[str], inference_mode: bool = False) -> None:
        self.token_adapter.activate(adapter_names, inference_mode)
        self._mirror()

    def enable_adapters(self, enabled: bool) -> None:
        self.token_adapter.enable_adapters(enabled)
        self._mirror()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        self.token_adapter.delete_adapter(adapter_name)
        if new_active_adapters is not None:
            self.token_adapter._active_adapter = as_names(new_active_adapters)
            self.token_adapter.refresh()
        self._mirror()

    def forget(self, adapter_name: str) -> None:
        self.token_adapter.forget(adapter_name)
        self._mirror()

    def refresh(self, adapter_names: Any = None) -> None:
        self.token_adapter.refresh(adapter_names)
        self._mirror()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._mirror()

    def unmerge(self) -> None:
        self.token_adapter.unmerge()
        self._mirror()

    def _mirror(self) -> None:
        inner = self.token_adapter
        self._active_adapter, self._disable_adapters = inner.active_adapters, inner.disable_adapters
        self.merged_adapters, self._inference = inner.merged_adapters, inner._inference

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_adapter.token_indices)

    def rows_of(self, adapter_name: str) -> list[int]:
        return self.token_adapter.rows_of(adapter_name)

    @property
    def active_adapter(self) -> list[str]:
        return self.token_adapter.active_adapters

    @property
    def active_adapters(self) -> list[str]:
        return self.token_adapter.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return self.token_adapter.disable_adapters

    @property
    def weight(self) -> torch.Tensor:
        """The original weight with the rows of the active adapters in place."""
        plan = self.token_adapter.plan
        return self.token_adapter.get_merged_weights(list(plan)) if plan else self.original_module.weight

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The embedding (or head) with the active adapters' rows in place."""
        return self.token_adapter(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        return self.token_adapter.unloaded(merge, safe_merge, adapter_names)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One adapter's entries of this wrapper's own `state_dict`, by their names on disk."""
        return self._saved_entries(adapter_name, state_dict)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        inner = self.token_adapter
        if inner.tied_adapter is not None or adapter_name not in inner.token_indices:
            return {}
        return {
            "token_adapter.trainable_tokens_delta": f"token_adapter.trainable_tokens_delta.{adapter_name}",
        }
