"""Arrow: routing tokens to LoRA experts without training a router (arXiv 2405.11157), with GenKnowSub.

The prototype of an expert is the input direction that its B·A amplifies most. A token is given to the `top_k` experts
whose prototypes it is most aligned with, the sign not counting, and their outputs are mixed by a softmax:

    c = softmax(top_k |x·Pᵀ| / temperature)        y = W·x + Σ_e c_e · s_e · B_e·A_e·x

GenKnowSub takes the average of general-knowledge adapters out of the experts' factors: A_e - mean A_g, B_e - mean B_g.
That is done on the way; the experts themselves stay as they were trained, and are saved so.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from ...engine.lifecycle import holders_of
from ...engine.undo import Undo
from ...utils.constants import CONFIG_NAME
from ...utils.error import TooFewExpertsError
from .config import ArrowConfig, LoraConfig
from .variant import LoraVariant, is_plain, register_variant

if TYPE_CHECKING:
    from ...peft_model import PeftModel
    from .layer import LoraLayer

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"
ROUTER_NAME = "arrow_router"

_GENERAL = re.compile(re.escape(GKS_ADAPTER_PREFIX) + r"\d+")

Factors = tuple[list[torch.Tensor], list[torch.Tensor]]
"""A (r, in) and B (out, r) of several adapters."""


def stacked(A: list[torch.Tensor], B: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of several adapters as (E, r, in) and (E, out, r), lower ranks padded by zeros."""
    rank = max(len(factor) for factor in A)
    return (
        torch.stack([F.pad(factor, (0, 0, 0, rank - len(factor))) for factor in A]),
        torch.stack([F.pad(factor, (0, rank - factor.shape[1])) for factor in B]),
    )


class ArrowLoraLinearLayer(nn.Module):
    """The router of one layer. It has no weights: prototypes are found in the experts when they are first needed.

    Args:
        in_features: of the layer.
        arrow_config: its settings.
    """

    called = "The Arrow router"
    """What messages call it."""
    prototypes: torch.Tensor | None
    owners: torch.Tensor | None

    def __init__(self, in_features: int, arrow_config: ArrowConfig) -> None:
        super().__init__()
        self.in_features = in_features
        self.top_k, self.temperature = arrow_config.top_k, arrow_config.router_temperature
        self.use_gks = arrow_config.use_gks
        self.task_adapter_names = list(arrow_config.task_adapter_names or ())
        self.gks_adapter_names = list(arrow_config.gks_adapter_names or ())
        self.rng_seed = arrow_config.rng_seed
        if self.rng_seed is None:  # one start for all times that prototypes are found
            self.rng_seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        self.cast_input_dtype_enabled = True
        self.register_buffer("prototypes", None, persistent=False)
        self.register_buffer("owners", None, persistent=False)  # the expert that each row of the joined A belongs to

    # ------------------------------------------------------------------------------------------------------ the experts

    def on_adapter_change(self, lora_A: Mapping[str, nn.Module], lora_B: Mapping[str, nn.Module]) -> None:
        """Take the adapters that there are now, general-knowledge ones left out, as the experts.

        Args:
            lora_A, lora_B: the layer's factors by adapter name.
        """
        general = set(self.gks_adapter_names)
        names = [name for name in lora_A if name not in general and not _GENERAL.fullmatch(name)]
        self.task_adapter_names = [name for name in names if name in lora_B and name != ROUTER_NAME]
        self.prototypes = None

    def gen_know_sub(self, lora_A: Mapping[str, nn.Module], lora_B: Mapping[str, nn.Module]) -> Factors:
        """The experts' factors, without what the general-knowledge adapters have on average if that is asked for.

        Args:
            lora_A, lora_B: the layer's factors by adapter name; they are not changed.

        Raises:
            ValueError: general-knowledge adapters are missing, or have another rank than the experts.
        """
        tasks, general = self.task_adapter_names, self.gks_adapter_names
        A, B = ([factors[name].weight for name in tasks] for factors in (lora_A, lora_B))
        if not self.use_gks:
            return A, B
        if not general:
            raise ValueError(
                f"{self.called} is to subtract general-knowledge adapters (use_gks), but the gks_adapter_names of its "
                "ArrowConfig name none. Make it by create_arrow_model(..., general_adapter_paths=...), or with use_gks=False."
            )
        missing = [name for name in general if name not in lora_A]
        if missing:
            raise ValueError(
                f"{self.called} subtracts the general-knowledge adapters {general} (use_gks), of which {missing} are not "
                "here. Load them under these names, or make the router with use_gks=False."
            )
        ranks = {name: len(lora_A[name].weight) for name in (*tasks, *general)}
        if len(set(ranks.values())) > 1:
            raise ValueError(
                f"{self.called} needs experts and general-knowledge adapters of one rank (use_gks), got {ranks}."
            )
        shared_A, shared_B = (
            torch.stack([factors[name].weight for name in general]).mean(0) for factors in (lora_A, lora_B)
        )
        return [factor - shared_A for factor in A], [factor - shared_B for factor in B]

    # ------------------------------------------------------------------------------------------------------- prototypes

    def top_right_singular_vec_from_BA(
        self, A: torch.Tensor, B: torch.Tensor, iters: int = 15, eps: float = 1e-8
    ) -> torch.Tensor:
        """The right singular vector of B·A to its largest singular value, by power iteration on Aᵀ·(BᵀB)·A in float32.

        Args:
            A: (..., r, in).
            B: (..., out, r).
            iters: steps of the iteration.
            eps: added to norms.

        Returns:
            (..., in), of length one, in the dtype of A.
        """
        factor_A, gram = A.float(), B.float().mT @ B.float()
        start = torch.randn(A.shape[-1], generator=torch.Generator("cpu").manual_seed(self.rng_seed), device="cpu")
        v = start.to(A.device).expand(*A.shape[:-2], 1, -1)
        v = v / (v.norm(dim=-1, keepdim=True) + eps)
        for _ in range(iters):
            v = v @ factor_A.mT @ gram @ factor_A
            v = v / (v.norm(dim=-1, keepdim=True) + eps)
        return v.squeeze(-2).to(A.dtype)

    def build_prototypes(self, lora_A: Mapping[str, nn.Module], lora_B: Mapping[str, nn.Module]) -> None:
        """Find the experts' prototypes (E, in).

        Args:
            lora_A, lora_B: the layer's factors by adapter name.
        """
        # Also while an inference is running: the prototypes must serve a forward with gradients afterwards.
        with torch.inference_mode(False), torch.no_grad():
            A, B = stacked(*self.gen_know_sub(lora_A, lora_B))
            self.prototypes = self.top_right_singular_vec_from_BA(A, B)
            ranks = torch.tensor([len(lora_A[name].weight) for name in self.task_adapter_names])
            self.owners = torch.arange(len(ranks)).repeat_interleave(ranks).to(A.device)

    # ---------------------------------------------------------------------------------------------------------- forward

    def _cast_input_dtype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype) if self.cast_input_dtype_enabled else x

    def coefficients(self, x: torch.Tensor) -> torch.Tensor:
        """How much of each expert a token gets.

        Args:
            x: tokens, (..., in).

        Returns:
            (..., E), zero for all but `top_k`.
        """
        similarity = (x @ self.prototypes.to(x.dtype).T).abs()
        best, experts = similarity.topk(self.top_k, dim=-1)
        shares = (best / self.temperature).softmax(-1).to(similarity.dtype)
        return torch.zeros_like(similarity).scatter(-1, experts, shares)

    def forward(
        self,
        x: torch.Tensor,
        lora_A: Mapping[str, nn.Module],
        lora_B: Mapping[str, nn.Module],
        dropout: nn.Module,
        scaling: Mapping[str, float],
    ) -> torch.Tensor:
        """What the experts add to the layer's output.

        Args:
            x: the layer's input, (..., in).
            lora_A, lora_B: the layer's factors by adapter name.
            dropout: applied to the mixed output.
            scaling: s by adapter name.

        Returns:
            (..., out).

        Raises:
            TooFewExpertsError: there are fewer experts than `top_k`; a ValueError and a RuntimeError.
        """
        names = self.task_adapter_names
        if self.top_k > len(names):
            raise TooFewExpertsError(
                f"{self.called} is to give each token to top_k={self.top_k} experts, but there are {len(names)}: {names}. "
                f"Give ArrowConfig a top_k of at most {len(names)}, or load more experts."
            )
        if self.prototypes is None:
            self.build_prototypes(lora_A, lora_B)
        A, B = self.gen_know_sub(lora_A, lora_B)
        x = self._cast_input_dtype(x, A[0].dtype)
        c = self.coefficients(x)
        # Σ c_e·s_e·B_e·A_e·x as two products, with all A_e below one another and all s_e·B_e beside one another.
        hidden = F.linear(x, torch.cat(A)) * c[..., self.owners]
        mixed = F.linear(hidden, torch.cat([scaling[name] * factor for name, factor in zip(names, B)], dim=1))
        for position, name in enumerate(names):
            if getattr(lora_B[name], "bias", None) is not None:
                mixed = mixed + c[..., position : position + 1] * scaling[name] * lora_B[name].bias
        return dropout(mixed)


@register_variant("arrow_config", kinds=("linear", "conv1d_transformers"))
class ArrowLinearVariant(LoraVariant):
    """Arrow on a linear layer. The router adapter's own factors are of no use, and do not train."""

    containers: ClassVar[dict[str, Callable[[], Any]]] = {"lora_arrow": nn.ModuleDict}
    frozen_containers = ("lora_A", "lora_B")

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        router = ArrowLoraLinearLayer(module.in_features, config.arrow_config)
        router.called = f"{module.called}: the Arrow router {adapter_name!r}"
        module.lora_arrow[adapter_name] = router

    @staticmethod
    def adapters_changed(module: LoraLayer, adapter_name: str) -> None:
        if adapter_name in module.lora_arrow:
            module.lora_arrow[adapter_name].on_adapter_change(*_routable(module))

    @staticmethod
    def forward(
        module: LoraLayer, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        router = module.lora_arrow[active_adapter]
        if not router.task_adapter_names:
            _check_experts_elsewhere(module, active_adapter)
            return result
        router.cast_input_dtype_enabled = module.cast_input_dtype_enabled
        dropout = module.lora_dropout[active_adapter]
        return result + router(x, *_routable(module), dropout=dropout, scaling=module.scaling)

    @staticmethod
    def delta_weight(module: LoraLayer, active_adapter: str) -> NoReturn:
        _refuse_merging(module, active_adapter)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> NoReturn:
        _refuse_merging(module, active_adapter)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> NoReturn:
        _refuse_merging(module, active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> NoReturn:
        _refuse_merging(module, active_adapter)

    def supports_lora_conversion(self) -> bool:
        return False


def _refuse_merging(module: LoraLayer, adapter: str) -> NoReturn:
    raise RuntimeError(
        f"{module.called}: the Arrow router {adapter!r} chooses experts per token and has no merged weight. Activate and "
        "merge a single expert, or unload()."
    )


def _routable(module: LoraLayer) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The factors of the adapters that are no routers and whose output is s·B(A(x))."""
    names = [
        name for name in module.lora_A if name not in module.lora_arrow and is_plain(module.lora_variant.get(name))
    ]
    return {name: module.lora_A[name] for name in names}, {name: module.lora_B[name] for name in names}


def _check_experts_elsewhere(module: LoraLayer, adapter: str) -> None:
    """Raise unless other layers have experts, so that it is right for this one to have none."""
    router = module.lora_arrow[adapter]
    others = set(module.roster.holders) - set(module.lora_arrow) - set(router.gks_adapter_names)
    if not others:
        raise TooFewExpertsError(
            f"The Arrow router {adapter!r} has no experts to route to: a router is saved without them. Load each, as in "
            f"model.load_adapter(path, adapter_name='{TASK_ADAPTER_PREFIX}0'), or use create_arrow_model."
        )


# ------------------------------------------------------------------------------------------------------- making a model


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA experts into a model and route between them.

    The experts become the adapters `task_0`, `task_1`, ..., the general-knowledge adapters `gks_0`, ..., and the router,
    which is active, `arrow_router`. Adapters that are added later join the experts.

    Args:
        base_model: the model that the experts were trained on; it is changed in place.
        task_specific_adapter_paths: folders of the experts, or `user/repository[/sub/folder]` on the hub.
        arrow_config: settings of the router; it takes note of the adapters' names.
        general_adapter_paths: the same of the general-knowledge adapters; used with `use_gks`.
        adapter_kwargs: for `PeftModel.from_pretrained` and `load_adapter`; a `subfolder` goes before one in a path.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: no experts, `use_gks` without general-knowledge adapters, a folder without an adapter, or experts
            that do not go together. Whatever is raised, the base model is as it was.
        TypeError: an expert adapts a layer that is not linear.
    """
    if not task_specific_adapter_paths:
        raise ValueError("task_specific_adapter_paths is empty; Arrow needs at least one expert to route to.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks subtracts general-knowledge adapters, so it needs general_adapter_paths.")
    general = general_adapter_paths if arrow_config.use_gks else []
    sources = {f"{TASK_ADAPTER_PREFIX}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    sources |= {f"{GKS_ADAPTER_PREFIX}{i}": path for i, path in enumerate(general)}
    located = {name: _locate(path, adapter_kwargs) for name, path in sources.items()}
    with Undo() as undo:
        model = _load_all(base_model, located, undo)
        targets, rank = check_loaded_lora_compatibility_arrow(model, list(sources))
        ensure_adapters_target_linear_layers_only(model, list(sources))
        undo.push(arrow_config.__dict__.update, dict(vars(arrow_config)))
        arrow_config.task_adapter_names = [name for name in sources if name.startswith(TASK_ADAPTER_PREFIX)]
        arrow_config.gks_adapter_names = [name for name in sources if name.startswith(GKS_ADAPTER_PREFIX)]
        _warn_of_copies(model, list(sources))
        model.add_adapter(ROUTER_NAME, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=rank))
        model.set_adapter(ROUTER_NAME)
    return model


def _locate(path: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder or repository of an adapter, and the options to load it with."""
    path = os.fspath(path)
    if os.path.isdir(path):
        folder = os.path.join(path, options.get("subfolder") or "")
        if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            raise ValueError(f"There is no adapter in the folder {folder!r}: it has no {CONFIG_NAME}.")
        return path, options
    if os.path.isabs(path) or path.startswith("."):
        raise ValueError(f"There is no folder {path!r} to load an adapter from.")
    user, repository, *rest = (*path.split("/", 2), "")[:3]
    if not repository or not rest[0]:
        return path.rstrip("/"), options
    return f"{user}/{repository}", {"subfolder": rest[0], **options}


def _load_all(base_model: nn.Module, located: dict[str, tuple[str, dict[str, Any]]], undo: Undo) -> PeftModel:
    from ...peft_model import PeftModel  # lazy: it imports the methods

    trainable = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
    was_training = base_model.training
    (first, (source, options)), *others = located.items()
    model = PeftModel.from_pretrained(base_model, source, adapter_name=first, **options)
    undo.push(_give_back, model, trainable, was_training)
    for name, (source, options) in others:
        model.load_adapter(source, adapter_name=name, **options)
    return model


def _give_back(model: PeftModel, trainable: list[nn.Parameter], was_training: bool) -> None:
    (model.prompts if model._is_prompt_learning else model.base_model).unload()
    model.get_base_model().train(was_training)
    for parameter in trainable:
        parameter.requires_grad_(True)


def _warn_of_copies(model: PeftModel, adapter_names: list[str]) -> None:
    names = [name for name in adapter_names if getattr(model.peft_config[name], "modules_to_save", None)]
    if names:
        warnings.warn(
            f"The experts {names} have copies of modules (modules_to_save). A copy is used as a whole or not at all, so "
            "it is not routed to: with the router active, the base model's modules are used."
        )


def _layers_with(model: nn.Module, adapter_names: list[str]) -> dict[str, dict[str, LoraLayer]]:
    """Adapter name -> name and layer of each LoRA layer that holds it."""
    from .layer import LoraLayer  # lazy: it imports the variants

    layers = {name: layer for name, layer in holders_of(model) if isinstance(layer, LoraLayer)}
    found = {
        adapter: {name: layer for name, layer in layers.items() if adapter in layer._get_available_adapters()}
        for adapter in adapter_names
    }
    without = [adapter for adapter, held in found.items() if not held]
    if without:
        known = sorted({adapter for layer in layers.values() for adapter in layer._get_available_adapters()})
        raise ValueError(f"No LoRA layer holds the adapters {without}; known are {known}.")
    return found


def check_loaded_lora_compatibility_arrow(model: nn.Module, adapter_names: list[str]) -> tuple[list[str], int]:
    """Raise unless adapters can be routed between: plain LoRA of one rank on the same modules.

    Args:
        model: a model with the adapters.
        adapter_names: at least one.

    Returns:
        The last parts of the names of the modules that they adapt, sorted, and their rank.

    Raises:
        ValueError: an adapter that is not there, or adapters that differ; the message says in what.
    """
    found = _layers_with(model, adapter_names)
    first, expected = next(iter(found.items()))
    for adapter, layers in found.items():
        if layers.keys() != expected.keys():
            extra, lacking = sorted(layers.keys() - expected.keys()), sorted(expected.keys() - layers.keys())
            raise ValueError(
                f"Arrow's experts must adapt the same modules, but {adapter!r} adapts {extra} more than {first!r} and "
                f"{lacking} less."
            )
        for name, layer in layers.items():
            _check_factors(layer, name, adapter, first)
    targets = sorted({name.rsplit(".", 1)[-1] for name in expected})
    return targets, next(iter(expected.values())).r[first]


def _check_factors(layer: LoraLayer, name: str, adapter: str, first: str) -> None:
    variant = layer.lora_variant.get(adapter)
    if not is_plain(variant):
        raise ValueError(
            f"{name}: the expert {adapter!r} is no plain LoRA adapter (it has a {type(variant).__name__})."
        )
    if layer.r[adapter] != layer.r[first]:
        raise ValueError(
            f"{name}: Arrow's experts must have one rank, got r={layer.r[adapter]} for {adapter!r} and "
            f"r={layer.r[first]} for {first!r}."
        )


def ensure_adapters_target_linear_layers_only(model: nn.Module, adapter_names: list[str]) -> None:
    """Raise unless adapters adapt linear layers only: `nn.Linear`, quantised or not, and transformers' `Conv1D`.

    Args:
        model: a model with the adapters.
        adapter_names: their names.

    Raises:
        TypeError: an adapter has another layer.
        ValueError: an adapter that is not there.
    """
    for adapter, layers in _layers_with(model, adapter_names).items():
        for name, layer in layers.items():
            if ("arrow_config",) not in layer.lora_variants:
                raise TypeError(
                    f"Arrow routes between experts on linear layers, but {adapter!r} adapts {name}, which is a "
                    f"{type(layer.get_base_layer()).__name__}."
                )
