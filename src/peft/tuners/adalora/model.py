"""The AdaLoRA tuner (arXiv 2303.10512): it penalises what is not orthogonal, and lets ranks be pruned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...engine.lifecycle import holders_of
from ...engine.loading import refuse_other_rank
from ...engine.state import BASE_PREFIX, base_model_of
from ...engine.tuner import BaseTuner
from ...utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
from ...utils.integrations import gather_params_ctx
from ..lora.model import LoraModel
from . import bnb, gptq
from .allocation import (
    FACTORS,
    RankAllocator,
    RankPattern,
    check_betas,
    for_file,
    layers_with,
    orthogonality_losses,
    pattern_of,
    rank_axis,
    ranks_of,
)
from .config import AdaLoraConfig
from .gptq import SVDQuantLinear
from .layer import LAYER_CLASSES, AdaLoraLayer, SVDConv2d, SVDLinear


class AdaLoraModel(LoraModel):
    """Adapts a model by low-rank updates whose ranks are pruned during training.

    Only one adapter may train: the others are to be made with `inference_mode=True`. Switching to one of these trains it
    and its ranks instead.

    Args:
        model: the model to adapt.
        config: an `AdaLoraConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        kwargs: as `BaseTuner`.
    """

    tuner_layer_cls = AdaLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = LAYER_CLASSES
    quantized_layer_classes = bnb.LAYER_CLASSES | gptq.LAYER_CLASSES

    trainable_adapter_name: str | None = None
    """The adapter whose ranks are pruned."""

    def __init__(self, model: nn.Module, config: AdaLoraConfig, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, config, adapter_name, **kwargs)

    # --------------------------------------------------------------------------------------------------- injection

    @classmethod
    def check_file(cls, config: AdaLoraConfig, state: dict[str, torch.Tensor]) -> None:
        ranks = {len(value) for key, value in state.items() if key.endswith(".lora_E") and value.dim() == 2}
        if config.rank_pattern:  # what was pruned has fewer than it started with
            ranks |= {len(present) for present in config.rank_pattern.values()}
        refuse_other_rank("init_r", config.init_r, ranks)

    def layer_options(self, config: AdaLoraConfig, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        options = {"r": config.init_r, "lora_alpha": config.lora_alpha, "target_name": key}
        present = pattern_of(config.rank_pattern, key, adapter_name)
        return options if present is None else {**options, "r": len(present), "present_ranks": present}

    def _create_and_replace(
        self,
        lora_config: AdaLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise ValueError(
                f"AdaLoRA adapts modules, not bare parameters: target_parameters selects {parameter_name!r} of "
                f"{current_key!r}. Name modules in target_modules, or use LoRA."
            )
        BaseTuner._create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key)

    def _convert_adapter_config(self, peft_config: AdaLoraConfig, model: nn.Module) -> None:
        """Nothing: files of AdaLoRA name modules, which are the same in all releases of transformers."""

    def _check_new_adapter_config(self, config: AdaLoraConfig) -> None:
        super()._check_new_adapter_config(config)
        if not config.inference_mode:
            check_betas(config)
        training = [name for name, other in self.peft_config.items() if not other.inference_mode]
        if len(training) > 1:
            raise ValueError(
                f"Only one AdaLoRA adapter of a model can be made to train, got {training}. Set inference_mode=True in the "
                "configurations of the others."
            )

    def _add_targets_to_tie(self, peft_config: AdaLoraConfig, tied_weight_keys: list[str]) -> None:
        BaseTuner._add_targets_to_tie(self, peft_config, tied_weight_keys)

    # ---------------------------------------------------------------------------------------------------- training

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not self.peft_config[adapter_name].inference_mode:
            self.trainable_adapter_name = adapter_name

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        names = self.active_adapters
        if names and not inference_mode and self.trainable_adapter_name not in names:
            self.trainable_adapter_name = names[0]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._allocators.pop(adapter_name, None)
        if self.trainable_adapter_name == adapter_name:
            self.trainable_adapter_name = None

    @property
    def _allocators(self) -> dict[str, RankAllocator]:
        return self.__dict__.setdefault("_allocator_by_name", {})

    @property
    def rankallocator(self) -> RankAllocator | None:
        """What prunes the ranks of the adapter that trains; None if none does."""
        name = self.trainable_adapter_name
        if name is not None and name not in self._allocators:
            self._allocators[name] = RankAllocator(self.model, self.peft_config[name], name)
        return self._allocators.get(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's output; a loss in it has the penalty on what is not orthogonal added."""
        output = super().forward(*args, **kwargs)
        loss = getattr(output, "loss", None)
        penalties = self._penalties() if torch.is_tensor(loss) else []
        if penalties:
            weight = self.peft_config[self.trainable_adapter_name].orth_reg_weight
            output.loss = loss + weight * torch.stack([penalty.to(loss.device) for penalty in penalties]).mean()
        return output

    def _penalties(self) -> list[torch.Tensor]:
        """One for every A and B of the adapter whose ranks are pruned, none where it is not used."""
        name = self.trainable_adapter_name
        used = name is not None and name in self.active_adapters
        return [
            penalty
            for _, layer in (layers_with(self.holders, name) if used else ())
            if not layer.disable_adapters
            for penalty in orthogonality_losses(layer, name)
        ]

    def update_and_allocate(self, global_step: int) -> None:
        """Prune ranks as the schedule says; to be called in every step, after `backward()` and before `zero_grad()`.

        In the last `tfinal` steps the pattern stays as it is.

        Args:
            global_step: the training step.

        Raises:
            ValueError: no adapter trains.
            TypeError: there are no gradients.
        """
        name, allocator = self.trainable_adapter_name, self.rankallocator
        if allocator is None:
            raise ValueError(
                f"No adapter's ranks are to be pruned: all of {sorted(self.peft_config)} were made for inference. Make or "
                "load one for training, or set_adapter(...)."
            )
        config = self.peft_config[name]
        last = config.total_step - config.tfinal
        if global_step > last:
            allocator.mask_using_rank_pattern(self.model, config.rank_pattern)
            return
        _, pattern = allocator.update_and_allocate(self.model, global_step, force_mask=global_step == last)
        if pattern is not None:
            config.rank_pattern = for_file(pattern, name)
        if global_step == last:
            allocator.reset_ipt()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: the sum of two adapters has no E that says which rank matters.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "Adapters of AdaLoRA cannot be combined into one of AdaLoRA. Convert them to LoRA first (convert_to_lora)."
        )

    # ------------------------------------------------------------------------------------------------------- files

    @staticmethod
    def adapter_state_to_save(
        model: nn.Module, config: AdaLoraConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The adapter's tensors without the ranks that were pruned."""
        return _without_pruned(base_model_of(model), config.rank_pattern, state, adapter_name)

    @staticmethod
    def adapter_state_to_load(
        model: nn.Module, config: AdaLoraConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """A file's tensors; into an adapter that still has the ranks that are pruned in it, with E zero for these."""
        return _with_pruned(base_model_of(model), config.rank_pattern, state, adapter_name)

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: RankPattern, state_dict: dict[str, torch.Tensor], adapter_name: str
    ) -> dict[str, torch.Tensor]:
        """An adapter's tensors without pruned ranks.

        Args:
            rank_pattern: name of an E -> for each initial rank whether it is kept.
            state_dict: tensors by their names on disk or in memory.
            adapter_name: the adapter.
        """
        return _without_pruned(self.model, rank_pattern, state_dict, adapter_name)

    def resize_modules_by_rank_pattern(self, rank_pattern: RankPattern, adapter_name: str) -> None:
        """Take pruned ranks out of an adapter's layers for good. An optimiser made before does not know the new tensors.

        Args:
            rank_pattern: name of an E -> for each initial rank whether it is kept.
            adapter_name: the adapter.
        """
        for name, layer in layers_with(self.holders, adapter_name):
            kept = pattern_of(rank_pattern, name, adapter_name)
            if kept is not None:
                layer.keep_ranks(adapter_name, kept)
        self.peft_config[adapter_name].rank_pattern = for_file(rank_pattern, adapter_name)


def _factors_in(
    model: nn.Module, rank_pattern: RankPattern | None, state: dict[str, torch.Tensor], adapter_name: str
) -> Iterator[tuple[str, str, AdaLoraLayer, torch.Tensor]]:
    """Key and container of each factor in a state dict that a pattern speaks of, its layer, and which ranks are kept."""
    for name, layer in layers_with(holders_of(model), adapter_name):
        kept = pattern_of(rank_pattern, name, adapter_name)
        if kept is None:
            continue
        rows = torch.tensor(layer.of_present_ranks(adapter_name, kept), dtype=torch.bool)
        for prefix, factor, suffix in itertools.product(("", BASE_PREFIX), FACTORS, ("", f".{adapter_name}")):
            key = f"{prefix}{name}.{factor}{suffix}"
            if key in state:
                yield key, factor, layer, rows


def _without_pruned(
    model: nn.Module, rank_pattern: RankPattern | None, state: dict[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    result = dict(state)
    for key, factor, _, rows in _factors_in(model, rank_pattern, state, adapter_name):
        if state[key].shape[rank_axis(factor)] == len(rows):
            result[key] = ranks_of(factor, state[key], rows)
    return result


def _with_pruned(
    model: nn.Module, rank_pattern: RankPattern | None, state: dict[str, torch.Tensor], adapter_name: str
) -> dict[str, torch.Tensor]:
    result = dict(state)
    for key, factor, layer, rows in _factors_in(model, rank_pattern, state, adapter_name):
        axis, places = rank_axis(factor), rows.nonzero().view(-1)
        if state[key].shape[axis] == len(places) < len(rows):
            whole = layer._modules[factor][adapter_name].detach().to(state[key], copy=True)
            whole = torch.zeros_like(whole) if factor == "lora_E" else whole
            result[key] = whole.index_copy(axis, places.to(whole.device), state[key])
    return result


__all__ = [
    "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
    "AdaLoraLayer",
    "AdaLoraModel",
    "BaseTunerLayer",
    "LoraModel",
    "RankAllocator",
    "SVDConv2d",
    "SVDLinear",
    "SVDQuantLinear",
    "gather_params_ctx",
]
