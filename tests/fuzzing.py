"""What the fuzzers share: how much they run, how a model and a folder are compared with what they were, and bad values.

A property is checked on a few examples, the same ones every time, by `make test`, and on many random ones by
`make test-slow`. There, `ARGS=--hypothesis-seed=N` chooses the random numbers, the variable `FUZZ_EXAMPLES` how many
examples each test has at most, and `FUZZ_SECONDS` after how many seconds no test starts on more of them. What fails is
printed with a short way to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
import linecache
import math
import os
import random
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.core
import hypothesis.internal.conjecture.engine as engine
import matrix
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from torch import nn

import peft
from peft.engine.lifecycle import AdapterHolder, holders_of
from peft.utils.registry import Method, all_methods

SOURCES = str(Path(peft.__file__).parent)
MANY = int(os.environ.get("FUZZ_EXAMPLES", "200"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "15"))
PORTION = 20
"""How many examples are looked at between two looks at the clock."""

# Of a sequence of calls each step of the way to a shorter one takes as long as the sequence: five minutes are too many.
assert engine.MAX_SHRINKING_SECONDS > 0
engine.MAX_SHRINKING_SECONDS = min(engine.MAX_SHRINKING_SECONDS, 2 * SECONDS)


# ------------------------------------------------------------------------------------------------------------ how much


def _settings(examples: int, fixed: bool, **options: Any) -> settings:
    """The settings of a run of so many examples, the same ones every time or random ones."""
    return settings(
        max_examples=examples,
        derandomize=fixed,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )


def portions(examples: int, seconds: float) -> Iterator[tuple[int, int]]:
    """Portions of examples until there are enough of them or the time is over, at least one: the seed and size of each.

    The clock is asked between portions, and not within them, since an example that had failed could not be repeated
    after its time.
    """
    chosen = hypothesis.core.global_force_seed
    start = random.SystemRandom().getrandbits(32) if chosen is None else chosen
    end = time.monotonic() + seconds
    for done in range(0, examples, PORTION):
        if done and time.monotonic() > end:
            return
        yield start + done, min(PORTION, examples - done)


def fuzzed(few: int, **strategies: st.SearchStrategy) -> Callable:
    """A decorator that makes a test of a property.

    The property is tested on a few examples in the ordinary run, and on many in the slow one.

    Args:
        few: how many examples the ordinary run has.
        strategies: where arguments of the property come from; the others are fixtures and parameters as usual.
    """

    def decorate(check: Callable) -> Callable:
        def test(examples: str, **arguments: Any) -> None:
            if examples == "few":
                _settings(few, fixed=True)(given(**strategies)(check))(**arguments)
                return
            for number, size in portions(MANY, SECONDS):
                seed(number)(_settings(size, fixed=False)(given(**strategies)(check)))(**arguments)

        parameters = inspect.signature(check).parameters
        fixtures = [parameter for name, parameter in parameters.items() if name not in strategies]
        own = inspect.Parameter("examples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *fixtures])
        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return pytest.mark.parametrize("examples", ["few", pytest.param("many", marks=pytest.mark.slow)])(test)

    return decorate


def run_machine(machine: type, few: int | None, steps: int) -> None:
    """Run a state machine.

    Args:
        machine: its class.
        few: how many sequences the ordinary run has; None for the slow run, which has half as many as examples of a test.
        steps: the most steps of a sequence.
    """
    if few is not None:
        run_state_machine_as_test(machine, settings=_settings(few, fixed=True, stateful_step_count=steps))
        return
    for number, size in portions(MANY // 2, SECONDS):
        options = _settings(size, fixed=False, stateful_step_count=steps)
        run_state_machine_as_test(seed(number)(type(machine.__name__, (machine,), {})), settings=options)


# --------------------------------------------------------------------------------------------------------------- errors


def deliberate(error: BaseException) -> bool:
    """Whether an error was raised by a `raise` of this library, and is not one that the library ran into."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    return file.startswith(SOURCES) and linecache.getline(file, trace.tb_lineno).strip().startswith("raise")


@contextlib.contextmanager
def typed_errors_only() -> Iterator[list[Exception]]:
    """Context that swallows an error which the library raised on purpose; yields a list that it is put into.

    Any other error goes on, with its kind in front, and so does one that says nothing.
    """
    caught: list[Exception] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield caught
        except Exception as error:
            if not deliberate(error) or not str(error):
                raise AssertionError(f"not an error of this library: {error!r}") from error
            caught.append(error)


# ------------------------------------------------------------------------------------------------------------ snapshots


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a call which fails must leave alone: names and classes of modules, tensors, flags, adapters."""
    facts: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) and not len(module):
            continue  # a layer makes what it keeps its adapters in when it first looks for one there
        facts[f"module {name}"] = (type(module).__name__, module.training)
        for sort, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in tensors.items():
                if tensor is not None:
                    facts[f"{sort} {name}.{key}"] = (tensor.detach().clone(), tensor.requires_grad)
    for name, holder in holders_of(model):
        facts[f"adapters {name}"] = {
            "active": list(holder.active_adapters),
            "disabled": holder.disable_adapters,
            "merged": list(holder.merged_adapters),
            "inference": set(holder._inference),
            "available": sorted(holder._get_available_adapters()),
            "all": holder._all_available_adapter_names(),
        }
        facts["roster"] = {name: set(labels) for name, labels in holder.roster.holders.items()}
        if hasattr(holder, "scaling"):
            facts[f"scaling {name}"] = {key: float(value) for key, value in holder.scaling.items()}
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        facts[f"config {name}"] = _plain(config)
    facts["active"] = str(getattr(model, "active_adapter", None))
    return facts


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else repr(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is not the same any more."""
    return sorted(name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name), name))


def _same(one: Any, other: Any, name: str) -> bool:
    if not name.startswith(("parameter", "buffer")) or one is None or other is None:
        return one == other
    (tensor, flag), (other_tensor, other_flag) = one, other
    if flag != other_flag or tensor.dtype != other_tensor.dtype or tensor.shape != other_tensor.shape:
        return False
    if tensor.is_meta or other_tensor.is_meta:
        return tensor.is_meta and other_tensor.is_meta
    return torch.equal(_bits(tensor), _bits(other_tensor))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, which are equal also where its values are NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def tree(folder: Path) -> dict[str, Any]:
    """What is in a folder: the bytes of files, the targets of links, the names of folders."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@contextlib.contextmanager
def whole_or_not_at_all(model: nn.Module, *folders: Path) -> Iterator[list[Exception]]:
    """Context of a call that either succeeds or raises a typed error and leaves the model and folders as they were."""
    before, files = snapshot(model), [tree(folder) for folder in folders]
    with typed_errors_only() as caught:
        yield caught
    if caught:
        changed = differences(before, snapshot(model))
        assert not changed, f"{caught[0]!r} left {changed}"
        assert [tree(folder) for folder in folders] == files, f"{caught[0]!r} left other files"


# --------------------------------------------------------------------------------------------------------------- models


class Net(nn.Module):
    """A small network with something for every method: a table of tokens, linear layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.lin0 = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lin1 = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.lin0(self.embed(x))))
        return self.head(torch.tanh(self.lin1(hidden)))


IDS = torch.tensor([[1, 3, 0, 5], [3, 7, 5, 0], [5, 0, 3, 1]])


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def layer_methods() -> dict[str, Method]:
    """Every registered method that puts adapters into layers by itself."""
    return {
        peft_type.value: entry
        for peft_type, entry in all_methods().items()
        if matrix.is_tuner(entry) and peft_type.value not in matrix.NOT_BY_LAYERS and entry.model_cls.layer_classes
    }


def config_of(name: str, **options: Any) -> peft.PeftConfig:
    """A configuration of a method for `Net`."""
    entry = layer_methods()[name]
    fields = {field.name for field in dataclasses.fields(entry.config_cls)}
    own = dict(matrix.OPTIONS.get(name, {}))
    own["target_modules"] = ["embed"] if "token_indices" in fields else ["lin0", "lin1"]
    return entry.config_cls(**own | options)


# ----------------------------------------------------------------------------------------------------------- bad values

HUGE = [2**63, 10**30, -(2**63), 10**400]
ODD_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "../x",
    "/etc/passwd",
    "ключ",
    "\ud800",
    "(",
    "[",
    "*",
    "lin0",
    "all-linear",
    "None",
]

texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=8))
numbers = st.one_of(
    st.integers(-3, 20),
    st.sampled_from(HUGE),
    st.floats(width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -0.0, 0.5, 2.5]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
"""Anything that a JSON file can have in the place of a value."""


def values_for(hint: Any) -> st.SearchStrategy:
    """Values that an annotation allows, sensible and absurd ones."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_for, arguments))
    if origin is typing.Literal:
        return st.sampled_from([*arguments, "nonsense"])
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return st.lists(st.one_of(*map(values_for, inner)) if inner else scalars, max_size=3)
    if origin is dict or hint is dict:
        inner = values_for(arguments[1]) if arguments else st.one_of(st.integers(-1, 4), texts)
        return st.dictionaries(texts, inner, max_size=2)
    if hint is None or hint is type(None):
        return st.none()
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.one_of(st.integers(-3, 12), st.sampled_from([1000, 2.5, math.nan, *HUGE]))
    if hint is float:
        return st.one_of(st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0, 1e308, math.nan, math.inf]), st.integers(-2, 5))
    if hint is str:
        return texts
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from([member.value for member in hint])
    if dataclasses.is_dataclass(hint):
        from peft.utils.field_types import _hints

        return st.fixed_dictionaries({}, optional={name: values_for(inner) for name, inner in _hints(hint).items()})
    return json_values


# ---------------------------------------------------------------------------------------------------------------- names

BAD_NAMES = [
    *(
        "",
        " ",
        ".",
        "..",
        "../out",
        "a/b",
        "/abs",
        "a\\b",
        "a.b",
        ".hidden",
        "a\0b",
        "a\nb",
        "\x7f",
        "\u2028",
        "\ud800",
    ),
    *("__base__", "keys", "training", "forward", "_modules", "_parameters", "__class__", "pop", "weight\t"),
]
"""Names that no adapter may have."""
GOOD_NAMES = ["default", "a", "b", "two words", "Ünï-42", "名前", "lora_A", "base_layer", "weight", "model", "0"]


def holder_of(model: nn.Module) -> AdapterHolder:
    return next(holder for _, holder in holders_of(model))
