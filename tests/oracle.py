"""A plain model of what adapters do, for the tests of calls in any order.

It knows no adapter layer: it has the base model's weights as tensors, each adapter's tensors by their names on disk, which
adapters are active, enabled and merged, and which tensors train. From these it computes names, flags and, by plain matrix
products, outputs and gradients.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft


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
    scale: float = SCALE
    """By what the product of LoRA's or LoHa's factors is multiplied."""

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
FACTORS = ("lora_B.weight", "lora_A.weight")


def weighted(recipes, rank):
    """What `add_weighted_adapter` makes of adapters: all of their parts, and no scale beside the factors' own."""
    parts = {part: None for one in recipes for part in one.parts}
    tokens = next((one.tokens for one in recipes if one.tokens), ())
    return Recipe("LORA", (("r", rank),), tuple(parts), tokens, scale=1.0)


MIXED = {
    "plain": LORAS["plain"],
    "copies": LORAS["copies"],
    "dora": LORAS["dora"],
    "rows": LORAS["rows"],
    "loha": recipe("LOHA", {"lin": "loha", "twin": "loha"}, target_modules=["lin", "twin"], r=2, alpha=3),
}


@dataclass
class Adapter:
    """One adapter as the plain model knows it."""

    recipe: Recipe
    owners: dict
    """(module, part) -> the layer or wrapper that holds it."""
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

    def place(self, recipe, module, part):
        """The owner of a part that is being added: the outermost one if it is of the right kind, otherwise a new one."""
        kind, around = part if part in WRAPPED else recipe.method, self.layers.setdefault(module, [])
        if not around or around[-1][1] != kind:
            around.append((module, kind, len(around)))
            self.merged[around[-1]] = []
        elif part == "copy":
            self.merged[around[-1]] = []  # a copy is made of the original
        return around[-1]

    def held(self, owner):
        return [name for name, adapter in self.adapters.items() if owner in adapter.owners.values()]

    def owners(self):
        return [owner for owners in self.layers.values() for owner in owners]

    def path(self, owner):
        """The dotted name of an owner in the base model."""
        around = self.layers[owner[0]]
        return owner[0] + ".base_layer" * (len(around) - 1 - around.index(owner))

    def names(self, adapter):
        """Names on disk -> names in memory."""
        return {
            f"{module}.{saved}": f"{self.path(owner)}.{live.format(adapter)}"
            for (module, part), owner in self.adapters[adapter].owners.items()
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
        self.adapters[name] = Adapter(recipe, {part: self.place(recipe, *part) for part in recipe.parts})
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
            if (owner[1] == "copy" and len(after[owner]) > 1) or self.overlap(after[owner]):
                return None
        return after

    def updates(self, name):
        """Module -> what a LoRA adapter without magnitudes adds to its weight: scale times the product of the factors."""
        adapter, found = self.adapters[name], {}
        for module, part in adapter.recipe.parts:
            if part in ("lora", "table"):
                left, right = ("lora_embedding_B", "lora_embedding_A") if part == "table" else FACTORS
                tensors = adapter.tensors[f"{module}.{left}"], adapter.tensors[f"{module}.{right}"]
                found[module] = adapter.recipe.scale * tensors[0] @ tensors[1]
        return found

    def unmerge(self):
        self.merged = {owner: [] for owner in self.merged}

    def overlap(self, names):
        """Whether two adapters train the row of one token."""
        tokens = [token for name in names for token in self.adapters[name].recipe.tokens]
        return len(tokens) != len(set(tokens))

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
                    part = next(part for (_, part), place in adapter.owners.items() if place == owner)
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
        start: the base model's weight, of which DoRA takes the norm.
        weight, bias: with earlier adapters in place, in the order of activation or merging.
    """
    if part in ("lora", "dora"):
        delta = recipe.scale * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
        if part == "lora":
            return weight + delta, bias
        norm = (start + delta).norm(dim=1).detach()
        return (tensors["lora_magnitude_vector"] / norm)[:, None] * (weight + delta), bias
    if part == "table":
        return weight + recipe.scale * (tensors["lora_embedding_B"] @ tensors["lora_embedding_A"]).T, bias
    if part == "loha":
        first, second = (tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"] for i in (1, 2))
        return weight + recipe.scale * first * second, bias
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
