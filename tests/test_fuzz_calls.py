"""Calls in any order, against a plain model of what must hold after each.

The plain model (`Oracle`) knows no adapter layer: it has the base model's weights as tensors, each adapter's tensors by
their names on disk, which adapters are active, enabled and merged, and which tensors train. From these it computes
names, flags and, by plain matrix products, the output; each step of a sequence compares them with the model's. Among the
calls are some that must fail, and leave everything as it was.
"""

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import fuzzing
import prompts
import pytest
import torch
import torch.nn.functional as F
from fuzzing import run_machine, whole_or_not_at_all
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
from peft import functional
from peft.engine.lifecycle import AdapterHolder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.hotswap import hotswap_adapter


class Net(nn.Module):
    """A table, two kinds of linear layers, two layers that share a weight, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.lin = nn.Linear(8, 8)
        self.conv = Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)
        self.twin = nn.Linear(8, 8)
        self.twin.weight = self.lin.weight
        self.head = nn.Linear(8, 4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, x):
        hidden = torch.tanh(self.lin(self.embed(x)))
        hidden = self.norm(torch.tanh(self.conv(hidden)))
        return self.head(torch.tanh(self.twin(hidden)))


def net():
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.normal_(model.conv.weight, std=0.5)
    return model


IDS = torch.tensor([[1, 3, 0, 5], [3, 7, 5, 0]])

# ------------------------------------------------------------------------------------------------------------- adapters

LORA = {"lora_A.weight": "lora_A.{}.weight", "lora_B.weight": "lora_B.{}.weight"}
PARTS = {
    "lora": LORA,
    "table": {"lora_embedding_A": "lora_embedding_A.{}", "lora_embedding_B": "lora_embedding_B.{}"},
    "dora": {**LORA, "lora_magnitude_vector": "lora_magnitude_vector.{}.weight"},
    "loha": {f"hada_w{i}_{side}": f"hada_w{i}_{side}.{{}}" for i in (1, 2) for side in "ab"},
    "gain": {"ia3_l": "ia3_l.{}"},
    "input gain": {"ia3_l": "ia3_l.{}"},
    "row layer": {"trainable_tokens_delta": "trainable_tokens_delta.{}"},
    "rows": {"token_adapter.trainable_tokens_delta": "token_adapter.trainable_tokens_delta.{}"},
    "copy": {"weight": "modules_to_save.{}.weight", "bias": "modules_to_save.{}.bias"},
}
"""What an adapter has at a module: names on disk -> names in memory."""
WRAPPED = ("copy", "rows")
"""Parts that stand beside the method, in a wrapper of their own."""
SCALE = 1.5


@dataclass(frozen=True)
class Recipe:
    """A configuration, and what it puts where."""

    method: str
    options: tuple
    parts: tuple
    tokens: tuple = ()

    def config(self):
        cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[self.method]
        return cls(**{key: copy.deepcopy(value) for key, value in self.options})

    @property
    def copied(self):
        return {module for module, part in self.parts if part == "copy"}


def recipe(method, parts, tokens=(), **options):
    return Recipe(method, tuple(options.items()), tuple(parts.items()), tokens)


RANK = {"r": 2, "lora_alpha": 3}
LORAS = {
    "plain": recipe("LORA", {"lin": "lora", "conv": "lora"}, target_modules=["lin", "conv"], **RANK),
    "copies": recipe(
        "LORA", {"lin": "lora", "head": "copy"}, target_modules=["lin"], modules_to_save=["head"], **RANK
    ),
    "table": recipe("LORA", {"embed": "table", "twin": "lora"}, target_modules=["embed", "twin"], **RANK),
    "rows": recipe(
        "LORA",
        {"twin": "lora", "head": "copy", "embed": "rows"},
        (1, 3),
        target_modules=["twin"],
        modules_to_save=["head"],
        trainable_token_indices={"embed": [1, 3]},
        **RANK,
    ),
    "dora": recipe("LORA", {"lin": "dora", "conv": "dora"}, target_modules=["lin", "conv"], use_dora=True, **RANK),
}
NO_TABLE = {name: entry for name, entry in LORAS.items() if name != "table"}
NO_ROWS = {name: entry for name, entry in LORAS.items() if name != "rows"}
"""A table is adapted by LoRA or by rows, not both."""
IA3S = {
    "output": recipe("IA3", {"lin": "gain", "embed": "gain"}, target_modules=["lin", "embed"], feedforward_modules=[]),
    "input": recipe("IA3", {"conv": "input gain"}, target_modules=["conv"], feedforward_modules=["conv"]),
    "copies": recipe(
        "IA3",
        {"twin": "gain", "head": "copy"},
        target_modules=["twin"],
        feedforward_modules=[],
        modules_to_save=["head"],
    ),
}
ROWS = {
    "first": recipe(
        "TRAINABLE_TOKENS", {"embed": "row layer"}, (1, 3), target_modules=["embed"], token_indices=[1, 3]
    ),
    "other": recipe(
        "TRAINABLE_TOKENS", {"embed": "row layer"}, (5, 7), target_modules=["embed"], token_indices=[5, 7]
    ),
}
MIXED = {
    "plain": LORAS["plain"],
    "copies": LORAS["copies"],
    "dora": LORAS["dora"],
    "loha": recipe("LOHA", {"lin": "loha", "twin": "loha"}, target_modules=["lin", "twin"], r=2, alpha=3),
}


@dataclass
class Adapter:
    """One adapter as the plain model knows it."""

    recipe: Recipe
    tensors: dict = field(default_factory=dict)
    """By names on disk, relative to the model."""


# ---------------------------------------------------------------------------------------------------------- the oracle


class Oracle:
    """What must hold, worked out without any adapter layer.

    Args:
        base: the base model's tensors by name.
    """

    def __init__(self, base):
        self.base = base
        self.adapters = {}
        self.active = []
        self.enabled = True
        self.inference = set()
        self.flags = {}
        """(adapter, name on disk) -> whether it requires grad."""
        self.before_disabling = None
        self.layers = {}
        """Module -> the parts' owners around it, innermost first."""
        self.merged = {}
        """Owner -> the adapters that are merged there, in order."""
        self.merged_before = None

    # Who owns what: a method's layer around a module, or a wrapper.

    @staticmethod
    def owner(recipe, module, part):
        return module, part if part in WRAPPED else recipe.method

    def held(self, owner):
        return [
            name
            for name, adapter in self.adapters.items()
            if any(self.owner(adapter.recipe, *entry) == owner for entry in adapter.recipe.parts)
        ]

    def owners(self):
        return [owner for owners in self.layers.values() for owner in owners]

    def path(self, owner):
        """The dotted name of an owner in the base model."""
        around = self.layers[owner[0]]
        return owner[0] + ".base_layer" * (len(around) - 1 - around.index(owner))

    def names(self, adapter):
        """Names on disk -> names in memory."""
        entries = self.adapters[adapter].recipe
        return {
            f"{module}.{saved}": f"{self.path(self.owner(entries, module, part))}.{live.format(adapter)}"
            for module, part in entries.parts
            for saved, live in PARTS[part].items()
        }

    # Transitions.

    def rule_of(self, adapter):
        return self.enabled and adapter in self.active and adapter not in self.inference

    def decide(self, adapters):
        for name in adapters:
            for saved in self.names(name):
                self.flags[name, saved] = self.rule_of(name)

    def add(self, name, recipe):
        self.adapters[name] = Adapter(recipe)
        for module, part in recipe.parts:
            owner = self.owner(recipe, module, part)
            if owner not in self.layers.setdefault(module, []):
                self.layers[module].append(owner)
                self.merged[owner] = []
            elif part == "copy":
                self.merged[owner] = []  # a copy is made of the original
        self.decide([name])

    def activate(self, names, inference=False):
        self.active = list(names)
        self.inference = self.inference | set(names) if inference else self.inference - set(names)
        self.before_disabling = self.merged_before = None
        self.unmerge()
        self.decide(self.adapters)

    def disable(self):
        if self.enabled:
            self.before_disabling, self.merged_before = dict(self.flags), copy.deepcopy(self.merged)
            self.unmerge()
            self.enabled = False
            self.decide(self.adapters)

    def enable(self):
        if not self.enabled:
            self.enabled = True
            self.decide(self.adapters)
            self.flags |= {key: flag for key, flag in (self.before_disabling or {}).items() if key in self.flags}
            for owner, names in (self.merged_before or {}).items():
                self.merged[owner] = [name for name in names if name in self.held(owner)]
            self.before_disabling = self.merged_before = None

    def delete(self, name):
        was_active = name in self.active
        remaining = [other for other in self.active if other != name]
        succeeding = [] if remaining or not was_active else sorted(set(self.adapters) - {name})[:1]
        for owner, names in self.merged.items():
            if name in names or was_active:
                self.merged[owner] = []
        del self.adapters[name]
        self.inference -= {name}
        self.active = remaining + succeeding
        keep = {key for key in self.flags if key[0] != name}
        self.flags = {key: self.flags[key] for key in keep}
        if self.before_disabling is not None:
            gone = {name, *succeeding}
            self.before_disabling = {k: flag for k, flag in self.before_disabling.items() if k[0] not in gone}
        if self.merged_before is not None:
            self.merged_before = {
                owner: [n for n in names if n != name] for owner, names in self.merged_before.items()
            }
        self.decide(succeeding)

    def to_merge(self, names=None):
        return self.active if names is None else names

    def merges(self, names=None):
        """Owner -> what is merged there after merging these, None if that must fail."""
        after = {}
        for owner, merged in self.merged.items():
            held = self.held(owner)
            fresh = [name for name in dict.fromkeys(self.to_merge(names)) if name in held and name not in merged]
            after[owner] = [*merged, *fresh]
            if owner[1] == "copy" and len(after[owner]) > 1:
                return None
        return after

    def unmerge(self):
        self.merged = {owner: [] for owner in self.merged}

    def excludes(self, names):
        """Whether these adapters cannot be active together."""
        copied = [module for name in dict.fromkeys(names) for module in self.adapters[name].recipe.copied]
        return len(copied) != len(set(copied))

    # Numbers.

    def in_use(self, owner):
        """The adapters whose effect is seen at an owner."""
        if self.merged[owner]:
            return self.merged[owner]
        return [name for name in self.active if name in self.held(owner)] if self.enabled else []

    def weights(self, used):
        """Module -> weight (features out, in), or table, and bias, with the adapters in place.

        Args:
            used: owner -> adapters.
        """
        found = {}
        for module in ("embed", "lin", "conv", "twin", "head"):
            weight, bias = self.base[f"{module}.weight"], self.base.get(f"{module}.bias")
            start = weight = weight.T if module == "conv" else weight
            for owner in self.layers.get(module, ()):
                for name in used[owner]:
                    adapter = self.adapters[name]
                    part = next(
                        p for m, p in adapter.recipe.parts if m == module and self.owner(adapter.recipe, m, p) == owner
                    )
                    tensors = {saved: adapter.tensors[f"{module}.{saved}"] for saved in PARTS[part]}
                    weight, bias = effect(part, adapter.recipe, tensors, start, weight, bias)
            found[module] = weight, bias
        return found

    def output(self, used=None):
        weights = self.weights({owner: self.in_use(owner) for owner in self.owners()} if used is None else used)
        hidden = torch.tanh(F.linear(F.embedding(IDS, weights["embed"][0]), *weights["lin"]))
        hidden = torch.tanh(F.linear(hidden, *weights["conv"]))
        hidden = F.layer_norm(hidden, (8,), self.base["norm.weight"], self.base["norm.bias"])
        return F.linear(torch.tanh(F.linear(hidden, *weights["twin"])), *weights["head"])

    def gradients(self):
        """(adapter, name on disk) -> gradient of the loss, for what requires grad."""
        wanted = [key for key, flag in self.flags.items() if flag]
        kept = {name: adapter.tensors for name, adapter in self.adapters.items()}
        leaves = {key: kept[key[0]][key[1]].clone().requires_grad_() for key in wanted}
        for name, adapter in self.adapters.items():
            adapter.tensors = adapter.tensors | {saved: leaf for (own, saved), leaf in leaves.items() if own == name}
        found = torch.autograd.grad(loss_of(self.output()), list(leaves.values()), allow_unused=True)
        for name, adapter in self.adapters.items():
            adapter.tensors = kept[name]
        return dict(zip(wanted, found))


def loss_of(output):
    return output.square().sum()


def effect(part, recipe, tensors, start, weight, bias):
    """Weight and bias with one part of an adapter in place, worked out in full.

    Args:
        part: what it is.
        recipe: of the adapter.
        tensors: by their names on disk.
        start: the base model's weight.
        weight, bias: with earlier adapters in place.
    """
    if part in ("lora", "dora"):
        delta = SCALE * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
        if part == "lora":
            return weight + delta, bias
        norm = (start + delta).norm(dim=1).detach()
        return weight + (tensors["lora_magnitude_vector"] / norm)[:, None] * (start + delta) - start, bias
    if part == "table":
        return weight + SCALE * (tensors["lora_embedding_B"] @ tensors["lora_embedding_A"]).T, bias
    if part == "loha":
        first, second = (tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in (1, 2))
        return weight + SCALE * first * second, bias
    if part == "gain":
        gain = tensors["ia3_l"].flatten()
        if bias is None:  # a table, whose columns are the features
            return weight * gain, None
        return weight * gain[:, None], bias * gain
    if part == "input gain":
        return weight * tensors["ia3_l"].flatten(), bias
    if part in ("rows", "row layer"):
        (rows,) = tensors.values()
        return weight.index_copy(0, torch.tensor(recipe.tokens), rows), bias
    return tensors["weight"], tensors["bias"]


# ------------------------------------------------------------------------------------------------------------ the calls

NAMES = ["a", "b", "default", "two words"]
names = st.sampled_from(NAMES)
several = st.lists(names, min_size=1, max_size=2, unique=True)


class Calls(RuleBasedStateMachine):
    """Calls at one door; what a client calls is in the subclasses."""

    recipes = LORAS
    prefix = ""
    activates_new = False
    can_merge = True
    can_save = True
    can_cast = True
    can_swap = False

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.saved = []
        self.model = self.oracle = None

    def teardown(self):
        shutil.rmtree(self.folder)
        super().teardown()

    # ---------------------------------------------------------------------------------------------------- the first

    def base_model(self):
        return net()

    @initialize(name=names, data=st.data())
    def start(self, name, data):
        base = self.base_model()
        self.plain = copy.deepcopy(base)
        self.oracle = Oracle({key: value.clone() for key, value in base.state_dict().items()})
        self.oracle.active = [name]
        self.first(base, name, self.draw_recipe(data))

    def draw_recipe(self, data):
        return self.recipes[data.draw(st.sampled_from(sorted(self.recipes)))]

    def first(self, base, name, recipe):
        self.oracle.add(name, recipe)
        self.wrap(base, name, recipe.config())
        self.oracle.decide([name])
        self.adopt(name)
        self.agrees()

    def live(self, name):
        """The adapter's parameters in the model by their names on disk."""
        parameters = dict(self.model.named_parameters())
        return {saved: parameters[self.prefix + live] for saved, live in self.oracle.names(name).items()}

    def adopt(self, name, perturb=True):
        """Take over how an adapter starts, and move it away from there, as training would."""
        generator = torch.Generator().manual_seed(len(NAMES) * len(self.saved) + NAMES.index(name))
        with torch.no_grad():
            for parameter in self.live(name).values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.1
                parameter.add_(noise.to(parameter.dtype) if perturb else 0)
        self.oracle.adapters[name].tensors = {
            saved: parameter.detach().clone() for saved, parameter in self.live(name).items()
        }

    # ------------------------------------------------------------------------------------------------- what must hold

    def output(self, model=None):
        with torch.no_grad():
            return (self.model if model is None else model)(IDS)

    def expected_output(self):
        return self.oracle.output()

    def holders(self):
        return [module for module in self.model.modules() if isinstance(module, AdapterHolder)]

    @invariant()
    def agrees(self):
        if self.oracle is None:
            return
        self.names_and_flags_agree()
        self.tensors_agree()
        self.adapters_agree()
        output, expected = self.output(), self.expected_output()
        assert close(output, expected)
        if not self.oracle.enabled and not any(self.oracle.merged.values()):
            assert torch.equal(output, self.output(self.plain))

    def names_and_flags_agree(self):
        oracle = self.oracle
        expected = {
            self.prefix + live: oracle.flags[name, saved]
            for name in oracle.adapters
            for saved, live in oracle.names(name).items()
        }
        for key, _ in self.plain.named_parameters(remove_duplicate=False):
            expected[self.live_base_name(key)] = False
        parameters = self.model.named_parameters(remove_duplicate=False)
        assert {name: parameter.requires_grad for name, parameter in parameters} == expected

    def tensors_agree(self):
        for name, adapter in self.oracle.adapters.items():
            for saved, parameter in self.live(name).items():
                assert same(parameter, adapter.tensors[saved]), f"{saved} of {name}"
        if not any(self.oracle.merged.values()):
            state = self.model.state_dict()
            for key, value in self.oracle.base.items():
                assert same(state[self.live_base_name(key)], value), key

    def live_base_name(self, key):
        module, _, leaf = key.rpartition(".")
        path = module
        for owner in reversed(self.oracle.layers.get(module, ())):
            path += {"copy": ".original_module", "rows": ".token_adapter.base_layer"}.get(owner[1], ".base_layer")
        return f"{self.prefix}{path}.{leaf}"

    def adapters_agree(self):
        oracle = self.oracle
        assert list(self.model.peft_config) == list(oracle.adapters)
        for holder in self.holders():
            assert list(holder.active_adapters) == oracle.active
            assert holder.disable_adapters is not oracle.enabled
        found = {name for holder in self.holders() for name in holder.merged_adapters}
        assert found == {name for names in oracle.merged.values() for name in names}

    # ---------------------------------------------------------------------------------------------------- what exists

    def existing(self, data):
        return data.draw(st.sampled_from(sorted(self.oracle.adapters)))

    def some(self, data):
        found = data.draw(st.lists(st.sampled_from(sorted(self.oracle.adapters)), min_size=1, max_size=2, unique=True))
        return found

    has_adapters = staticmethod(lambda self: bool(self.oracle.adapters))

    # ------------------------------------------------------------------------------------------------------ life cycle

    @rule(name=names, data=st.data())
    def add(self, name, data):
        recipe = self.draw_recipe(data)
        if name in self.oracle.adapters:
            if not self.activates_new:  # a client that injects looks for itself
                with must_fail(self):
                    self.call_add(name, recipe.config())
            return
        self.call_add(name, recipe.config())
        self.oracle.add(name, recipe)
        if self.activates_new:
            self.oracle.activate([name])
        self.adopt(name)

    @precondition(has_adapters)
    @rule(data=st.data(), inference=st.booleans(), as_list=st.booleans())
    def set(self, data, inference, as_list):
        chosen = self.some(data) if as_list else [self.existing(data)]
        if self.oracle.excludes(chosen):
            with must_fail(self):
                self.call_set(chosen, inference)
            return
        self.call_set(chosen if as_list else chosen[0], inference)
        self.oracle.activate(chosen, inference)

    @rule()
    def disable(self):
        self.call_enable(False)
        self.oracle.disable()

    @rule()
    def enable(self):
        self.call_enable(True)
        self.oracle.enable()

    @precondition(has_adapters)
    @rule(data=st.data())
    def delete(self, data):
        name = self.existing(data)
        if self.refuses_deletion(name):
            with must_fail(self):
                self.call_delete(name)
            return
        self.call_delete(name)
        self.oracle.delete(name)

    def refuses_deletion(self, name):
        return any(name in names for names in self.oracle.merged.values())

    @precondition(lambda self: self.oracle.enabled and self.oracle.adapters)
    @rule(data=st.data(), flag=st.booleans())
    def set_requires_grad(self, data, flag):
        chosen = self.some(data)
        self.call_set_requires_grad(chosen, flag)
        self.oracle.flags |= {key: flag for key in self.oracle.flags if key[0] in chosen}

    # ---------------------------------------------------------------------------------------------------------- merging

    @precondition(lambda self: self.can_merge and self.oracle.enabled and self.oracle.adapters)
    @rule(data=st.data(), chosen=st.booleans(), safe=st.booleans())
    def merge(self, data, chosen, safe):
        chosen = self.some(data) if chosen else None
        after = self.oracle.merges(chosen)
        if after is None:
            if self.merges_whole_or_not_at_all:
                with must_fail(self):
                    self.call_merge(chosen, safe)
            return
        self.call_merge(chosen, safe)
        self.oracle.merged = after

    merges_whole_or_not_at_all = True

    @precondition(lambda self: self.can_merge and self.oracle.enabled)
    @rule()
    def unmerge(self):
        self.call_unmerge()
        self.oracle.unmerge()

    # --------------------------------------------------------------------------------------------------- the model itself

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        self.model.train(mode)

    @precondition(lambda self: self.can_cast)
    @rule(wide=st.booleans())
    def to_dtype(self, wide):
        dtype = torch.float64 if wide else torch.float32
        self.model.to(dtype)
        self.plain.to(dtype)
        self.oracle.base = {key: value.to(dtype) for key, value in self.oracle.base.items()}
        for adapter in self.oracle.adapters.values():
            adapter.tensors = {key: value.to(dtype) for key, value in adapter.tensors.items()}

    @rule()
    def copy_the_model(self):
        before = self.model
        self.model = copy.deepcopy(before)
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.fill_(torch.nan)  # nothing is shared

    @precondition(lambda self: self.oracle.enabled and not any(self.oracle.merged.values()) and self.trains())
    @rule()
    def train_one_step(self):
        expected = self.expected_gradients()
        loss_of(self.logits()).backward()
        for name, adapter in self.oracle.adapters.items():
            for saved, parameter in self.live(name).items():
                gradient = expected.get((name, saved))
                if gradient is None:
                    assert parameter.grad is None or not parameter.grad.any()
                else:
                    assert close(parameter.grad, gradient), f"{saved} of {name}"
                    parameter.data.sub_(0.01 * parameter.grad)
                    adapter.tensors[saved] = parameter.detach().clone()
        assert all(p.grad is None for p in self.model.parameters() if not p.requires_grad)
        self.model.zero_grad(set_to_none=True)

    def logits(self):
        return self.model(IDS)

    def expected_gradients(self):
        return self.oracle.gradients()

    def trains(self):
        oracle = self.oracle
        return any(flag and name in oracle.active for (name, _), flag in oracle.flags.items())

    # -------------------------------------------------------------------------------------------------------------- files

    def expected_state(self, name):
        adapter = self.oracle.adapters[name]
        return {f"base_model.model.{key}": value for key, value in adapter.tensors.items()}

    @precondition(lambda self: self.can_save and self.oracle.adapters)
    @rule(data=st.data())
    def save(self, data):
        name = self.existing(data)
        folder = self.folder / str(len(self.saved))
        path = self.call_save(name, folder)
        self.file_agrees(name, path)
        adapter = self.oracle.adapters[name]
        self.saved.append((path, adapter.recipe, dict(adapter.tensors)))

    def file_agrees(self, name, path):
        state, expected = load_file(path / SAFETENSORS_WEIGHTS_NAME), self.expected_state(name)
        assert state.keys() == expected.keys()
        assert all(same(state[key], expected[key]) for key in state)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=names, trainable=st.booleans())
    def load(self, data, name, trainable):
        path, recipe, tensors = data.draw(st.sampled_from(self.saved))
        there = self.oracle.adapters.get(name)
        if there is not None and (there.recipe != recipe or any(name in m for m in self.oracle.merged.values())):
            return
        self.call_load(path, name, recipe, trainable)
        if there is None:
            if not trainable:
                self.oracle.inference |= {name}
            self.oracle.add(name, recipe)
            if self.activates_new:
                self.oracle.activate([name])
            elif trainable and self.frees_what_it_loads:
                self.oracle.flags |= {key: True for key in self.oracle.flags if key[0] == name}
        dtype = next(iter(self.oracle.base.values())).dtype
        self.oracle.adapters[name].tensors = {key: value.to(dtype) for key, value in tensors.items()}

    frees_what_it_loads = True

    @precondition(lambda self: self.can_swap and self.saved and self.oracle.adapters)
    @rule(data=st.data())
    def hotswap(self, data):
        path, recipe, tensors = data.draw(st.sampled_from(self.saved))
        name = self.existing(data)
        if self.oracle.adapters[name].recipe != recipe:
            return
        if self.refuses_deletion(name):
            with must_fail(self):
                hotswap_adapter(self.model, str(path), name)
            return
        hotswap_adapter(self.model, str(path), name)
        dtype = next(iter(self.oracle.base.values())).dtype
        self.oracle.adapters[name].tensors = {key: value.to(dtype) for key, value in tensors.items()}

    # ------------------------------------------------------------------------------------------------- what must fail

    @rule(data=st.data(), bad=st.sampled_from(fuzzing.BAD_NAMES))
    def add_with_a_bad_name(self, data, bad):
        recipe = self.draw_recipe(data)
        with must_fail(self):
            self.call_add(bad, recipe.config())

    @rule(data=st.data(), name=names, wrong=st.sampled_from(["nothing", "norm"]))
    def add_what_does_not_fit(self, data, name, wrong):
        config = self.draw_recipe(data).config()
        config.target_modules = {"lin", "norm"} if wrong == "norm" else {wrong}
        with must_fail(self):
            self.call_add(name if name not in self.oracle.adapters else "other", config)

    @rule(bad=st.sampled_from(["nobody", "", "A", "a.b", "__base__"]))
    def name_an_adapter_that_is_not_there(self, bad):
        for call in self.calls_with_a_name():
            with must_fail(self):
                call(bad)

    def calls_with_a_name(self):
        return [self.call_set]

    @precondition(lambda self: self.can_save and self.saved)
    @rule(data=st.data(), name=names, at=st.floats(0, 0.95))
    def load_a_damaged_file(self, data, name, at):
        path, recipe, _ = data.draw(st.sampled_from(self.saved))
        there = self.oracle.adapters.get(name)
        if there is not None and there.recipe != recipe:
            return
        bad = self.folder / "damaged"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(path, bad)
        whole = (bad / SAFETENSORS_WEIGHTS_NAME).read_bytes()
        (bad / SAFETENSORS_WEIGHTS_NAME).write_bytes(whole[: int(len(whole) * at)])
        with must_fail(self):
            self.call_load(bad, name, recipe, False)


def must_fail(machine):
    """Context of a call that must raise a typed error, and change nothing."""
    return _MustFail(whole_or_not_at_all(machine.model, machine.folder))


class _MustFail:
    def __init__(self, context):
        self.context = context

    def __enter__(self):
        self.caught = self.context.__enter__()

    def __exit__(self, *error):
        swallowed = self.context.__exit__(*error)
        assert error[0] is None or swallowed
        assert self.caught, "nothing was raised"
        return True


def same(first, second):
    return first.dtype == second.dtype and torch.equal(first, second)


def close(first, second):
    tolerance = 1e-4 if first.dtype == torch.float32 else 1e-9
    return (first - second).abs().max() <= tolerance * second.abs().max().clamp_min(1)


class PeftCalls(Calls):
    """`PeftModel`'s methods."""

    prefix = "base_model.model."
    can_swap = True

    def wrap(self, base, name, config):
        self.model = peft.get_peft_model(base, config, adapter_name=name)

    def call_add(self, name, config):
        self.model.add_adapter(name, config)

    def call_set(self, chosen, inference=False):
        if isinstance(chosen, str):
            self.model.set_adapter(chosen, inference_mode=inference)
        else:
            self.model.base_model.set_adapter(chosen, inference_mode=inference)

    def call_enable(self, flag):
        tuner = self.model.base_model
        tuner.enable_adapter_layers() if flag else tuner.disable_adapter_layers()

    def call_delete(self, name):
        self.model.delete_adapter(name)

    def call_set_requires_grad(self, chosen, flag):
        self.model.set_requires_grad(chosen, flag)

    def call_merge(self, chosen, safe):
        self.model.merge_adapter(adapter_names=chosen, safe_merge=safe)

    def call_unmerge(self):
        self.model.unmerge_adapter()

    def call_save(self, name, folder):
        self.model.save_pretrained(folder, selected_adapters=[name])
        path = folder if name == "default" else folder / name
        files = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}
        expected = {"README.md"} | {os.path.join(path.relative_to(folder), file) for file in files}
        found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert found == {os.path.normpath(file) for file in expected}
        return path

    def call_load(self, path, name, recipe, trainable):
        self.model.load_adapter(path, name, is_trainable=trainable)

    def calls_with_a_name(self):
        model, folder = self.model, self.folder
        calls = [
            self.call_set,
            lambda name: self.call_set([name]),
            self.call_delete,
            lambda name: model.save_pretrained(folder / "new", selected_adapters=[name]),
        ]
        if self.can_merge:
            calls.append(lambda name: model.merge_adapter(adapter_names=[name]))
            calls.append(lambda name: model.merge_and_unload(adapter_names=[name]))
        if self.can_swap and self.saved:
            calls.append(lambda name: hotswap_adapter(model, str(self.saved[0][0]), name))
        return calls

    @rule(fails=st.booleans())
    def within_a_context(self, fails):
        oracle = self.oracle
        before = copy.deepcopy(oracle.__dict__)
        merged_before = copy.deepcopy(oracle.merged)
        try:
            with self.model.disable_adapter():
                oracle.disable()
                self.agrees()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        if before["enabled"]:
            oracle.enable()
        assert oracle.merged == merged_before

    @precondition(lambda self: self.can_merge)
    @rule(data=st.data(), chosen=st.booleans())
    def merge_and_unload(self, data, chosen):
        oracle = self.oracle
        chosen = self.some(data) if chosen and oracle.adapters else None
        used = oracle.merges(chosen)
        if used is None:
            return
        plain = copy.deepcopy(self.model).merge_and_unload(adapter_names=chosen)
        assert close(self.output(plain), oracle.output(used))
        self.is_plain(plain)

    @rule()
    def unload(self):
        plain = copy.deepcopy(self.model).unload()
        self.is_plain(plain)
        assert torch.equal(self.output(plain), self.output(self.plain))
        assert all(same(value, self.oracle.base[key]) for key, value in plain.state_dict().items())

    def is_plain(self, model):
        assert model.state_dict().keys() == self.oracle.base.keys()
        assert not any(isinstance(module, AdapterHolder) for module in model.modules())


class InjectCalls(Calls):
    """`inject_adapter_in_model` and `peft.functional`, and what clients call on each layer."""

    activates_new = True
    merges_whole_or_not_at_all = False
    can_swap = True

    def wrap(self, base, name, config):
        self.model = peft.inject_adapter_in_model(config, base, adapter_name=name)

    def layers(self):
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def call_add(self, name, config):
        peft.inject_adapter_in_model(config, self.model, adapter_name=name)

    def call_set(self, chosen, inference=False):
        functional.set_adapter(self.model, chosen, inference_mode=inference)

    def call_enable(self, flag):
        for layer in self.layers():
            layer.enable_adapters(flag)

    def refuses_deletion(self, name):
        return False

    def call_delete(self, name):
        functional.delete_adapter(self.model, name, prefix="lora_")
        self.model.peft_config.pop(name)

    def call_set_requires_grad(self, chosen, flag):
        functional.set_requires_grad(self.model, chosen, flag)

    def call_merge(self, chosen, safe):
        for layer in self.layers():
            layer.merge(safe_merge=safe, adapter_names=chosen)

    def call_unmerge(self):
        for layer in self.layers():
            if layer.merged:
                layer.unmerge()

    def expected_state(self, name):
        return self.oracle.adapters[name].tensors

    def call_save(self, name, folder):
        folder.mkdir()
        save_file(
            functional.get_peft_model_state_dict(self.model, adapter_name=name), folder / SAFETENSORS_WEIGHTS_NAME
        )
        self.model.peft_config[name].save_pretrained(folder)
        return folder

    def call_load(self, path, name, recipe, trainable):
        state = peft.load_peft_weights(path)
        if name not in self.oracle.adapters:
            config = recipe.config()
            config.inference_mode = not trainable
            peft.inject_adapter_in_model(config, self.model, adapter_name=name)
        functional.set_peft_model_state_dict(self.model, state, adapter_name=name)


class MixedCalls(PeftCalls):
    """`PeftMixedModel`'s methods."""

    recipes = MIXED
    can_save = can_swap = False

    def wrap(self, base, name, config):
        self.model = peft.get_peft_model(base, config, adapter_name=name, mixed=True)

    def call_set(self, chosen, inference=False):
        self.model.set_adapter(chosen, inference_mode=inference)

    def call_set_requires_grad(self, chosen, flag):
        self.model.base_model.set_requires_grad(chosen, flag)

    def calls_with_a_name(self):
        return [self.call_set, lambda name: self.call_set([name]), self.call_delete]


# -------------------------------------------------------------------------------------------------------------- prompts

PROMPTS = {
    f"{count} tokens": recipe("PROMPT_TUNING", {}, task_type="CAUSAL_LM", num_virtual_tokens=count) for count in (2, 3)
}


class PromptOracle(Oracle):
    """Prompts before the tokens of a language model, whose own forward is taken as it is.

    Args:
        base: the base model's tensors by name.
        model: a copy of the base model.
    """

    def __init__(self, base, model):
        super().__init__(base)
        self.language_model = model

    def names(self, adapter):
        return {"prompt_embeddings": f"prompt_encoder.{adapter}.embedding.weight"}

    def excludes(self, names):
        return len(names) > 1

    def delete(self, name):
        """As for layers, but the one that was added first takes over."""
        others = [other for other in self.adapters if other != name]
        was_active = name in self.active
        super().delete(name)
        if was_active:
            self.active = others[:1]
            self.decide(self.adapters)

    def output(self, used=None):
        embeddings = self.language_model.get_input_embeddings()(IDS)
        if self.enabled and self.active:
            prompt = self.adapters[self.active[0]].tensors["prompt_embeddings"]
            embeddings = torch.cat([prompt.expand(len(IDS), *prompt.shape), embeddings], dim=1)
        return self.language_model(inputs_embeds=embeddings).logits


class PromptCalls(PeftCalls):
    """`PeftModel`'s methods for prompts, which have no layers to merge and are disabled within a context only."""

    recipes = PROMPTS
    prefix = ""
    can_merge = can_swap = can_cast = False

    def base_model(self):
        return prompts.base_of(prompts.llama)

    @initialize(name=names, data=st.data())
    def start(self, name, data):
        base = self.base_model()
        self.plain = copy.deepcopy(base)
        state = {key: value.clone() for key, value in base.state_dict().items()}
        self.oracle = PromptOracle(state, copy.deepcopy(base))
        self.oracle.active = [name]
        self.first(base, name, self.draw_recipe(data))

    def logits(self):
        return self.model(input_ids=IDS).logits

    def output(self, model=None):
        with torch.no_grad():
            return (self.model if model is None else model)(input_ids=IDS).logits

    def live_base_name(self, key):
        return f"base_model.{key}"

    def expected_state(self, name):
        return self.oracle.adapters[name].tensors

    def call_set(self, chosen, inference=False):
        self.model.set_adapter(chosen, inference_mode=inference)

    @precondition(lambda self: False)
    @rule()
    def disable(self):
        """Within a context only."""

    @precondition(lambda self: False)
    @rule()
    def unload(self):
        """There is nothing to take out."""

    @precondition(lambda self: False)
    @rule()
    def set_requires_grad(self):
        """Refused."""

    @rule(data=st.data(), name=names, count=st.sampled_from([0, -1, 2.5, "3", None]))
    def add_what_does_not_fit(self, data, name, count):
        config = self.draw_recipe(data).config()
        config.num_virtual_tokens = count
        with must_fail(self):
            self.call_add(name, config)

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=names)
    def load_to_train(self, data, name):
        path, recipe, _ = data.draw(st.sampled_from(self.saved))
        if name not in self.oracle.adapters:
            with must_fail(self):
                self.call_load(path, name, recipe, True)

    def call_load(self, path, name, recipe, trainable):
        super().call_load(path, name, recipe, trainable and name in self.oracle.adapters)


# ----------------------------------------------------------------------------------------------------------------- runs


def machine(door, recipes):
    return type(f"{door.__name__}", (door,), {"recipes": recipes})


MACHINES = {
    "PeftModel, LoRA and token rows": machine(PeftCalls, NO_TABLE),
    "PeftModel, LoRA and tables": machine(PeftCalls, NO_ROWS),
    "PeftModel, IA3": type("PeftIA3", (PeftCalls,), {"recipes": IA3S, "can_swap": False}),
    "PeftModel, token rows": type("PeftRows", (PeftCalls,), {"recipes": ROWS, "can_swap": False}),
    "PeftMixedModel": MixedCalls,
    "PeftModel, prompts": PromptCalls,
    "injected, LoRA and token rows": machine(InjectCalls, NO_TABLE),
    "injected, LoRA and tables": machine(InjectCalls, NO_ROWS),
    "injected, IA3": type("InjectIA3", (InjectCalls,), {"recipes": IA3S, "can_swap": False}),
}


@pytest.mark.parametrize("few", [4, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.filterwarnings("ignore")
def test_calls_in_any_order(name, few):
    run_machine(MACHINES[name], few, steps=20)
