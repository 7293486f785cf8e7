"""The axes of the test matrix: methods, base layers, and the cases that they make together.

Methods come from the registry, and the kinds of layer that a method adapts from its tuner's `layer_classes`. What stands
here by hand: the arguments that a configuration cannot do without (`OPTIONS`), variants of a method that compute
something else (`VARIANTS`), and what a method declares that it does not do (`LIMITS`), which tests hold it to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft.engine.kinds import KINDS
from peft.engine.tuner import BaseTuner
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.registry import Method, all_methods

FIRST, SECOND = "first", "second"

# ------------------------------------------------------------------------------------------------------------- methods

TOKENS = {FIRST: [1, 3], SECOND: [0, 5]}
"""The rows that adapters of embeddings train; the inputs have all of these tokens in them."""

OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2, "lora_alpha": 3},
    "ADALORA": {"init_r": 2, "target_r": 1, "lora_alpha": 50, "total_step": 10},
    "IA3": {"feedforward_modules": []},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "OFT": {"oft_block_size": 2},
    "HRA": {"r": 2},
    "VERA": {"r": 3},
    "FOURIERFT": {"n_frequency": 8, "scaling": 20.0},
    "POLY": {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2},
    "TRAINABLE_TOKENS": {"token_indices": TOKENS[FIRST]},
}
"""Method -> what its configuration needs here beside `target_modules`; a method without an entry needs nothing."""

OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4},
    "ADALORA": {"init_r": 3, "inference_mode": True},  # one adapter is made to train, and others are switched to
    "HRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": TOKENS[SECOND]},
}
"""Method -> what is different for its second adapter."""

EACH_ROW: dict[str, dict[str, int]] = {"POLY": {"task_ids": 1}}
"""Method -> what a call has to give for each row beside the input."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA-dora": ("LORA", {"use_dora": True}),
    "IA3-input": ("IA3", {"feedforward_modules": ["layer"]}),
}
"""Name -> method and the options with which it computes something else."""

NOT_BY_LAYERS: dict[str, str] = {
    "XLORA": "its layers are LoRA's, whose adapters it loads from files and weights all at once",
    "ADAPTION_PROMPT": "it adapts the attention modules of the types of model that it knows, whatever layers are in them",
}
"""Method -> why it has no place here, though it adapts layers."""

OTHER_START: dict[str, str] = {}
"""Method -> why it does not start as the base model even with its usual start."""


@dataclass(frozen=True)
class Limit:
    """Something that a method declares not to do on some layers: the error that says so."""

    method: str
    """Regular expression for names of methods and variants."""
    base: str
    """Regular expression for names of base layers."""
    action: str
    error: type[Exception]
    match: str


LIMITS = (
    Limit("LORA-dora", "multihead_attention", "adapt", ValueError, "use_dora"),
    Limit("LORA.*", "conv.d-groups.*", "merge", NotImplementedError, "groups"),
    Limit("LORA", "multihead_attention", "mixed batch", TypeError, "layer does not support mixed batches"),
    Limit("LN_TUNING", "multihead_attention", "mixed batch", TypeError, "layer: a mixed batch needs"),
    Limit("VERA", "multihead_attention|layer_norm", "adapt", ValueError, "layer.*supported are"),
    Limit("POLY", "linear.*|conv1d_transformers", "merge", NotImplementedError, "layer acts on activations"),
    Limit("TRAINABLE_TOKENS", "conv.d(-.*)?|multihead_attention|layer_norm", "adapt", ValueError, "layer: .*need"),
)
"""The first that fits counts. Actions: adapt, merge, mixed batch, both at once."""


@dataclass(frozen=True)
class Variant:
    """A method with the options it is tested with."""

    name: str
    method: Method
    options: dict[str, Any]
    other_options: dict[str, Any]

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def tuner(self) -> type[BaseTuner]:
        return self.method.model_cls

    def config(self, adapter: str, **options: Any) -> peft.PeftConfig:
        """The configuration of one of the two adapters."""
        own = self.options | (self.other_options if adapter == SECOND else {})
        return self.method.config_cls(**{"target_modules": ["layer"], **own, **options})

    def has(self, option: str) -> bool:
        """Whether the method's configuration has this field."""
        return option in {entry.name for entry in dataclasses.fields(self.method.config_cls)}


def is_tuner(entry: Method) -> bool:
    return isinstance(entry.model_cls, type) and issubclass(entry.model_cls, BaseTuner)


def variants() -> Iterator[Variant]:
    """Every registered method that adapts layers, and the variants listed above."""
    tuners = {
        peft_type.value: entry
        for peft_type, entry in all_methods().items()
        if is_tuner(entry) and peft_type.value not in NOT_BY_LAYERS
    }
    for name, (base, options) in ({name: (name, {}) for name in tuners} | VARIANTS).items():
        if base in tuners:
            yield Variant(name, tuners[base], OPTIONS.get(base, {}) | options, OTHER_OPTIONS.get(base, {}))


# --------------------------------------------------------------------------------------------------------- base layers


class Net(nn.Module):
    """The layer to adapt, before an activation with a weight that nobody asked to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.act = nn.PReLU()

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.act(self.layer(x, **kwargs))


class AttentionNet(Net):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.act(self.layer(x, x, x, **kwargs)[0])


@dataclass(frozen=True)
class Base:
    """A layer to adapt, with an input.

    `shape` is the input's, four rows first; None for token ids.
    """

    name: str
    make_layer: Callable[[], nn.Module]
    shape: tuple[int, ...] | None
    net: type[Net] = Net

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> str | None:
        layer = self.make_layer()
        return next((kind.name for kind in KINDS if kind.matches(layer)), None)

    def make(self, dtype: torch.dtype = torch.float32) -> Net:
        """The model, the same at every call."""
        torch.manual_seed(0)
        return self.net(self.make_layer()).to(dtype).eval()

    def input(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A batch of four rows, the same at every call."""
        if self.shape is None:
            return torch.tensor([[1, 3, 0, 5, 2], [3, 1, 7, 0, 11], [5, 1, 0, 3, 6], [2, 5, 3, 0, 1]])
        generator = torch.Generator().manual_seed(1)
        return torch.randn(4, *self.shape, generator=generator).to(dtype)


def conv(dimensions: int, **options: Any) -> Callable[[], nn.Module]:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    window = {"kernel_size": (3, 2, 2)[:dimensions], "padding": 1, **options}
    return functools.partial(cls, 4, 6, **window)


def conv_base(dimensions: int, name: str = "", **options: Any) -> Base:
    size = (5, 4, 3)[:dimensions]
    return Base(f"conv{dimensions}d{name and '-'}{name}", conv(dimensions, **options), (4, *size))


BASES = (
    Base("linear", functools.partial(nn.Linear, 6, 8), (3, 6)),
    Base("conv1d_transformers", functools.partial(Conv1D, 8, 6), (3, 6)),
    Base("embedding", functools.partial(nn.Embedding, 12, 8), None),
    conv_base(1),
    conv_base(2),
    conv_base(3),
    conv_base(2, "groups", groups=2),
    Base(
        "multihead_attention",
        functools.partial(nn.MultiheadAttention, 8, 2, batch_first=True),
        (3, 8),
        AttentionNet,
    ),
    Base("layer_norm", functools.partial(nn.LayerNorm, 8), (3, 8)),
)
"""The layers that every behaviour is tested on."""


class ScaledEmbedding(nn.Embedding):
    """An embedding as some language models have it."""

    embed_scale = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


CONV_OPTIONS: dict[str, dict[str, Any]] = {
    "groups": {"groups": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "stride": {"stride": 2},
    "pointwise": {"kernel_size": 1, "padding": 0},
    "no-bias": {"bias": False},
    "same": {"padding": "same"},
    "same-circular": {"padding": "same", "padding_mode": "circular"},
    "groups-reflect": {"groups": 2, "padding_mode": "reflect"},
    **{mode: {"padding_mode": mode} for mode in ("reflect", "circular", "replicate")},
}

FURTHER_BASES = (
    Base("linear-no-bias", functools.partial(nn.Linear, 6, 8, bias=False), (6,)),
    Base("embedding-padding", functools.partial(nn.Embedding, 12, 8, padding_idx=2), None),
    Base("embedding-scaled", functools.partial(ScaledEmbedding, 12, 8), None),
    *(
        conv_base(dimensions, name, **CONV_OPTIONS[name])
        for dimensions, names in {
            1: ["groups", "stride", "same-circular", "replicate"],
            2: [name for name in CONV_OPTIONS if name != "groups"],  # which has its place among the others
            3: ["groups-reflect", "dilation", "same", "pointwise"],
        }.items()
        for name in names
    ),
)
"""Options of layers, which change how a weight is applied and nothing else."""


# ---------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One method on one base layer."""

    variant: Variant
    base: Base

    def __str__(self) -> str:
        return f"{self.variant}-{self.base}"

    # What a test starts from.

    def fresh(self, dtype: torch.dtype = torch.float32, config: dict[str, Any] | None = None, **options: Any):
        """The model with one new adapter."""
        base = self.base.make(dtype)
        model = peft.get_peft_model(base, self.variant.config(FIRST, **config or {}), adapter_name=FIRST, **options)
        return self.called(model)

    def called(self, model: nn.Module) -> nn.Module:
        """A model whose calls give what the method needs for each row, beside what they are given."""
        values = EACH_ROW.get(self.variant.method.peft_type.value)
        if values:
            model.register_forward_pre_hook(functools.partial(give_each_row, values), with_kwargs=True)
        return model

    def one(self, dtype: torch.dtype = torch.float32, **options: Any):
        """The model with an adapter that is not where it started."""
        model = self.fresh(dtype, **options)
        perturb(model, FIRST)
        return model

    def two(self, dtype: torch.dtype = torch.float32):
        """The model with two such adapters, the first of them active."""
        model = self.one(dtype)
        model.add_adapter(SECOND, self.variant.config(SECOND))
        perturb(model, SECOND)
        return model

    @property
    def x(self) -> torch.Tensor:
        return self.base.input()

    @functools.cached_property
    def base_output(self) -> torch.Tensor:
        return output(self.base.make(), self.x)

    # What the method declares.

    @property
    def adapts(self) -> bool:
        """Whether the method adapts this kind of layer."""
        return self.layer_class is not None and self.limit("adapt") is None

    @property
    def layer_class(self) -> type[BaseTunerLayer] | None:
        """The class that wraps the layer, by the tuner's declaration; None if there is none."""
        classes = self.variant.tuner.layer_classes
        return classes.get(self.base.kind, classes.get("any"))

    @property
    def usual_start(self) -> dict[str, bool]:
        """The option that asks for the start that the method is known for, if there are others."""
        names = [entry.name for entry in dataclasses.fields(self.variant.method.config_cls)]
        return {name: True for name in names if name.startswith("init_") and name.endswith("weights")}

    def skip_other_start(self) -> None:
        """Skip the test where the method does not start as the base model."""
        reason = OTHER_START.get(self.variant.method.peft_type.value)
        if reason:
            pytest.skip(reason)

    def limit(self, action: str) -> Limit | None:
        """What the method declares not to do, None if it does the action here."""
        if action == "both at once" and self.layer_class.exclusive:
            return Limit(self.variant.name, self.base.name, action, ValueError, "layer")
        return next(
            (
                limit
                for limit in LIMITS
                if limit.action == action
                and re.fullmatch(limit.method, self.variant.name)
                and re.fullmatch(limit.base, self.base.name)
            ),
            None,
        )

    @contextlib.contextmanager
    def declared(self, action: str) -> Iterator[bool]:
        """Whether the method can do this here; if not, what happens inside must raise the error that it declares."""
        limit = self.limit(action)
        if limit is None:
            yield True
            return
        with pytest.raises(limit.error, match=limit.match):
            yield False


def give_each_row(values: dict[str, int], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """A forward pre-hook: every row of the input is given these values."""
    return args, {**{name: torch.full((len(args[0]),), value) for name, value in values.items()}, **kwargs}


def cases(bases: tuple[Base, ...], adapted: bool = True) -> list[Case]:
    """All methods on these layers: those that adapt them, or those that refuse to."""
    every = (Case(variant, base) for variant in variants() for base in bases)
    return [case for case in every if case.adapts == adapted]


# ------------------------------------------------------------------------------------------------------------- measures


def perturb(model: nn.Module, adapter: str) -> None:
    """Move the tensors of an adapter away from where they started, as training would."""
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter):
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.add_(noise.to(parameter.dtype))


def adapter_parameters(model: nn.Module, *adapters: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of adapters, which have their names in theirs, but for those declared never to train."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for adapter in adapters:
            if adapter in parts:
                path, container = parts[: parts.index(adapter) - 1], parts[parts.index(adapter) - 1]
                frozen = getattr(model.get_submodule(".".join(path)), "frozen_peft_weight_names", {})
                if container not in frozen.get(adapter, ()):
                    yield name, parameter


def names_of(model: nn.Module, *adapters: str) -> set[str]:
    return {name for name, _ in adapter_parameters(model, *adapters)}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def output(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).clone()


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are not the same any more."""
    assert before.keys() == after.keys()
    return {name for name in before if not same(before[name], after[name])}


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
