"""The LoRA tuner (arXiv 2106.09685)."""

from __future__ import annotations

import re
import warnings
from types import ModuleType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ...engine.backends.gptq import GptqBackend
from ...engine.layer import AdapterLayer, BaseTunerLayer
from ...engine.lifecycle import as_names, modules_of
from ...engine.matching import get_pattern_key, is_suffix
from ...engine.replication import replicate_layers
from ...engine.state import base_model_of
from ...engine.tuner import BaseTuner
from ...engine.tying import input_embedding_name, save_tied_copies
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from . import aqlm, awq, bnb, eetq, gptq, hqq, inc, te, torchao
from .alora import is_alora_relevant_in_batch, knowing_offsets
from .config import LoraConfig
from .initialisers import changes_base
from .kasa import check_beside, kasa_loss
from .layer import LAYER_CLASSES, Embedding, LoraLayer, ParamWrapper, dispatch_default
from .monteclora import mean_variational_loss
from .mutated_init import convert_mutated_init, warn_of_changed_base, without_initial
from .rank import without_padding
from .tensor_parallel import add_lora_tp_hooks_dtensor, get_tp_plan_and_mesh, placement_for
from .tp_layer import dispatch_megatron
from .weighted import WeightedAdapter

STATE_SPACE_MODELS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types whose kernels read the weights of `out_proj` and `conv1d` without calling these modules."""


def weight_conversion(model: nn.Module) -> ModuleType | None:
    """The module that brings adapters for older releases of transformers up to date; None if that is not needed.

    Args:
        model: a base model.
    """
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return None
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        return None
    from ...utils import transformers_weight_conversion  # needs transformers 5

    return transformers_weight_conversion


class LoraModel(BaseTuner):
    """Adapts a model by low-rank updates of its weights.

    Args:
        model: the model to adapt.
        config: a `LoraConfig`, or configurations by adapter name.
        adapter_name: the adapter to inject.
        low_cpu_mem_usage: make its parameters on the meta device.
    """

    prefix: ClassVar[str] = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layer_classes: ClassVar[dict[str, type[AdapterLayer]]] = LAYER_CLASSES
    quantized_layer_classes: ClassVar[dict[tuple[str, str], type[AdapterLayer]]] = {
        key: layer_cls
        for module in (aqlm, awq, bnb, eetq, gptq, hqq, inc, te, torchao)
        for key, layer_cls in module.LAYER_CLASSES.items()
    }
    special_forward_args: ClassVar[tuple[str, ...]] = ("alora_offsets",)
    unsupported_error = ValueError

    @staticmethod
    def changes_base_at_start(config: LoraConfig) -> bool:
        """Whether the adapter's start takes something out of the base weight, so that loading must run it again."""
        return changes_base(config.init_lora_weights)

    convert_mutated_init = staticmethod(convert_mutated_init)

    def subtract_mutated_init(
        self, output_state_dict: dict[str, torch.Tensor], adapter_name: str, kwargs: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Factors for the original base model, at twice the rank: what an adapter learnt, less what it started as.

        Args:
            output_state_dict: the trained adapter's tensors by their names on disk.
            adapter_name: the adapter as it was before it was trained, loaded into this model.
            kwargs: of no effect.

        Returns:
            A and B by their names on disk.

        Raises:
            ValueError: loading the initial adapter changed the base weights, or it is another one.
        """
        return without_initial(self, output_state_dict, adapter_name)

    def layer_options(self, config: LoraConfig, adapter_name: str, key: str, target: nn.Module) -> dict[str, Any]:
        options: dict[str, Any] = {
            "r": config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r),
            "lora_alpha": config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, key), config.lora_alpha),
            "target_name": key,
            "ephemeral_gpu_offload": config.runtime_config.ephemeral_gpu_offload,
        }
        if key in (getattr(config, "target_modules_to_tie", None) or ()):
            options["tied_adapter"] = self._tied_factors(adapter_name)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        placement = placement_for(self.model, key, base, config)
        return options if placement is None else options | {"tensor_parallel": placement}

    def _tied_factors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The factors of a head that is tied to the embedding: the embedding's, swapped and transposed."""
        embedding = self.model.get_input_embeddings()
        if not isinstance(embedding, Embedding):
            raise ValueError(
                "ensure_weight_tying needs the input embedding to be adapted as well; add it to target_modules."
            )
        return {
            "lora_A": embedding.lora_embedding_B[adapter_name].data.T,
            "lora_B": embedding.lora_embedding_A[adapter_name].data.T,
        }

    def _create_and_replace(
        self,
        lora_config: LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is None:
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key)
            return
        options = self.layer_options(lora_config, adapter_name, f"{current_key}.{parameter_name}", target)
        wrapper: Any = target
        while isinstance(wrapper, ParamWrapper):
            if wrapper.parameter_name == parameter_name:
                wrapper.update_layer(adapter_name, config=lora_config, **options)
                return
            wrapper = wrapper.base_layer
        if isinstance(target, ParamWrapper) and set(target.lora_A) - {adapter_name}:
            raise ValueError(
                f"The adapters {sorted(set(target.lora_A) - {adapter_name})} adapt other parameters of {current_key!r}; "
                f"all adapters must have the same target_parameters, but {adapter_name!r} adds {parameter_name!r}."
            )
        layer = ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=lora_config, **options)
        self._replace_module(parent, target_name, layer, target)

    def _create_new_module(
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, **options: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        for base_cls, layer_cls in (lora_config._custom_modules or {}).items():
            if isinstance(base, base_cls):
                return layer_cls(target, adapter_name, config=lora_config, **options)
        parallel = dispatch_megatron(target, adapter_name, lora_config, **options)
        if parallel is not None:
            return parallel
        return super()._create_new_module(lora_config, adapter_name, target, **options)

    def _convert_adapter_config(self, peft_config: LoraConfig, model: nn.Module) -> None:
        conversion = weight_conversion(model)
        if conversion is not None:
            conversions = conversion.get_model_conversion_mapping(model)
            conversion.convert_peft_config_for_transformers(peft_config, model, conversions)

    @staticmethod
    def adapter_state_to_save(
        model: nn.Module, config: LoraConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The adapter's tensors, without what they were padded by for hotswapping."""
        return without_padding(model, config, adapter_name, state)

    @staticmethod
    def adapter_state_to_load(
        model: nn.Module, config: LoraConfig, adapter_name: str, state: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """A file's tensors under the names, and in the layout, that this release of transformers gives the model."""
        conversion = weight_conversion(base_model_of(model))
        if conversion is None:
            return state
        return conversion.convert_peft_adapter_state_dict_for_transformers(model, config, state, adapter_name)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if is_alora_relevant_in_batch(self, kwargs.get("adapter_names")):
            return knowing_offsets(self, args, kwargs)
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        check_beside(config, ((name, other) for name, other in self.peft_config.items() if other is not config))
        if (
            config.use_qalora
            and not any(GptqBackend.claims(module, {}) for _, module in modules_of(self.model))
            and not config._custom_modules
        ):
            warnings.warn(
                "use_qalora is for layers that GPTQ has quantised. This model has none, so the adapter's A sees every input."
            )
        others = [other for other in self.peft_config.values() if other is not config]
        if others:
            warn_of_changed_base(self.peft_config)
        wanted = set(config.target_parameters or ())
        if any(set(getattr(other, "target_parameters", None) or ()) != wanted for other in others):
            if wanted or any(getattr(other, "target_parameters", None) for other in others):
                raise ValueError(
                    f"All adapters of a model must have the same target_parameters, got {sorted(wanted)} beside "
                    f"{[sorted(getattr(other, 'target_parameters', None) or ()) for other in others]}."
                )

    def _check_target_module_compatiblity(self, peft_config: LoraConfig, model: nn.Module, target_name: str) -> None:
        model_type = self.get_model_config(model).get("model_type")
        leaf = target_name.rsplit(".", 1)[-1]
        if model_type in STATE_SPACE_MODELS and leaf in ("out_proj", "conv1d"):
            raise ValueError(
                f"{target_name!r} of a {model_type} model cannot be adapted: its kernels read the weight without calling "
                "the module. Leave it out of target_modules."
            )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("LoRA cannot be merged into a GPTQ-quantised model.")

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter made out of others; it is frozen and not active, and its scaling is 1.

        What the types compute stands in `peft.tuners.lora.combination`. A single adapter is combined as "linear", that
        is rescaled, unless an `svd_rank` asks for another rank. DoRA's magnitudes change by the weighted sum of their
        changes, biases (`lora_bias`) are combined as the factors are. Where one of the adapters has a copy of a module
        (`modules_to_save`) or rows of an embedding (`trainable_token_indices`), the new one gets these values.

        Args:
            adapters: the adapters to combine.
            weights: one number for each.
            adapter_name: the new adapter; if there is one of that name already, nothing is done.
            combination_type: "cat" (exact, of the sum of the ranks); "linear", "ties", "dare_linear", "dare_ties" or
                "magnitude_prune" on the factors, of adapters of one rank; "svd", "ties_svd", "dare_linear_svd",
                "dare_ties_svd" or "magnitude_prune_svd" on the updates.
            svd_rank: for types with svd, the new rank; the largest of the adapters' by default.
            svd_clamp: for types with svd, limit the factors to this quantile of their entries.
            svd_full_matrices: passed to `torch.linalg.svd` where one of the update is needed.
            svd_driver: the same.
            density: for "ties", "dare" and "magnitude_prune", the share of entries to keep.
            majority_sign_method: for "ties", how signs are elected.

        Raises:
            ValueError: an unknown adapter or type, ranks that do not go together, adapters that cannot be combined; the
                model is as it was.
            TypeError: `density` is missing, or `target_modules` of an adapter has a wrong type.
            RuntimeError: an unknown `majority_sign_method`.
        """
        if adapter_name in self.peft_config:
            return
        WeightedAdapter(
            tuner=self,
            adapters=list(adapters),
            weights=list(weights),
            adapter_name=adapter_name,
            combination_type=combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_full_matrices=svd_full_matrices,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
        ).add()

    def _get_monteclora_loss(self, adapter_names: str | list[str] | None = None) -> torch.Tensor | float:
        """The variational loss of MonteCLoRA adapters, averaged over layers; 0.0 in eval mode and without such adapters.

        Args:
            adapter_names: one name or several; the active ones by default.

        Raises:
            ValueError: an unknown name.
        """
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        self.roster.check_known(names, extra=self.peft_config)
        layers = (holder for _, holder in self.holders if isinstance(holder, LoraLayer))
        return mean_variational_loss(layers, names)

    def _get_kasa_loss(self, adapter_names: str | list[str] | None = None) -> torch.Tensor | float:
        """KaSA's penalty, to be added to the loss of training; 0.0 if no adapter uses KaSA.

        Args:
            adapter_names: which adapters; the active ones by default. Unknown ones have none.
        """
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        layers = (holder for _, holder in self.holders if isinstance(holder, LoraLayer))
        return kasa_loss(layers, self.peft_config, names)

    def _add_modules_to_save_to_tie(self, peft_config: LoraConfig, tied_weight_keys: list[str]) -> None:
        save_tied_copies(peft_config, tied_weight_keys, input_embedding_name(self.model))

    def _add_targets_to_tie(self, peft_config: LoraConfig, tied_weight_keys: list[str]) -> None:
        """Target the embedding, and let what is tied to it share its factors."""
        embedding = input_embedding_name(self.model)
        targets = peft_config.target_modules
        if isinstance(targets, str):
            peft_config.target_modules = f"(?:{targets})|{re.escape(embedding)}"
        else:
            kept = {entry for entry in targets if not any(is_suffix(name, entry) for name in tied_weight_keys)}
            peft_config.target_modules = kept | {embedding}
        peft_config.target_modules_to_tie = tied_weight_keys


__all__ = [
    "LoraModel",
    "add_lora_tp_hooks_dtensor",
    "dispatch_default",
    "dispatch_megatron",
    "get_tp_plan_and_mesh",
]
