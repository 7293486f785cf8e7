"""Configuration of LoRA and of its variants and initialisers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ...config import PeftConfig
from ...utils.peft_types import PeftType


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} of {type(config).__name__} must be positive, got {getattr(config, name)}.")


@dataclass
class LoraRuntimeConfig:
    """Settings of the running process, which are not saved.

    Args:
        ephemeral_gpu_offload: do DoRA's initial norms on an accelerator, moving weights there and back.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ initialisation (arXiv 2310.08659).

    Args:
        loftq_bits: bits of the quantised base weight.
        loftq_iter: alternating steps.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class ArrowConfig:
    """Arrow routing over LoRA experts (arXiv 2405.11157).

    Args:
        top_k: experts per token.
        router_temperature: divides the routing scores.
        use_gks: subtract the general-knowledge adapters first (GenKnowSub).
        task_adapter_names: the experts; set by `create_arrow_model`, and saved.
        gks_adapter_names: the general-knowledge adapters; set by `create_arrow_model`, and saved.
        rng_seed: seed of the power iteration that finds the experts' prototypes.

    Raises:
        ValueError: a number that is not positive.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "top_k", "router_temperature")


@dataclass
class BdLoraConfig:
    """Block-diagonal LoRA factors, which shard without communication.

    Args:
        target_modules_bd_a: modules whose A is block-diagonal.
        target_modules_bd_b: modules whose B is block-diagonal.
        nblocks: number of blocks.
        match_strict: whether a target in neither list is an error.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        if both:
            raise ValueError(
                f"{both} are in target_modules_bd_a and in target_modules_bd_b; only one factor is block-diagonal."
            )


@dataclass
class CordaConfig:
    """Context-oriented decomposition (arXiv 2406.05223).

    Args:
        cache_file: where the decomposition is kept.
        covariance_file: where the covariances are kept.
        corda_method: adapt to the context ("ipm") or preserve knowledge ("kpm").
        verbose: print shapes.
        use_float16_for_covariance: keep covariances in the dtype of the inputs; of use where that is a half one.
        prune_temporary_fields: drop what the preparation left on the modules.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class EvaConfig:
    """Explained-variance initialisation (arXiv 2410.07170).

    Args:
        rho: highest rank of a layer as a multiple of `r`.
        tau: cosine similarity at which a component counts as converged.
        use_label_mask: leave out tokens without a label.
        label_mask_value: the label of such tokens.
        whiten: whiten the components.
        adjust_scaling_factors: keep alpha / r as it was when ranks are redistributed.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"rho must be at least 1, got {self.rho}.")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be between 0 and 1, got {self.tau}.")


@dataclass
class LoraGAConfig:
    """Gradient-aligned initialisation (arXiv 2407.05000).

    Args:
        direction: which singular vectors of the gradient A and B take.
        scale: how they are scaled.
        stable_gamma: gamma of the "stable" scale.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class KasaConfig:
    """Knowledge-aware singular-value adaptation (arXiv 2412.06071).

    It takes as many singular components out of the base weights as the adapter has ranks, the smallest ones, and leaves
    them out when the adapter is disabled or unloaded; `peft.tuners.lora.kasa.restore_base_weights` puts them back.

    Args:
        beta: weight of the singular-value penalty.
        gamma: weight of the orthogonality penalty.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        if self.beta < 0 or self.gamma < 0:
            raise ValueError(f"beta and gamma must not be negative, got {self.beta} and {self.gamma}.")


@dataclass
class VeloraConfig:
    """Compressed activations for the backward pass (arXiv 2405.17991).

    Args:
        num_groups: sub-tokens that a token is split into; of each, one number is kept.
        scale: factor of the reconstruction.
        init_type: where the direction comes from that sub-tokens are projected on: the average sub-token of each step
            ("batch_average"), that of the first step ("batch_average_once") or a random one ("random").

    Raises:
        ValueError: a number that is not positive, or an unknown `init_type`.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        _check_positive(self, "num_groups", "scale")
        known = ("batch_average", "batch_average_once", "random")
        if self.init_type not in known:
            raise ValueError(f"init_type must be one of {known}, got {self.init_type!r}.")


@dataclass
class MontecloraConfig:
    """Monte-Carlo samples of the factor A (arXiv 2411.04358).

    Args:
        num_samples: samples of A that a training step mixes.
        use_entropy: add to the loss the sum of the squared mixture weights, which is least when they are equal.
        dirichlet_prior: parameter of the symmetric Dirichlet prior of the mixture weights.
        sample_scaler: scale of the noise.
        kl_loss_weight: weight of the divergences from the priors in the loss.
        buffer_size: of no effect on training. What is drawn ahead takes `buffer_size` times the memory of the noise, and
            gradient checkpointing cannot draw it again; each step draws its own.

    Raises:
        ValueError: a number that must be positive is not.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        _check_positive(self, "num_samples", "dirichlet_prior", "buffer_size")


SUB_CONFIGS: dict[str, type] = {
    "velora_config": VeloraConfig,
    "kasa_config": KasaConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
}

MUTATES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisers (by prefix) that change the base weight, so that they must run again when the adapter is loaded."""


def as_config(cls: type, value: Any, field_name: str) -> Any:
    """A nested configuration from what a file or a user gave for it."""
    if value is None or isinstance(value, cls):
        return value
    if isinstance(value, dict):
        takes = {entry.name: entry.init for entry in fields(cls)}
        try:
            config = cls(**{key: item for key, item in value.items() if takes.get(key)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{field_name}: {error}") from error
        for name in (key for key in value if takes.get(key) is False):
            # No argument, since it is found when the adapter is made; saved with it.
            setattr(config, name, value[name])
        return config
    raise TypeError(f"{field_name} must be a {cls.__name__} or a dictionary, got {type(value).__name__}.")


@dataclass
class LoraConfig(PeftConfig):
    """Low-rank adaptation (arXiv 2106.09685): W' = W + s·B·A with s = alpha / r.

    Args:
        r: rank.
        target_modules: names or dotted suffixes of the modules to adapt; a string is a regular expression for whole
            names; "all-linear" means every linear layer but the output.
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an input of A.
        fan_in_fan_out: whether the base layers store their weights (in, out); corrected by layer.
        bias: which biases train too: "none", "all", "lora_only".
        use_rslora: s = alpha / sqrt(r) (arXiv 2312.03732).
        modules_to_save: modules of which the adapter trains and saves a copy.
        init_lora_weights: how A and B start. True for uniform A and zero B, False for torch's defaults (not the
            identity), "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "corda", "lora_ga", "eva", "loftq", "mica".
        layers_to_transform: numbers of the layers in which suffixes count.
        layers_pattern: name of the list of layers that is numbered.
        rank_pattern: regular expression for the end of a name -> rank.
        alpha_pattern: regular expression for the end of a name -> alpha.
        megatron_config: configuration of Megatron's parallel layers.
        megatron_core: the module to take them from.
        trainable_token_indices: rows of the input embedding to train, or module name -> rows.
        loftq_config: settings of the initialiser "loftq".
        eva_config: settings of the initialiser "eva".
        corda_config: settings of the initialiser "corda".
        lora_ga_config: settings of the initialiser "lora_ga".
        use_dora: weight-decomposed adaptation (arXiv 2402.09353).
        velora_config: settings of the variant VeLoRA.
        alora_invocation_tokens: tokens after which the adapter acts (arXiv 2504.12397).
        use_qalora: group-wise A for quantised layers (arXiv 2309.14717).
        qalora_group_size: inputs per group.
        monteclora_config: settings of the variant MonteCLoRA.
        use_bdlora: settings of the variant BD-LoRA.
        arrow_config: settings of the variant Arrow.
        kasa_config: settings of the variant KaSA.
        layer_replication: ranges [start, end) of decoder layers to stack, weights shared.
        runtime_config: settings of the running process; not saved.
        lora_bias: give B a bias.
        target_parameters: names of bare parameters to adapt, as fused experts have them.
        ensure_weight_tying: keep copies and adapters of tied embeddings tied.

    Raises:
        ValueError: options that exclude each other.
        TypeError: `target_parameters` is a string.
    """

    fractional: ClassVar[tuple[str, ...]] = ("lora_alpha", "alpha_pattern")

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: (
        bool
        | Literal[
            "gaussian",
            "eva",
            "olora",
            "pissa",
            "pissa_niter_[number of iters]",
            "corda",
            "loftq",
            "orthogonal",
            "mica",
        ]
    ) = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: VeloraConfig | dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self._custom_modules: dict[type, type] | None = None
        self.monteclora_config = as_config(MontecloraConfig, self.monteclora_config, "monteclora_config")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters must be a list of names, got the string {self.target_parameters!r}.")
        for name in self.module_patterns:
            if getattr(self, name) is None:
                setattr(self, name, {})
        for name, cls in SUB_CONFIGS.items():
            setattr(self, name, as_config(cls, getattr(self, name), name))
        if self.ensure_weight_tying:
            self.modules_to_tie: list[str] | None = None
            self.target_modules_to_tie: list[str] | None = None
        self._check_selection()
        self._check_initialiser()
        self._check_combinations()

    def _check_selection(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} needs target_modules to be a list; a regular expression selects layers by itself "
                        f"(got {self.target_modules!r})."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform.")
        if self.use_dora and self.megatron_config:
            raise ValueError("use_dora and megatron_config exclude each other.")

    def _check_initialiser(self) -> None:
        init = self.init_lora_weights
        if init == "loftq":
            self._check_loftq()
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn(f"loftq_config is of no use with init_lora_weights={init!r} and is dropped.")
        else:
            for value, name, cls in (("eva", "eva_config", EvaConfig), ("corda", "corda_config", CordaConfig)):
                config = getattr(self, name)
                if init == value and config is None:
                    warnings.warn(f"init_lora_weights={value!r} without {name}; its defaults are used.")
                    setattr(self, name, cls())
                elif init != value and config is not None:
                    warnings.warn(f"{name} is of no use with init_lora_weights={init!r}.")

    def _check_loftq(self) -> None:
        import importlib.util

        if importlib.util.find_spec("scipy") is None:
            raise ImportError("init_lora_weights='loftq' needs scipy; pip install scipy.")
        if not self.loftq_config:
            raise ValueError("init_lora_weights='loftq' needs loftq_config=LoftQConfig(...).")
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = vars(self.loftq_config)

    def _check_combinations(self) -> None:
        if self.lora_bias:
            if not isinstance(self.init_lora_weights, bool):
                raise ValueError(f"lora_bias needs init_lora_weights True or False, got {self.init_lora_weights!r}.")
            if self.use_dora:
                raise ValueError("lora_bias and use_dora exclude each other: DoRA has no bias term.")
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            warnings.warn(f"alora_invocation_tokens act on causal language models, but task_type is {self.task_type}.")
        mutates = isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(MUTATES_BASE[:4])
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and mutates:
            warnings.warn(
                f"With use_rslora and a rank or alpha pattern, an adapter started by {self.init_lora_weights!r} cannot "
                "be converted to an ordinary one when it is saved."
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields but `runtime_config`, as they are saved."""
        result = super().to_dict()
        result.pop("runtime_config", None)
        return result

    def _register_custom_module(self, custom_mapping: dict[type, type]) -> None:
        """Adapt modules of a class with a layer class of the user's own.

        Args:
            custom_mapping: class of the base layer -> layer class, called as the built-in ones are.
        """
        self._custom_modules = {**(self._custom_modules or {}), **custom_mapping}
