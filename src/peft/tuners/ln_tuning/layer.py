"""LN tuning on any module (arXiv 2312.11420): the adapter is a copy that is used instead of the module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ...engine.copies import ModuleCopies
from ...engine.lifecycle import Entry

if TYPE_CHECKING:
    from .config import LNTuningConfig


class LNTuningLayer(ModuleCopies, nn.Module):
    """Trains a copy of a module per adapter: y = copy(x) instead of module(x).

    A copy starts equal to the module, has its dtype, and comes with its buffers. Copies exclude each other: activating
    two adapters that both have one here is refused.

    Args:
        base_layer: the module to copy, a normalisation layer as a rule.
        adapter_name: the first adapter.
        config: its configuration.
    """

    adapter_layer_names = ("ln_tuning_layers",)
    copies_name = "ln_tuning_layers"
    keeps_dtype = True
    """A normalisation layer is trained in the precision that the model runs it in."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LNTuningConfig) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.merged_adapters = []
        self.ln_tuning_layers = nn.ModuleDict()
        self.update_layer(base_layer, adapter_name, config)

    def update_layer(self, layer: nn.Module, adapter_name: str, config: LNTuningConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Args:
            layer: the module to copy, `base_layer` as a rule.
            adapter_name: its name.
            config: its configuration.
            kwargs: `inference_mode`, to use the copy but not train it; `config.inference_mode` does the same.
        """
        inference_mode = kwargs.get("inference_mode", False) or config.inference_mode
        self.add_copy(adapter_name, inference_mode=inference_mode, source=layer)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The active adapter's copy of the module applied to its input, or the module itself.

        Args:
            x: the module's input; `args` and `kwargs` are passed on.
            kwargs: `adapter_names`, one name per row of `x`, makes it a mixed batch.
        """
        return super().forward(x, *args, **kwargs)

    def splits_rows(self, original: nn.Module) -> bool:
        # Normalisation layers come in too many classes to list, and all of them treat rows separately in inference.
        return not isinstance(original, nn.MultiheadAttention)  # its keys and values are rows too

    def merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put the values of a copy into the module; `unmerge` brings the module's own back bit for bit.

        What another adapter had put there is taken out first.

        Args:
            adapter_names: the adapter to merge; the active one by default.
            safe_merge: check the values for NaN and infinity before anything is written.

        Raises:
            ValueError: two of the adapters have a copy, or with `safe_merge` a value is not finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        if self.merged_adapters and any(name in self.copies and name not in self.merged_adapters for name in names):
            warnings.warn(f"{self._label}: {self.merged_adapters} are unmerged before {list(names)} are merged.")
            self.unmerge()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def state_entries(self, adapter: str) -> Iterator[Entry]:
        """As the engine's; but the tensors of submodules are saved under the adapter's name, as files have it."""
        for entry in super().state_entries(adapter):
            yield entry.saved_as(entry.live) if "." in inner_name(entry.saved) else entry

    def __repr__(self) -> str:
        return f"ln_tuning.{super().__repr__()}"


def inner_name(saved: str) -> str:
    """The name of a tensor inside its copy, for a name on disk without the adapter's: "weight", "0.bias"."""
    return saved.partition("ln_tuning_layers.")[2]
