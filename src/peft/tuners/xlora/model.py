"""The X-LoRA model (arXiv 2402.07148): LoRA experts, and a classifier that weights them for each token.

Each forward of the base model is two. The first, without gradient, gives the hidden states that the classifier reads; in
the second the experts' terms are weighted by what it says.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from ...engine.backends import make_trainable
from ...engine.checkpoint import set_peft_model_state_dict
from ...engine.layer import deferred_parameters
from ...engine.lifecycle import Entry, entries_of, set_trains
from ...engine.tuner import BaseTuner
from ...engine.undo import Undo
from ...utils.constants import DUMMY_TARGET_MODULES
from ..lora.layer import Embedding, Linear, LoraLayer, _ConvNd
from ..lora.model import LoraModel
from .classifier import XLoraClassifier
from .config import XLoraConfig
from .experts import read_experts
from .layer import (
    NO_EXPERTS,
    SCALINGS,
    XLoraConv2dLayer,
    XLoraEmbeddingLayer,
    XLoraLayer,
    XLoraLinearLayer,
)

XLORA_LAYERS: dict[type[LoraLayer], type[XLoraLayer]] = {
    Linear: XLoraLinearLayer,
    Embedding: XLoraEmbeddingLayer,
    _ConvNd: XLoraConv2dLayer,
}
CACHES = ("past_key_values", "cache", "cache_params")
"""Arguments by which models take what they computed for earlier tokens."""


def convert_layers_to_xlora(base: nn.Module, xloramodel: XLoraModel, config: XLoraConfig) -> int:
    """Let the LoRA layers of a model weight their adapters.

    Args:
        base: the model.
        xloramodel: the X-LoRA model that it is in.
        config: options.

    Returns:
        The number L of these layers.

    Raises:
        ValueError: a LoRA layer whose terms cannot be weighted token by token.
    """
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if not isinstance(layer, tuple(XLORA_LAYERS)):
            raise ValueError(
                f"X-LoRA cannot weight the experts of {layer.called!r} token by token: it is a {type(layer).__name__}, and "
                "linear layers, embeddings and convolutions can be."
            )
    for number, layer in enumerate(layers):
        weighted_cls = next(weighted for cls, weighted in XLORA_LAYERS.items() if isinstance(layer, cls))
        weighted = weighted_cls(
            model=xloramodel, target=layer, target_forward=layer.forward, layer_number=number, config=config
        )
        layer.forward = weighted.forward
    return len(layers)


class XLoraModel(BaseTuner):
    """A base model with LoRA experts and the classifier that weights them.

    The experts are the adapters of a `LoraModel` inside; attributes that this one does not have are that one's. All of
    them are always active.

    Args:
        model: the base model; it is changed in place.
        config: an `XLoraConfig`, or a dictionary with it under the adapter's name.
        adapter_name: the name of the X-LoRA adapter.
        torch_device: where the experts' weights are read to.
        ephemeral_gpu_offload: of the experts' runtime configuration.
        autocast_adapter_dtype: keep half-precision weights of the experts in float32.
        kwargs: of no effect.

    Raises:
        ValueError: the base model uses a cache; a number as name; experts that are missing or not usable. The model is as
            it was.
    """

    prefix: ClassVar[str] = "xlora_"
    forwards_to = "lora_model"
    inner_tuner_name: ClassVar[str] = "lora_model"
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: XLoraConfig | dict[str, XLoraConfig],
        adapter_name: str,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        config = config[adapter_name] if isinstance(config, dict) else config
        if getattr(getattr(model, "config", None), "use_cache", False):
            raise ValueError(
                "X-LoRA runs each forward twice, which a cache of keys and values cannot serve. Set model.config.use_cache "
                "to False."
            )
        if adapter_name.isdecimal():
            raise ValueError(
                f"The experts of an X-LoRA model are adapters called by numbers, so {adapter_name!r} cannot be its own name."
            )
        experts = read_experts(config, torch_device, ephemeral_gpu_offload)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.xlora_config, self.xlora_adapter = config, adapter_name
        self.experts = {str(expert.number): expert.number for expert in experts}
        """The adapter of each expert -> its number, in the order of `config.adapters`."""
        self.disabled = False
        self.internal_xlora_scalings: torch.Tensor | None = None
        self._running = False
        """Whether the pass that the classifier reads is running."""
        self._watching = False
        """Whether forwards of the base model are preceded by that pass."""
        self._trained_before_disabling: list[bool] | None = None
        with Undo() as undo:
            undo.push(_take_out, self, trainable)
            for expert in experts:
                # What an expert's start takes out of the base weights must be taken out; other starts are not needed.
                with deferred_parameters(not LoraModel.changes_base_at_start(expert.config)):
                    self._inject(model, str(expert.number), expert.config)
                expert.fill(self.lora_model, autocast_adapter_dtype)
            self.lora_model.set_adapter(list(self.experts), inference_mode=not config.use_trainable_adapters)
            layers = convert_layers_to_xlora(model, self, config)
            device = next(model.parameters()).device
            self.internal_xlora_classifier = XLoraClassifier(model, config, len(experts), layers, device)
        if not config.inference_mode:
            make_trainable(model)
        self.peft_config = self.lora_model.peft_config
        self.peft_config.put_back({adapter_name: config, **self.peft_config})
        self.active_adapter = adapter_name
        self.eval()

    def _inject(self, model: nn.Module, name: str, config: Any) -> None:
        if "lora_model" not in self._modules:
            self.lora_model = LoraModel(model, config, name)
            return
        self.lora_model.peft_config[name] = config
        self.lora_model.inject_adapter(model, name)

    @staticmethod
    def changes_base_at_start(config: XLoraConfig) -> bool:
        """Yes, as far as loading is concerned: the experts are loaded at the start, and some may change the base."""
        return True

    # ------------------------------------------------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the experts weighted by the classifier."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.lora_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate, without a cache."""
        kwargs["use_cache"] = False
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.lora_model.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *generate_args: Any, **generate_kwargs: Any) -> Iterator[None]:
        """Context in which each forward of the base model is preceded by the pass that the classifier reads.

        Raises:
            ValueError: a mixed batch, which has no experts to weight.
        """
        if generate_kwargs.get("adapter_names") is not None:
            raise ValueError("X-LoRA weights all experts for every token, so adapter_names cannot choose among them.")
        if self.disabled or self._watching:
            yield
            return
        self._watching = True
        with ExitStack() as given:

            def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                if self._running:
                    return
                given.close()
                given.enter_context(self.call_inputs(**{SCALINGS: self._weigh(args, kwargs)}))

            handle = self.lora_model.model.register_forward_pre_hook(before_forward, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
                self._watching = False

    def _weigh(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The classifier's weights for the arguments of a forward of the base model."""
        classifier = self.internal_xlora_classifier
        inputs = {
            "input_ids": kwargs.get("input_ids", args[0] if args else None),
            "inputs_embeds": kwargs.get("inputs_embeds"),
        }
        result = self._scaling_pass(classifier, inputs, args, kwargs)
        scalings = classifier(result, **inputs)
        self.internal_xlora_scalings = scalings.detach()
        return scalings

    @torch.no_grad()
    def _scaling_pass(self, classifier: XLoraClassifier, inputs: dict[str, Any], args: tuple, kwargs: dict) -> Any:
        """The base model's output with constant weights of the experts, hidden states included.

        Raises:
            ValueError: a cache is given, which would hold what the experts gave with other weights.
        """
        given = [name for name in CACHES if _length_of(kwargs.get(name))]
        if given:
            raise ValueError(f"X-LoRA runs each forward twice, which a cache cannot serve: leave {given[0]} out.")
        options = {name: value for name, value in kwargs.items() if name not in ("labels", *CACHES)}
        options |= {"output_hidden_states": True, "return_dict": True}
        if "use_cache" in options:
            options["use_cache"] = False
        constant = NO_EXPERTS if classifier.scaling_pass_value == 0 else classifier.make_dummy_scalings(**inputs)
        self._running = True
        try:
            with self.call_inputs(**{SCALINGS: constant}):
                return self.lora_model.model(*args, **options)
        finally:
            self._running = False

    # --------------------------------------------------------------------------------------------------------- life cycle

    def enable_adapter_layers(self) -> None:
        """Use the experts again, and train what trained before."""
        super().enable_adapter_layers()
        self.disabled = False
        flags, self._trained_before_disabling = self._trained_before_disabling, None
        if flags is not None:
            for parameter, flag in zip(self.internal_xlora_classifier.parameters(), flags):
                set_trains(parameter, flag)

    def disable_adapter_layers(self) -> None:
        """Use the base model alone; nothing trains."""
        super().disable_adapter_layers()
        self.disabled = True
        if self._trained_before_disabling is None:
            parameters = list(self.internal_xlora_classifier.parameters())
            self._trained_before_disabling = [parameter.requires_grad for parameter in parameters]
            for parameter in parameters:
                set_trains(parameter, False)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """The one X-LoRA adapter, with all its experts, is active already; see that it trains, or does not.

        Args:
            adapter_name: its name.
            inference_mode: train nothing.

        Raises:
            ValueError: another name.
        """
        if adapter_name not in (self.xlora_adapter, [self.xlora_adapter]):
            raise ValueError(
                f"An X-LoRA model uses all its experts {list(self.experts)} at once, as its adapter {self.xlora_adapter!r}; "
                f"{adapter_name!r} cannot be set. To use one expert, load it as a LoRA adapter."
            )
        frozen = inference_mode or not self.xlora_config.use_trainable_adapters
        self.lora_model.set_adapter(list(self.experts), inference_mode=frozen)
        for parameter in self.internal_xlora_classifier.parameters():
            set_trains(parameter, not inference_mode)
        if not inference_mode:
            make_trainable(self.lora_model.model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Not possible: an X-LoRA model has one adapter, which is made with it.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"An X-LoRA model has one adapter, {self.xlora_adapter!r}; {adapter_name!r} cannot be added. Name its experts in "
            "XLoraConfig.adapters, or wrap another base model."
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Not possible: the classifier has been made for its experts.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{adapter_name!r} cannot be deleted: an X-LoRA model is its adapter {self.xlora_adapter!r} with the experts "
            f"{list(self.experts)}. Call unload() for the base model."
        )

    def shared_state_entries(self, adapter: str) -> Iterator[Entry]:
        """The classifier's tensors, which are what is saved for the X-LoRA adapter; the experts have files of their own."""
        if adapter == self.xlora_adapter:
            holder = nn.ModuleDict({"layers": self.internal_xlora_classifier.layers})
            for entry in entries_of(holder, "internal_xlora_classifier", "layers"):
                yield entry.saved_as(entry.live)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No for the X-LoRA adapter, whose weights differ by token."""
        return adapter_name in self.experts and self.lora_model.supports_lora_conversion(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep half-precision weights of the experts in float32, or in the base layers' dtype."""
        for name in self.experts:
            self.lora_model._cast_adapter_dtype(name, autocast_adapter_dtype)
            for _, holder in () if autocast_adapter_dtype else self.holders:
                holder._move_adapter_to_device_of_base_layer(name)

    # -------------------------------------------------------------------------------------------------------------- options

    def set_topk_lora(self, value: int | None) -> None:
        """Let each token use its `value` most heavily weighted experts only; None for all."""
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set what multiplies the experts' terms."""
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """What multiplies the experts' terms."""
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Set the weight of every expert in the pass that the classifier reads; None for 1/n."""
        self.xlora_config.scaling_pass_value = 1 / len(self.experts) if value is None else value

    def get_latest_scalings(self) -> torch.Tensor | None:
        """The weights of the latest forward, (B, T, L, n); None before the first."""
        return self.internal_xlora_scalings

    # ------------------------------------------------------------------------------------------------------------------ log

    def enable_scalings_logging(self) -> None:
        """Keep the weights of each forward from now on."""
        self.internal_xlora_classifier.scalings_logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no more weights; those that were kept stay."""
        self.internal_xlora_classifier.scalings_logging = False

    def clear_scalings_log(self) -> None:
        """Forget the weights that were kept."""
        self.internal_xlora_classifier.log_scalings.clear()

    def get_scalings_log(self) -> list[torch.Tensor]:
        """The weights that were kept, one tensor (B, T, L, n) per forward, in a list of its own."""
        return copy.copy(self.internal_xlora_classifier.log_scalings)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """The same by number of tokens T: their positions in the log, and the tensors."""
        return self.internal_xlora_classifier.bucketed_log()


def _length_of(cache: Any) -> int:
    """How many tokens a cache holds."""
    if cache is None:
        return 0
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else len(cache)


def _take_out(tuner: XLoraModel, trainable: list[nn.Parameter]) -> None:
    if "lora_model" in tuner._modules:
        tuner.lora_model.unload()
    for parameter in trainable:
        parameter.requires_grad_(True)


__all__ = [
    "DUMMY_TARGET_MODULES",
    "BaseTuner",
    "LoraLayer",
    "LoraModel",
    "XLoraClassifier",
    "XLoraConfig",
    "XLoraConv2dLayer",
    "XLoraEmbeddingLayer",
    "XLoraLinearLayer",
    "XLoraModel",
    "convert_layers_to_xlora",
    "set_peft_model_state_dict",
]
