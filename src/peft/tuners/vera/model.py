"""The VeRA tuner (arXiv 2310.11454): it owns the random projections that the layers of an adapter share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.backends import resolve_quantization_backend
from ...engine.kinds import LINEAR, kind_of
from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...engine.lifecycle import Entry
from ...engine.loading import refuse_other_rank
from ...engine.tuner import BaseTuner
from ...engine.undo import Undo
from ...utils.buffer_dict import BufferDict
from ...utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from ...utils.tensors import empty
from .config import VeraConfig
from .layer import LAYER_CLASSES, VeraLayer

PROJECTIONS = ("vera_A", "vera_B")


class VeraModel(BaseTuner):
    """Adapts a model by two vectors per layer that scale random projections A and B.

    All layers of an adapter share its A and B, which follow from its seed, its rank and the sizes of its targets
    alone. Adapters whose projections have the same values share their storage; each keeps its own when a file brings
    others.

    Args:
        model: the model to adapt.
        config: a `VeraConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make the vectors on the meta device; the projections are real in any case.
    """

    prefix: ClassVar[str] = "vera_lambda_"
    tuner_layer_cls = VeraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    uses_shared_state = True
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = LAYER_CLASSES

    vera_A: BufferDict
    vera_B: BufferDict

    def _pre_injection_hook(self, model: nn.Module, config: VeraConfig, adapter_name: str) -> None:
        """Take over the projections of the layers that are there, or start without any."""
        layer = next((module for module in model.modules() if isinstance(module, VeraLayer)), None)
        for name in PROJECTIONS:
            setattr(self, name, BufferDict() if layer is None else getattr(layer, name))

    def _check_new_adapter_config(self, config: VeraConfig) -> None:
        super()._check_new_adapter_config(config)
        if config.r <= 0:
            raise ValueError(f"The rank of a VeRA adapter must be positive, got r={config.r}.")
        for name, other in self.peft_config.items():
            for option in ("projection_prng_key", "save_projection"):
                expected, found = getattr(other, option, None), getattr(config, option)
                if expected is not None and expected != found:
                    raise ValueError(
                        f"All VeRA adapters of a model have the same {option}: the adapter {name!r} has {expected!r}, "
                        f"the new one {found!r}."
                    )

    # ------------------------------------------------------------------------------------------------- projections

    def _prepare_shared_state(
        self, config: VeraConfig, adapter_name: str, targets: dict[str, nn.Module], undo: Undo
    ) -> None:
        if not targets:
            return
        sizes = [size for size in map(self._matrix_size, targets.values()) if size is not None]
        if not sizes:
            raise ValueError(
                f"VeRA can adapt none of the targets {sorted(targets)[:5]}; supported are layers of the kinds "
                f"{', '.join(sorted(self.layer_classes))}."
            )
        fan_out, fan_in = (max(column) for column in zip(*sizes))
        drawn = draw_projections(config.r, fan_in, fan_out, config.projection_prng_key)
        for name, value in zip(PROJECTIONS, drawn):
            projections: BufferDict = getattr(self, name)
            undo.push(_put, projections, adapter_name, projections._buffers.get(adapter_name))
            projections.persistent = config.save_projection
            projections[adapter_name] = value

    def _matrix_size(self, target: nn.Module) -> tuple[int, int] | None:
        """Rows and columns of a target's canonical weight as a matrix, None if VeRA cannot adapt it."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = kind_of(base)
        if kind is not None and kind.name in self.layer_classes:
            fan_out, *fan_in = kind.shape(base)
            return fan_out, math.prod(fan_in)
        if resolve_quantization_backend(base, **self._quantization_options()) is not None:
            return LINEAR.shape(base)
        return None

    def layer_options(self, config: VeraConfig, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        return {"vera_A": self.vera_A, "vera_B": self.vera_B, "r": config.r}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name in PROJECTIONS:
            _store_once(getattr(self, name), adapter_name)

    # ------------------------------------------------------------------------------------------------------- files

    @classmethod
    def check_file(cls, config: VeraConfig, state: dict[str, torch.Tensor]) -> None:
        ranks = {len(value) for key, value in state.items() if key.endswith(".vera_lambda_d") and value.dim() == 1}
        refuse_other_rank("r", config.r, ranks)

    def shared_state_entries(self, adapter: str) -> Iterator[Entry]:
        """A and B, where they are part of the adapter's file."""
        if self.peft_config[adapter].save_projection:
            for name in PROJECTIONS:
                yield Entry(f"{name}.{adapter}", name, getattr(self, name), adapter)

    @staticmethod
    def adapter_state_to_save(
        model: nn.Module, config: VeraConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The adapter's tensors, checked to have what its configuration promises.

        Raises:
            ValueError: projections that are to be saved are not there, or the adapter was made without saving them.
        """
        if not config.save_projection:
            return state
        if not model.base_model.vera_A.persistent:
            raise ValueError(
                f"The adapter {adapter_name!r} was made with save_projection=False, and its configuration says True "
                "now. Set it when the adapter is made."
            )
        missing = [f"base_model.{name}" for name in PROJECTIONS if f"base_model.{name}" not in state]
        if missing:
            raise ValueError(f"The state dict lacks {missing} of the adapter {adapter_name!r}, which are to be saved.")
        return state

    @staticmethod
    def adapter_state_to_load(
        model: nn.Module, config: VeraConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The file's tensors without projections that are not wanted, and with no more of them than is used.

        Raises:
            ValueError: the configuration promises projections that the file does not have.
        """
        keys = {f"base_model.{name}": getattr(model.base_model, name) for name in PROJECTIONS}
        missing = [key for key in keys if key not in state]
        if not config.save_projection:
            found = "has projections, which are ignored" if len(missing) < len(keys) else "has no projections"
            warnings.warn(
                f"The file of the adapter {adapter_name!r} {found}: with save_projection=False they are drawn from "
                f"projection_prng_key={config.projection_prng_key}, which may give other numbers than it was trained "
                "with."
            )
            return {key: value for key, value in state.items() if key not in keys}
        if missing:
            raise ValueError(
                f"The file of the adapter {adapter_name!r} lacks {missing}, though its configuration has "
                "save_projection=True. Set that to False to draw them from projection_prng_key."
            )
        cut = {key: _first_part(state[key], projections[adapter_name]) for key, projections in keys.items()}
        for key, projections in keys.items():
            _separate(projections, adapter_name, cut[key])
        return state | cut


def draw_projections(r: int, fan_in: int, fan_out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, fan_in) and B (fan_out, r), uniform with the variance of Kaiming's initialisation (arXiv 1502.01852).

    Args:
        r: rank.
        fan_in: columns of A.
        fan_out: rows of B.
        seed: decides all numbers, together with torch's default dtype.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    A, B = (empty(*shape, owner="VeRA's projections", device="cpu") for shape in ((r, fan_in), (fan_out, r)))
    return nn.init.kaiming_uniform_(A, generator=generator), nn.init.kaiming_uniform_(B, generator=generator)


def _put(projections: BufferDict, adapter_name: str, value: torch.Tensor | None) -> None:
    if value is not None:
        projections[adapter_name] = value
    elif adapter_name in projections:
        del projections[adapter_name]


def _store_once(projections: BufferDict, adapter_name: str) -> None:
    """Let an adapter use the storage of another one that has the same values."""
    own = projections._buffers.get(adapter_name)
    for name, other in projections.items():
        if own is not None and name != adapter_name and _same(own, other):
            projections[adapter_name] = other
            return


def _separate(projections: BufferDict, adapter_name: str, value: torch.Tensor) -> None:
    """Give an adapter storage of its own if a value is to be written to it that others do not have."""
    own = projections[adapter_name]
    shared = any(other is own for name, other in projections.items() if name != adapter_name)
    if shared and not _same(own, value.to(own)):
        projections[adapter_name] = own.clone()


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device) or first.is_meta:
        return False
    return torch.equal(first, second)


def _first_part(saved: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """As much of a saved projection as the adapter has; one that was saved beside a larger adapter has more."""
    rows, columns = own.shape
    return saved[:rows, :columns] if saved.dim() == 2 else saved


__all__ = ["VeraModel"]
