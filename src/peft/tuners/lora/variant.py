"""The interface of LoRA variants, and how a layer finds the one that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from .config import LoraConfig
    from .layer import LoraLayer

SWITCHES = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "velora_config",
)
"""Fields of `LoraConfig` that ask for a variant when they are set."""


class LoraVariant:
    """What a variant does otherwise than plain LoRA. Stateless: tensors live in the layer, by adapter name.

    The hooks are static, so that what they know of an adapter is what its layer holds.
    """

    containers: ClassVar[dict[str, Callable[[], Any]]] = {}
    """Attributes of the layer, keyed by adapter name, that hold what the variant keeps -> how to make them.

    Tensors and modules belong in torch's containers; what else an adapter has, in a plain dictionary.
    """
    frozen_containers: ClassVar[tuple[str, ...]] = ()
    """Containers of which an adapter of this variant never trains the tensors."""
    inputs: ClassVar[tuple[str, ...]] = ()
    """What the forward is given of the call's inputs, by keyword (see `BaseTuner.call_inputs`)."""
    computes_plainly: ClassVar[bool] = False
    """Whether it differs only in how an adapter starts or trains, so that layers may compute as without a variant."""
    can_be_padded: ClassVar[bool] = True
    """Whether zeros may be added to the factors to give an adapter a larger rank."""
    plain_at_inference: ClassVar[bool] = False
    """Whether it is s·B(A(x)) when nothing trains, so that its factors may be used as a plain adapter's."""

    @staticmethod
    def check(module: LoraLayer, adapter_name: str, r: int, config: LoraConfig, **kwargs: Any) -> None:
        """Raise unless the layer can have such an adapter; called before anything is changed.

        Args:
            module: the layer.
            adapter_name: the adapter.
            r: its rank there.
            config: its configuration.
            kwargs: what depends on the module, such as `target_name`.
        """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Add what the variant needs to an adapter whose factors are in place.

        Args:
            module: the layer.
            adapter_name: the adapter.
            kwargs: `config` and what depends on the module.
        """
        raise NotImplementedError

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The output with the adapter applied.

        Args:
            module: the layer.
            active_adapter: the adapter.
            x: the layer's input in the adapter's dtype.
            result: the output so far, earlier adapters applied.
            kwargs: the call's `inputs`.
        """
        raise NotImplementedError

    @staticmethod
    def adapters_changed(module: LoraLayer, adapter_name: str) -> None:
        """Take note that the layer's adapters, or values of their weights, may be others than before.

        Args:
            module: the layer.
            adapter_name: an adapter of this variant, active or not.
        """

    @staticmethod
    def delta_weight(module: LoraLayer, active_adapter: str) -> torch.Tensor:
        """What the adapter adds to the base weight, scaled and canonical; s·B·A unless the variant says otherwise.

        Args:
            module: the layer.
            active_adapter: the adapter.
        """
        return module.plain_delta(active_adapter)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight with the adapter folded in, as a new tensor.

        Args:
            module: the layer.
            active_adapter: the adapter.
            orig_weight: the base weight in its own layout, earlier adapters folded in.
        """
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Fold the adapter into the base weight in place; arguments as `merge_safe`."""
        variant = module.lora_variant[active_adapter]
        orig_weight.copy_(variant.merge_safe(module, active_adapter, orig_weight))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight with the adapter taken out again, as a new tensor; arguments as `merge_safe`."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """Whether an adapter of this variant can be turned into a plain LoRA adapter."""
        return True


def is_plain(variant: LoraVariant | None) -> bool:
    """Whether an adapter of a variant, or of none, is s·B(A(x)) when nothing trains."""
    return variant is None or variant.computes_plainly or variant.plain_at_inference


VariantTable = dict[tuple[str, ...], type[LoraVariant]]
_TABLES: dict[str, VariantTable] = {}


def register_variant(*switches: str, kinds: Iterable[str]) -> Callable[[type[LoraVariant]], type[LoraVariant]]:
    """Let a class serve configurations that ask for exactly these variants.

    Args:
        switches: names as `requested_variants` gives them.
        kinds: the kinds of layers (`engine.kinds`) that it serves them on.
    """

    def register(cls: type[LoraVariant]) -> type[LoraVariant]:
        for kind in kinds:
            _TABLES.setdefault(kind, {})[tuple(sorted(switches))] = cls
        return cls

    return register


def variants_on(kind: str) -> VariantTable:
    """Sorted names of requested variants -> the class that serves them on a kind of layer."""
    from . import variants  # noqa: F401  (its files register themselves; they need what is defined here)

    return _TABLES.get(kind, {})


def requested_variants(config: LoraConfig) -> tuple[str, ...]:
    """Sorted names of the variants that a configuration asks for."""
    names = [switch for switch in SWITCHES if getattr(config, switch, None)]
    if str(config.init_lora_weights).lower() == "mica":
        names.append("mica")
    return tuple(sorted(names))


def resolve_variant(table: VariantTable, requested: tuple[str, ...], where: str) -> LoraVariant | None:
    """The variant of a table that serves what is requested, None if nothing is.

    Raises:
        ValueError: the table has none for it.
    """
    if not requested:
        return None
    for names in table:
        unknown = sorted({*names} - {*SWITCHES, "mica"})
        if unknown or list(names) != sorted(names):
            raise ValueError(
                f"lora_variants of {where} has the key {names!r}, which must be a sorted tuple of known variants: "
                f"{', '.join(sorted([*SWITCHES, 'mica']))}."
            )
    if requested not in table:
        known = sorted("+".join(names) for names in table if names)
        raise ValueError(
            f"{where} does not support {' with '.join(requested)}. Supported here: {', '.join(known) or 'plain LoRA only'}."
        )
    return table[requested]()
