"""Experts that older releases of transformers held as one module each, and newer ones fuse into single parameters.

A configuration or an adapter file from then names `experts.0.w1`, `experts.1.w1`, ...; now there is one parameter
`experts.gate_up_proj` of shape (experts, out, in) for two projections of all of them. What was fused, and under which
names it was known, is read from the model's weight conversions. Here configurations are brought up to date.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...engine.inspection import plain_modules
from ...engine.kinds import kind_of
from ...engine.matching import TargetMatcher, all_linear_names, condensed, get_pattern_key, is_suffix
from ...utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

FUSED_NAMES = ("gate_up_proj", "down_proj")
_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight")


@dataclass(frozen=True)
class FusedExperts:
    """One parameter of all experts, as a weight conversion of transformers makes it.

    Attributes:
        path: the end of its dotted name, such as `experts.gate_up_proj`.
        branches: what the projections in it were called, in the order in which it holds them.
        sources: the conversion's own patterns of their names.
        target: its own pattern of the parameter's name.
    """

    path: str
    branches: tuple[str, ...]
    sources: tuple[str, ...]
    target: str

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @classmethod
    def of(cls, conversion: Any) -> FusedExperts | None:
        """What a conversion fuses; None if it does something else."""
        operations = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
        if operations[:1] != ["MergeModulelist"] or set(operations) - {"MergeModulelist", "Concatenate", "Transpose"}:
            return None
        target, *others = conversion.target_patterns
        path = target.replace("\\.", ".").strip(".")
        found = [_EXPERT.search(source.replace("\\.", ".")) for source in conversion.source_patterns]
        if others or path.rpartition(".")[2] not in FUSED_NAMES or not all(found):
            return None
        return cls(path, tuple(match[1] for match in found), tuple(conversion.source_patterns), target)


def fused_experts(conversions: Iterable[Any]) -> list[FusedExperts]:
    """The fused parameters that weight conversions make."""
    return [fused for fused in map(FusedExperts.of, conversions) if fused is not None]


@dataclass(frozen=True)
class Site:
    """A parameter of a model that older names stand for.

    Attributes:
        path: its dotted name.
        short: the end of it by which all of its sort are targeted at once.
        old_names: what each branch of it was called: a list of spellings for each expert.
    """

    path: str
    short: str
    old_names: dict[str, list[list[str]]]


def _spellings(name: str, conversions: Iterable[Any]) -> list[str]:
    """A module's name, and what it was before plain renamings."""
    names = [name]
    for conversion in conversions:
        patterns = [*conversion.source_patterns, *conversion.target_patterns]
        if len(patterns) == 2 and all(re.fullmatch(r"[\w.]+", pattern) for pattern in patterns):
            old, new = patterns
            if new and new in f"{name}.":
                names.append(f"{name}.".replace(new, old).removesuffix("."))
    return names


def find_sites(model: nn.Module, conversions: list[Any]) -> list[Site]:
    """Every parameter of a model that older names stand for: fused experts, and the routers beside them.

    A router was a linear layer, and is a module of its own sort with a weight now.
    """
    groups = fused_experts(conversions)
    modules = dict(plain_modules(model))
    sites: list[Site] = []
    for path, module in modules.items():
        here = [(fused, f"{path}.{fused.name}") for fused in groups if fused.name in module._parameters]
        here = [(fused, full) for fused, full in here if is_suffix(full, fused.path)]
        for fused, full in here:
            count = module._parameters[fused.name].shape[0]
            bases = _spellings(path, conversions)
            names = {
                branch: [[f"{base}.{index}.{branch}" for base in bases] for index in range(count)]
                for branch in fused.branches
            }
            sites.append(Site(full, fused.name, names))
        gate = f"{path.rpartition('.')[0]}.gate"
        if here and _is_router(modules.get(gate)):
            sites.append(Site(f"{gate}.weight", "gate.weight", {"gate": [_spellings(gate, conversions)]}))
    return sites


def _is_router(module: nn.Module | None) -> bool:
    weight = None if module is None else module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and kind_of(module) is None


def _model_types(model: nn.Module) -> set[str]:
    configs = (getattr(module, "config", None) for module in model.modules())
    return {config.model_type for config in configs if getattr(config, "model_type", None)}


def means_experts_first(model: nn.Module) -> bool:
    """Whether names of projections mean the experts of this model even where other modules have them too."""
    from transformers import conversion_mapping

    families = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return any(name == "mixtral" or families.get(name) in ("mixtral", "qwen2_moe") for name in _model_types(model))


class _Selection:
    """What a configuration with older names selects: sites, and modules that still go by their names."""

    def __init__(self, config: Any, model: nn.Module, conversions: list[Any]) -> None:
        self.config = config
        self.names = [name for name, _ in plain_modules(model)]
        self.all_sites = find_sites(model, conversions)
        routers = {site.path.removesuffix(".weight") for site in self.all_sites if site.short == "gate.weight"}
        self.matcher = TargetMatcher(config)
        targets = config.target_modules
        self.everything = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        first = bool(self.all_sites) and means_experts_first(model)
        if self.everything:
            self.plain = sorted(all_linear_names(model, config.task_type))
            self.sites = self.all_sites if first else []
            return
        self.plain = [name for name in self.names if name not in routers and self._selects(name)]
        taken = set() if first else {name.rpartition(".")[2] for name in self.plain}
        self.sites = [site for site in self.all_sites if self._is_hit(site, taken)]

    def _selects(self, name: str) -> bool:
        return self.matcher.check(name) is True

    def _is_hit(self, site: Site, taken: set[str]) -> bool:
        """Whether a site is selected; each of its branches and experts has to be, or none."""
        hits = {
            branch: [any(map(self._selects, spellings)) for spellings in experts]
            for branch, experts in site.old_names.items()
            if branch not in taken
        }
        if not any(map(any, hits.values())):
            return False
        missing = [branch for branch in site.old_names if not any(hits.get(branch, ()))]
        if missing:
            chosen = [branch for branch in site.old_names if branch not in missing]
            raise ValueError(
                f"{' and '.join(site.old_names)} are one parameter of this model, {site.path!r}, so that {chosen} cannot "
                f"be adapted without {missing}. Target both, or set target_parameters=[{site.short!r}]."
            )
        if not all(map(all, hits.values())):
            raise ValueError(
                f"All experts are one parameter of this model, {site.path!r}; target_modules names some of them only. "
                f"Name all, or set target_parameters=[{site.short!r}]."
            )
        return True

    def target_modules(self) -> set[str]:
        """The targets without those that mean sites only; what selects nothing at all stays, to be warned about."""
        targets = self.config.target_modules
        if isinstance(targets, str):
            return condensed(set(self.plain), self.names)
        branches = [experts for site in self.sites for experts in site.old_names.values()]
        names = {name for experts in branches for spellings in experts for name in spellings}
        return {
            entry
            for entry in targets
            if any(is_suffix(name, entry) for name in self.plain) or not any(is_suffix(name, entry) for name in names)
        }

    def target_parameters(self) -> list[str]:
        found = list(self.config.target_parameters or ())
        for site in self.sites:
            whole = all(other in self.sites for other in self.all_sites if other.short == site.short)
            entry = site.short if whole else site.path
            if not any(is_suffix(entry, other) for other in found):
                found.append(entry)
        return found


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: list[Any] | None) -> None:
    """Bring a LoRA configuration up to date, in place, that names experts or routers as older models had them.

    Names of fused projections move from `target_modules` to `target_parameters`. Two projections that are one
    parameter now share factors of the sum of their ranks, with the scaling that they had. Names that the model still
    has modules for are kept, so that its dense layers stay targeted.

    Args:
        peft_config: any configuration; only LoRA's is changed.
        model: the base model.
        conversions: its weight conversions, as `get_model_conversion_mapping` gives them.

    Raises:
        ValueError: one of two fused projections is targeted, or the two differ in scaling.
    """
    if peft_config.peft_type != "LORA" or not peft_config.target_modules or not fused_experts(conversions or ()):
        return
    selection = _Selection(peft_config, model, conversions)
    if not selection.sites:
        if means_experts_first(model):  # files of such models say it with an empty list
            peft_config.target_parameters = list(peft_config.target_parameters or ())
        return
    adapted = [_rank_and_alpha(peft_config, site) for site in selection.sites]
    modules, parameters = selection.target_modules(), selection.target_parameters()
    peft_config.target_modules, peft_config.target_parameters = modules, parameters
    for field in ("rank_pattern", "alpha_pattern"):
        setattr(peft_config, field, _still_meant(getattr(peft_config, field), selection))
    _update_patterns(peft_config, selection.sites, adapted)
    if peft_config.lora_dropout and peft_config.inference_mode:
        # Trained with it, which a fused parameter does not support; it makes no difference to using the adapter.
        peft_config.lora_dropout = 0.0
        warnings.warn(
            "lora_dropout is set to 0, since the adapter is for inference and its experts are one parameter."
        )


def _rank_and_alpha(config: Any, site: Site) -> tuple[int, float]:
    """Rank and alpha of the factors of a site, as its branches were given them."""
    first = [experts[0] for experts in site.old_names.values()]
    ranks = [_from_pattern(config.rank_pattern, names, config.r) for names in first]
    alphas = [_from_pattern(config.alpha_pattern, names, config.lora_alpha) for names in first]
    root = math.sqrt if config.use_rslora else float
    scalings = [alpha / root(r) for r, alpha in zip(ranks, alphas)]
    if any(not math.isclose(scaling, scalings[0]) for scaling in scalings):
        raise ValueError(
            f"{' and '.join(site.old_names)} are one parameter of this model, {site.path!r}, and have one scaling; "
            f"rank_pattern and alpha_pattern give them {scalings}."
        )
    rank = sum(ranks)
    alpha = alphas[0] * root(rank / ranks[0])
    return rank, int(alpha) if alpha == int(alpha) else alpha


def _from_pattern(patterns: dict[str, Any], spellings: list[str], default: Any) -> Any:
    keys = (get_pattern_key(patterns, name) for name in spellings)
    return next((patterns[key] for key in keys if key in patterns), default)


def _still_meant(patterns: dict[str, Any], selection: _Selection) -> dict[str, Any]:
    """The patterns without those that were for older names of the sites only."""
    old = {name for site in selection.sites for experts in site.old_names.values() for name in experts[0]}
    gone = {key for name in old if (key := get_pattern_key(patterns, name)) in patterns}
    kept = {key for name in selection.plain if (key := get_pattern_key(patterns, name)) in patterns}
    return {key: value for key, value in patterns.items() if key not in gone - kept}


def _update_patterns(config: Any, sites: list[Site], adapted: list[tuple[int, float]]) -> None:
    """Let the patterns give each site its rank and alpha, by one entry for all of a sort where these agree."""
    for short in dict.fromkeys(site.short for site in sites):
        group = [(site, values) for site, values in zip(sites, adapted) if site.short == short]
        alike = len({values for _, values in group}) == 1
        for site, (rank, alpha) in group[:1] if alike else group:
            key = rf".*\.{re.escape(short)}" if alike else re.escape(site.path)
            if rank != _from_pattern(config.rank_pattern, [site.path], config.r):
                config.rank_pattern = {key: rank, **config.rank_pattern}
            if alpha != _from_pattern(config.alpha_pattern, [site.path], config.lora_alpha):
                config.alpha_pattern = {key: alpha, **config.alpha_pattern}
