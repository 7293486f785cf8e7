"""Modules that an adapter replaces as a whole by a copy of its own, trained in full.

`ModuleCopies` is the common part of `ModulesToSaveWrapper` and of methods that tune a module's own parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .backends import QuantizationBackend, resolve_quantization_backend
from .backends.dense import with_dense_weights
from .layer import BaseTunerLayer, check_adapters_to_merge
from .lifecycle import set_trains
from .offload import forget_hook, onload_layer

BATCHED_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that are known to treat the rows of a batch separately."""


class ModuleCopies(BaseTunerLayer):
    """A holder whose adapters are copies of one module; at most one of them is used at a time.

    The original stays where it is, frozen, and is used where no active adapter has a copy. Merging puts the values of
    the active copy into the original, in new parameters, so that modules tied to it keep theirs. A copy of what is
    quantised has dense weights, which can be trained; merging quantises them, merging for good puts the copy in place.
    """

    exclusive = True
    copies_name: str
    """Attribute that holds the copies by adapter name."""
    _stash: dict[str, tuple[nn.Module, str, torch.Tensor]] | None = None
    _packed: list[tuple[nn.Module, QuantizationBackend, Any]] = []
    """Quantised modules that are merged into, and what their weights were."""

    @property
    def copies(self) -> nn.ModuleDict:
        return self._modules[self.copies_name]

    def original(self) -> nn.Module:
        """The module as it is without an adapter."""
        return self.get_base_layer()

    def module_in_use(self) -> nn.Module:
        plan = self.plan
        return self.copies[plan[0]] if plan else self.original()

    def add_copy(self, adapter_name: str, inference_mode: bool = False, source: nn.Module | None = None) -> None:
        """Give an adapter its copy, equal to the original and in its own storage; an existing copy stays.

        Args:
            adapter_name: the adapter.
            inference_mode: use the copy, but do not train it.
            source: the module to copy instead of the original.
        """
        if adapter_name not in self.copies:
            if self.merged_adapters:
                warnings.warn(f"{self._label}: {self.merged_adapters} are unmerged before a new copy is made.")
                self.unmerge()
            self.copies[adapter_name] = _copy_of(self.original() if source is None else source)
        for parameter in self.original().parameters():
            set_trains(parameter, False)
        if inference_mode:
            self._inference |= {adapter_name}
        self.roster.join(adapter_name, self._label, self.exclusive)
        self.refresh([adapter_name])

    # -------------------------------------------------------------------------------------------------- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active copy's output, or the original's.

        Args:
            kwargs: `adapter_names`, one name per row of the first argument, makes it a mixed batch.
        """
        names = kwargs.pop("adapter_names", None)
        batch = self.roster.batch
        if (names is not None or batch is not None) and not self._disable_adapters:
            return self._mixed_batch_forward(*args, adapter_names=names or batch.adapter_names, **kwargs)
        return self.module_in_use()(*args, **kwargs)

    def _check_forward_args(self, x: Any, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> None:
        """Raise unless the names of a mixed batch fit it.

        Raises:
            ValueError: their number is not that of the rows, or a copy is merged.
        """
        if self.merged_adapters:
            raise ValueError(
                f"{self._label or type(self).__name__}: a mixed batch needs unmerged adapters, but "
                f"{self.merged_adapters} are merged. Call unmerge_adapter() first."
            )
        if adapter_names is not None and (len(adapter_names) == 0 or len(x) % len(adapter_names)):
            raise ValueError(
                f"{self._label or type(self).__name__}: adapter_names must name one adapter per row, got "
                f"{len(adapter_names)} names for {len(x)} rows."
            )

    def splits_rows(self, original: nn.Module) -> bool:
        """Whether the module is known to treat the rows of a batch separately, so that a mixed batch can be split."""
        return isinstance(original, BATCHED_KINDS)

    def _mixed_batch_forward(self, input: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        original = self.original()
        if not self.splits_rows(original):
            raise TypeError(
                f"{self._label}: a mixed batch needs a module that treats its rows separately "
                f"({', '.join(cls.__name__ for cls in BATCHED_KINDS)}), not {type(original).__name__}."
            )
        self._check_forward_args(input, adapter_names=adapter_names)
        beams = len(input) // len(adapter_names)
        names = [name if name in self.copies else None for name in adapter_names for _ in range(beams)]
        result = None
        for name in dict.fromkeys(names):
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=input.device)
            module = original if name is None else self.copies[name]
            part = module(input[rows], *args, **kwargs)
            if result is None:
                result = part.new_empty((len(input), *part.shape[1:]))
            result = result.index_copy(0, rows, part)
        return result

    # -------------------------------------------------------------------------------------------------- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the values of the active copy into the original; `unmerge` brings the original back bit for bit.

        Args:
            safe_merge: check the values for NaN and infinity before anything is written.
            adapter_names: the adapters to merge; the active ones by default.

        Raises:
            ValueError: two of the adapters have a copy, or with `safe_merge` a value is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.copies]
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(
                f"Only one copy of {self._label or 'a module'} can be merged into it, not "
                f"{[*self.merged_adapters, *names]}."
            )
        if not names:
            return
        source = dict(_slots(self.copies[names[0]]))
        for key, tensor in source.items():
            if safe_merge and not torch.isfinite(_value(tensor)).all():
                raise ValueError(
                    f"The copy of {self._label} that belongs to the adapter {names[0]!r} has NaN or infinite values "
                    f"in {key!r}; nothing was merged."
                )
        packed = list(_quantised_parts(self.original()))
        self._packed = [(owner, backend, backend.snapshot(owner)) for _, owner, backend in packed]
        self._stash = {}
        for path, owner, backend in packed:
            value = _value(source[f"{path}.weight".lstrip(".")])
            backend.write(owner, value, f"{self._label or type(self).__name__}.{path}".rstrip("."))
        owners = [owner for _, owner, _ in packed]
        for key, (owner, attribute, old) in list(dict(_slots(self.original())).items()):
            if attribute != "bias" and owner in owners:
                continue
            self._stash[key] = (owner, attribute, old)
            _put(owner, attribute, _like(old, _value(source[key])))
        self.merged_adapters = names
        self._plan = self._make_plan()

    def unmerge(self) -> None:
        """Bring back the original's own tensors."""
        if not self.merged_adapters:
            warnings.warn(f"{self._label or type(self).__name__}: nothing is merged, so nothing is unmerged.")
            return
        for owner, attribute, old in self._stash.values():
            current = getattr(owner, attribute)  # which may have been moved in the meantime
            if (old.device, old.dtype) != (current.device, current.dtype):
                old.data = old.data.to(current.device, current.dtype)
            _put(owner, attribute, old)
        for owner, backend, snapshot in self._packed:
            backend.put_back(owner, snapshot)
        self._stash, self._packed = None, []
        self.merged_adapters = []
        self._plan = self._make_plan()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain module to put in this one's place: the copy when merging, the original otherwise."""
        names = self.active_adapters if adapter_names is None else adapter_names
        chosen = next((name for name in names if name in self.copies), None)
        if not merge and self.merged_adapters:
            self.unmerge()
        if self.merged_adapters or not merge or chosen is None:
            return self.original()
        if safe_merge:
            self.merge(safe_merge=True, adapter_names=[chosen])
            self.unmerge()
        return self.copies[chosen]


def _copy_of(original: nn.Module) -> nn.Module:
    # Hooks stay out of it: one that offloads weights holds those of the whole model.
    hooks = [module.__dict__["_hf_hook"] for module in original.modules() if "_hf_hook" in module.__dict__]
    with onload_layer(original, store=False):
        duplicate = copy.deepcopy(original, {id(hook): hook for hook in hooks})
    for theirs, ours in zip(original.modules(), duplicate.modules()):
        _renew_hook(theirs, ours)
    return with_dense_weights(duplicate)


def _quantised_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizationBackend]]:
    for path, part in module.named_modules():
        backend = resolve_quantization_backend(part)
        if backend is not None:
            yield path, part, backend


def _slots(module: nn.Module):
    """Dotted name and (owner, attribute, tensor) of each parameter and buffer."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                yield f"{path}.{attribute}".lstrip("."), (owner, attribute, tensor)


def _value(slot: tuple[nn.Module, str, torch.Tensor]) -> torch.Tensor:
    return slot[2].detach()


def _like(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    fresh = value.to(old.device, old.dtype, copy=True)
    return nn.Parameter(fresh, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else fresh


def _put(owner: nn.Module, attribute: str, tensor: torch.Tensor) -> None:
    (owner._parameters if attribute in owner._parameters else owner._buffers)[attribute] = tensor


def _renew_hook(original: nn.Module, duplicate: nn.Module) -> None:
    """Give the copy of a module with an accelerate hook a hook of its own; the copied hook points at the original.

    It moves data like the original's, but leaves the copy's weights where they compute: they are trained and loaded.
    """
    hook = original.__dict__.get("_hf_hook")
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    forget_hook(duplicate)
    if isinstance(hook, AlignDevicesHook):
        keys = ("execution_device", "io_same_device", "place_submodules", "skip_keys")
        fresh = AlignDevicesHook(**{key: getattr(hook, key) for key in keys if hasattr(hook, key)})
        add_hook_to_module(duplicate, fresh)
