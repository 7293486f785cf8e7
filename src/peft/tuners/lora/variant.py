"""The interface of LoRA variants, and how a layer finds the one that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    """What a variant does otherwise than plain LoRA. Stateless: tensors live in the layer, by adapter name."""

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
        """
        raise NotImplementedError

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight with the adapter folded in, as a new tensor.

        Args:
            module: the layer.
            active_adapter: the adapter.
            orig_weight: the base weight in its own layout, earlier adapters folded in.
        """
        raise NotImplementedError

    @classmethod
    def merge_unsafe(cls, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Fold the adapter into the base weight in place."""
        orig_weight.copy_(cls.merge_safe(module, active_adapter, orig_weight))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The base weight with the adapter taken out again, as a new tensor."""
        raise NotImplementedError

    def supports_lora_conversion(self) -> bool:
        """Whether an adapter of this variant can be turned into a plain LoRA adapter."""
        return True


def requested_variants(config: LoraConfig) -> tuple[str, ...]:
    """Sorted names of the variants that a configuration asks for."""
    names = [switch for switch in SWITCHES if getattr(config, switch, None)]
    if config.init_lora_weights == "mica":
        names.append("mica")
    return tuple(sorted(names))


def resolve_variant(
    table: dict[tuple[str, ...], type[LoraVariant]], requested: tuple[str, ...], where: str
) -> LoraVariant | None:
    """The variant of a table that serves what is requested, None if nothing is.

    Raises:
        ValueError: the table has none for it.
    """
    if not requested:
        return None
    if requested not in table:
        known = sorted("+".join(names) for names in table if names)
        raise ValueError(
            f"{where} does not support {' with '.join(requested)}. Supported here: {', '.join(known) or 'plain LoRA only'}."
        )
    return table[requested]()
