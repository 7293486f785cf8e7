"""EVA (arXiv 2410.07170): A is the principal components of the layer's inputs, and ranks go where they explain most.

`get_eva_state_dict` finds the components by an incremental decomposition of the inputs, layer by layer and batch by batch,
until they stay as they are. `initialize_lora_eva_weights` puts them into an adapter.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, pad
from tqdm import tqdm

from ...engine.lifecycle import holders_of
from ...engine.matching import get_pattern_key
from ...engine.state import BASE_PREFIX
from ...utils.incremental_pca import IncrementalPCA
from ...utils.naming import near_misses
from .config import EvaConfig
from .eva_loading import ComponentLoading, check_components
from .initialisers import initialiser, zero_b
from .layer import Embedding, LoraLayer, MultiheadAttention, ParamWrapper, _ConvNd
from .preparation import linear_targets, mode

if TYPE_CHECKING:
    from .config import LoraConfig

UNSUPPORTED_LORA_MODULES = (Embedding, MultiheadAttention, _ConvNd)
"""Layers whose inputs are no vectors that A is multiplied by. They start as with `init_lora_weights=True`."""
SEED = 42
"""Of the randomised decompositions."""

LayerInputsFn = Callable[[Any, Any, str], torch.Tensor]


@initialiser("eva")
def eva(layer: LoraLayer, adapter: str, value: str, config: LoraConfig | None = None) -> None:
    """B zero; A is found by `initialize_lora_eva_weights` afterwards."""
    zero_b(layer, adapter)


# --------------------------------------------------------------------------------------------------- looking at inputs


class _Hook:
    """A forward hook that is shown a layer's inputs.

    Args:
        name: the layer's.
        prepare_layer_inputs_fn: makes a matrix (tokens, in) of the layer's inputs, what `model_input` is, and the name.
        gather_distributed_inputs: put together the inputs of all processes.
    """

    def __init__(
        self,
        name: str,
        prepare_layer_inputs_fn: LayerInputsFn | None = None,
        gather_distributed_inputs: bool = True,
    ) -> None:
        self.name, self.gather_distributed_inputs = name, gather_distributed_inputs
        self._prepare_layer_inputs_fn = prepare_layer_inputs_fn or self._prepare_layer_inputs_fn_default
        self.model_input: Any = None
        """What is known of the batch that is running."""

    @staticmethod
    def _prepare_layer_inputs_fn_default(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
        return first_tensor(layer_input, layer_name).flatten(0, -2)

    @torch.no_grad()
    def prepare_layer_inputs(self, layer_input: Any) -> torch.Tensor:
        """The layer's inputs as a matrix (tokens, in)."""
        return self._prepare_layer_inputs_fn(layer_input, self.model_input, self.name)

    def gather_layer_inputs(self, layer_input: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, if there are several."""
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        return _gathered(layer_input) if self.gather_distributed_inputs and parallel else layer_input


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    count = torch.distributed.get_world_size()
    here = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(here) for _ in range(count)]
    torch.distributed.all_gather(sizes, here)
    longest = int(max(sizes))
    parts = [rows.new_empty(longest, rows.shape[1]) for _ in range(count)]
    torch.distributed.all_gather(parts, pad(rows, (0, 0, 0, longest - len(rows))).contiguous())
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes)])


class SVDHook(_Hook):
    """Updates the principal components of a layer's inputs, and notes which of them have stayed as they were.

    Args:
        n_components: how many to follow.
        sim_thresh: cosine similarity from one batch to the next at which a component counts as converged.
        base_class_kwargs: as `_Hook` takes them.
    """

    def __init__(self, n_components: int, sim_thresh: float, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.n_components, self.sim_thresh = n_components, sim_thresh
        self.svd = IncrementalPCA(n_components, lowrank=True, lowrank_seed=SEED)
        self.converged = torch.zeros(n_components, dtype=torch.bool)
        self.updates = 0

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        rows = self.gather_layer_inputs(self.prepare_layer_inputs(input))
        if len(rows) < self.n_components:
            tqdm.write(
                f"Skipped a batch for {self.name}: it has {len(rows)} tokens, fewer than {self.n_components} components."
            )
            return
        before = self.svd.components_ if self.updates else None
        self.svd.partial_fit(rows.float())
        self.updates += 1
        if before is not None:
            self.converged = cosine_similarity(before, self.svd.components_) >= self.sim_thresh


class HashHook(_Hook):
    """Takes down a hash of each input of a layer, in `hashed_inputs`, so that layers with the same inputs are found."""

    def __init__(self, **base_class_kwargs: Any) -> None:
        super().__init__(**base_class_kwargs)
        self.hashed_inputs: list[int] = []

    @staticmethod
    def hash_fn(tensor: torch.Tensor) -> int:
        """A number that equal tensors have in common.

        Args:
            tensor: any.
        """
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")

    @torch.no_grad()
    def __call__(self, model: nn.Module, input: Any, output: Any) -> None:
        self.hashed_inputs.append(self.hash_fn(self.gather_layer_inputs(self.prepare_layer_inputs(input))))


def find_equal_values(dictionary: Mapping[Any, Hashable]) -> dict[Hashable, list[Any]]:
    """The values that several keys have, each with its keys.

    Args:
        dictionary: key to value.
    """
    keys: dict[Hashable, list[Any]] = {}
    for key, value in dictionary.items():
        keys.setdefault(value, []).append(key)
    return {value: found for value, found in keys.items() if len(found) > 1}


def get_device_with_meta_params(model: nn.Module) -> torch.device:
    """Where a model is, of which some parameters may be on the meta device.

    Args:
        model: the model.

    Raises:
        ValueError: all of them are.
    """
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    if device is None:
        raise ValueError("All parameters of the model are on the meta device; load its weights first.")
    return device


def move_inputs_to_device(inputs: Any, device: str | torch.device) -> Any:
    """Inputs with the tensors in them, in dictionaries, lists and tuples too, on a device; the rest stays as it is.

    Args:
        inputs: any.
        device: where to.
    """
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({key: move_inputs_to_device(value, device) for key, value in inputs.items()})
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(move_inputs_to_device(value, device) for value in inputs))
    if isinstance(inputs, list | tuple):
        return type(inputs)(move_inputs_to_device(value, device) for value in inputs)
    return inputs


def first_tensor(layer_input: Any, layer_name: str) -> torch.Tensor:
    """The input of a layer, or the first of several.

    Raises:
        TypeError: it is no tensor.
    """
    found = layer_input[0] if isinstance(layer_input, tuple | list) and layer_input else layer_input
    if not torch.is_tensor(found):
        raise TypeError(
            f"{layer_name} is called with a {type(found).__name__}, not with a tensor. Give a prepare_layer_inputs_fn that "
            "makes a matrix (tokens, in) of it."
        )
    return found


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model with its inputs by name.

    Args:
        model: the model.
        inputs: its keyword arguments.
    """
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: LoraConfig) -> torch.Tensor:
    """Which tokens of a batch to look at: those that are attended to and, if the configuration says so, have a label.

    Args:
        model_input: with `input_ids`, and perhaps `attention_mask` and `labels`.
        peft_config: the adapter's configuration.

    Returns:
        (tokens, 2): row and position of each.

    Raises:
        TypeError: `model_input` is no dictionary.
        ValueError: it has neither `input_ids` nor `attention_mask`.
    """
    if not isinstance(model_input, Mapping):
        raise TypeError(
            f"The model's inputs must be a dictionary, got a {type(model_input).__name__}. Give a prepare_model_inputs_fn of "
            "your own, or None."
        )
    mask = model_input.get("attention_mask")
    if mask is None:
        if "input_ids" not in model_input:
            raise ValueError(
                f"The model's inputs have neither attention_mask nor input_ids, but {sorted(model_input)}. Give a "
                "prepare_model_inputs_fn of your own, or None."
            )
        mask = torch.ones_like(model_input["input_ids"])
    mask, settings, labels = mask.bool(), peft_config.eva_config or EvaConfig(), model_input.get("labels")
    if settings.use_label_mask and labels is not None:
        mask = mask & (labels != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """The vectors of the tokens to look at.

    Args:
        layer_input: (rows, positions, in), or a tuple that starts with it.
        model_input: (tokens, 2): row and position of each.
        layer_name: for messages.

    Returns:
        (tokens, in).

    Raises:
        TypeError: `layer_input` is no tensor.
    """
    rows, positions = model_input.to(first_tensor(layer_input, layer_name).device).T
    return first_tensor(layer_input, layer_name)[rows, positions]


# ------------------------------------------------------------------------------------------------------- the components


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Mapping[str, LayerInputsFn]
    | LayerInputsFn
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """Find the principal components of the inputs of all layers to adapt, and how many each gets.

    Args:
        model: a model, or a `PeftModel` with a LoRA adapter.
        dataloader: gives batches; it is gone through again and again until the components have converged.
        peft_config: which layers to adapt and how; by default that of the adapter.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: says what `prepare_layer_inputs_fn` is to know of a batch; with None, a copy of it.
        prepare_layer_inputs_fn: makes a matrix (tokens, in) of the inputs of a layer, by what is known of the batch and the
            layer's name; with None, of all of them. Or a dictionary with the name of each layer that has one of its own.
        adapter_name: the adapter of a `PeftModel`.
        gather_distributed_inputs: look at the inputs of all processes together.
        show_progress_bar: show how many layers have converged.

    Returns:
        Name of each layer, in a `PeftModel` with its prefix, to (rank, in); the rank may be zero.

    Raises:
        ValueError: there is no configuration, no layer, an empty dataloader, no batch with enough tokens, or a name in
            `prepare_layer_inputs_fn` that no layer has. Whatever is raised, the model is as it was.
    """
    adapted = hasattr(model, "peft_config")
    if peft_config is None:
        if not adapted:
            raise ValueError("get_eva_state_dict needs a peft_config, since the model has no adapter.")
        peft_config = _config_of(model, adapter_name)
    layers = _layers_of(model, adapter_name) if adapted else _plain_layers(model, peft_config)
    if not layers:
        raise ValueError(
            f"EVA finds no layer to look at: target_modules={peft_config.target_modules} selects no linear layer."
        )
    search = _Search(
        model,
        {name: module for name, (module, _) in layers.items()},
        {name: rank for name, (_, rank) in layers.items()},
        peft_config,
        forward_fn,
        prepare_model_inputs_fn,
        _layer_functions(prepare_layer_inputs_fn, layers),
        gather_distributed_inputs,
    )
    with torch.no_grad(), mode(model, training=False), model.disable_adapter() if adapted else nullcontext():
        return search.run(dataloader, show_progress_bar)


def _config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}; known are {sorted(model.peft_config)}.")
    return model.peft_config[adapter_name]


Layers = dict[str, tuple[nn.Module, int]]
"""Name -> layer and rank."""


def _layers_of(model: nn.Module, adapter_name: str) -> Layers:
    return {
        name: (layer, layer.r[adapter_name])
        for name, layer in holders_of(model)
        if isinstance(layer, LoraLayer)
        and not isinstance(layer, (*UNSUPPORTED_LORA_MODULES, ParamWrapper))
        and adapter_name in layer.lora_A
    }


def _plain_layers(model: nn.Module, config: LoraConfig) -> Layers:
    if config.target_modules is None:
        config = copy.copy(config)
        config.target_modules = ".*"
    return {
        name: (module, config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r))
        for name, module in linear_targets(model, config)
    }


def _layer_functions(given: Any, layers: Layers) -> dict[str, LayerInputsFn | None]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(layers, given)
    unknown = sorted(given.keys() - layers.keys())
    if unknown:
        near = near_misses(unknown[0], layers)
        raise ValueError(
            f"prepare_layer_inputs_fn has names that no layer has: {unknown}.{f' Nearest: {near}.' if near else ''}"
        )
    return {name: given.get(name) for name in layers}


class _Search:
    """One search for components.

    Layers with the same inputs have the same components: the first of them finds them for all.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        ranks: dict[str, int],
        config: LoraConfig,
        forward_fn: Callable[[nn.Module, Any], Any] | None,
        prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None,
        prepare_layer_inputs_fns: dict[str, LayerInputsFn | None],
        gather: bool,
    ) -> None:
        self.model, self.layers, self.config = model, layers, config
        self.settings = config.eva_config or EvaConfig()
        self.forward_fn = forward_fn or forward_fn_dict
        self.prepare_model_inputs_fn = prepare_model_inputs_fn
        self.options = {
            name: {"name": name, "prepare_layer_inputs_fn": function, "gather_distributed_inputs": gather}
            for name, function in prepare_layer_inputs_fns.items()
        }
        self.device = get_device_with_meta_params(model)
        self.ranks = dict(ranks)
        """The rank of each layer, as it is distributed at the moment."""
        self.finder: dict[str, str] = {}
        """Each layer -> the one that finds its components."""
        self.hooks: dict[str, SVDHook] = {}
        """A layer that finds components -> what it has found."""

    def run(self, dataloader: Iterable, show_progress_bar: bool) -> dict[str, torch.Tensor]:
        first = next(iter(dataloader), None)
        if first is None:
            raise ValueError("The dataloader is empty.")
        self._look_for_equal_inputs(first)
        with tqdm(total=len(self.hooks), desc="EVA: converged layers", disable=not show_progress_bar) as bar:
            while pending := self._pending():
                updates = self._updates()
                for batch in dataloader:
                    self._forward(batch, {name: self.hooks[name] for name in pending})
                    self._redistribute()
                    pending = self._pending()
                    bar.update(len(self.hooks) - len(pending) - bar.n)
                    if not pending:
                        break
                if self._updates() == updates:
                    short = self.hooks[pending[0]]
                    raise ValueError(
                        f"No batch has as many tokens as EVA looks for components ({short.n_components} for {pending[0]}). Use "
                        "larger batches, or lower r or eva_config.rho."
                    )
        return {name: self._components(name) for name in self.finder}

    def _updates(self) -> int:
        return sum(hook.updates for hook in self.hooks.values())

    def _pending(self) -> list[str]:
        """The layers of which some component that they need has not converged."""
        needed = dict.fromkeys(self.hooks, 0)
        for name, finder in self.finder.items():
            needed[finder] = max(needed[finder], self.ranks[name])
        return [name for name, hook in self.hooks.items() if not hook.converged[: needed[name]].all()]

    def _forward(self, batch: Any, hooks: Mapping[str, _Hook]) -> None:
        batch = move_inputs_to_device(batch, self.device)
        prepare = self.prepare_model_inputs_fn
        known = copy.deepcopy(batch) if prepare is None else prepare(batch, self.config)
        for hook in hooks.values():
            hook.model_input = known
        with _hooked({self.layers[name]: hook for name, hook in hooks.items()}):
            self.forward_fn(self.model, batch)
        for hook in hooks.values():
            hook.model_input = None

    def _look_for_equal_inputs(self, batch: Any) -> None:
        hashes = {name: HashHook(**self.options[name]) for name in self.layers}
        self._forward(batch, hashes)
        inputs = {name: tuple(hook.hashed_inputs) for name, hook in hashes.items() if hook.hashed_inputs}
        groups = find_equal_values(inputs)
        limits: dict[str, int] = {}
        for name, seen in inputs.items():
            finder = self.finder[name] = groups[seen][0] if seen in groups else name
            limits[finder] = max(limits.get(finder, 0), self._max_components(name))
        self.ranks = {name: self.ranks[name] for name in self.finder}
        self.budget = sum(self.ranks.values())
        self.hooks = {
            name: SVDHook(n_components=limit, sim_thresh=self.settings.tau, **self.options[name])
            for name, limit in limits.items()
        }

    def _max_components(self, name: str) -> int:
        layer = self.layers[name]
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        width = getattr(layer, "in_features", None) or base.weight.shape[0]
        return min(round(self.ranks[name] * self.settings.rho), width)

    def _redistribute(self) -> None:
        """Give the ranks to the components that explain most, over all layers."""
        if not all(hook.updates for hook in self.hooks.values()):
            return
        explained = {name: hook.svd.explained_variance_ratio_.tolist() for name, hook in self.hooks.items()}
        entries = [(ratio, name) for name, finder in self.finder.items() for ratio in explained[finder]]
        counts = Counter(name for _, name in sorted(entries, reverse=True)[: self.budget])
        self.ranks = {name: counts[name] for name in self.finder}
        for name, finder in self.finder.items():  # the finder's is the largest of its group
            if self.ranks[finder] < self.ranks[name]:
                self.ranks[finder], self.ranks[name] = self.ranks[name], self.ranks[finder]

    def _components(self, name: str) -> torch.Tensor:
        svd, rank = self.hooks[self.finder[name]].svd, self.ranks[name]
        components = svd.components_[:rank]
        if self.settings.whiten:
            components = components / svd.singular_values_[:rank].sqrt().unsqueeze(1)
        return components.clone()


@contextmanager
def _hooked(hooks: dict[nn.Module, _Hook]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------- into the adapter


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Mapping[str, LayerInputsFn]
    | LayerInputsFn
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with `init_lora_weights="eva"` from the components of its layers' inputs.

    Each layer gets the rank that was found for it; where that is zero the adapter leaves the layer. The configuration
    says so afterwards.

    Args:
        model: a `PeftModel` with a LoRA adapter.
        dataloader: gives batches. Not needed with `eva_state_dict`.
        eva_state_dict: what `get_eva_state_dict` has found.
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs, show_progress_bar: as in
            `get_eva_state_dict`.
        adapter_name: the adapter.

    Raises:
        ValueError: the model is no `PeftModel`, has several active adapters or no such adapter, it starts otherwise, there
            is neither a dataloader nor a state dict, or the state dict does not fit. Whatever is raised, the model is as it
            was.
    """
    _check_model(model, adapter_name)
    config = _config_of(model, adapter_name)
    if config.init_lora_weights != "eva":
        raise ValueError(
            f"initialize_lora_eva_weights is for init_lora_weights='eva'; {adapter_name!r} has {config.init_lora_weights!r}."
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError(
                "initialize_lora_eva_weights needs a dataloader, or the eva_state_dict that was found with one."
            )
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            peft_config=config,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    components = {name.removeprefix(BASE_PREFIX): tensor for name, tensor in eva_state_dict.items()}
    layers = {name.removeprefix(BASE_PREFIX): layer for name, (layer, _) in _layers_of(model, adapter_name).items()}
    merged = [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(
            f"The adapter {adapter_name!r} is merged (into {merged[0]} and {len(merged) - 1} others) and cannot start over. "
            "Call unmerge_adapter() first."
        )
    check_components(components, layers)
    ComponentLoading(model.base_model, adapter_name, config).run(layers, components)


def _check_model(model: nn.Module, adapter_name: str) -> None:
    tuner = getattr(model, "base_model", None)
    if not hasattr(model, "peft_config") or not hasattr(tuner, "layer_options"):
        raise ValueError(
            f"initialize_lora_eva_weights needs a PeftModel with a LoRA adapter, got a {type(model).__name__}."
        )
    active = model.active_adapters
    if len(active) > 1:
        raise ValueError(f"initialize_lora_eva_weights needs one active adapter, but {active} are active.")
