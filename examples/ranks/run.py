"""LoRA, DoRA, PiSSA and rsLoRA at four ranks, side by side on the same task.

A small vision transformer learns the handwritten digits 0 to 4 of scikit-learn; then every method has a hundred steps to
teach it the digits 5 to 9. All get the same `lora_alpha`, learning rate, pictures and seeds, so what differs is what a
method makes of its rank.
"""

import argparse
import copy
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

from peft import LoraConfig, get_peft_model

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt
from matplotlib import ticker

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "rsLoRA": {"use_rslora": True},
}
# What the methods are measured against: the least and the most that one can train.
LIMITS = ("head alone", "all weights")
COLOURS = {"LoRA": "#8a8f98", "DoRA": "#edae49", "PiSSA": "#2e6f95", "rsLoRA": "#1b998b", "all weights": "#d1495b"}
ALPHA, RATE, FULL_RATE = 8, 2e-3, 1e-3
BASE_TRAIN, TRAIN = 700, 450  # of some 900 pictures on each side; the others are held out


@dataclass(frozen=True)
class Plan:
    """Which ranks, how many repetitions, and how long to train."""

    ranks: tuple[int, ...]
    seeds: int
    base_steps: int
    steps: int
    batch: int


FULL = Plan(ranks=(2, 8, 32, 64), seeds=3, base_steps=300, steps=100, batch=64)
QUICK = Plan(ranks=(2, 32), seeds=1, base_steps=80, steps=45, batch=32)


@dataclass(frozen=True)
class Pictures:
    """Digits of 8 x 8 pixels `(count, 1, 8, 8)` from -1 to 1, and which of five digits each one is."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, chosen: slice | torch.Tensor) -> "Pictures":
        return Pictures(self.pixels[chosen], self.labels[chosen])


@dataclass
class Run:
    """One training: what it was, and what came out."""

    method: str
    rank: int | None
    seed: int
    accuracy: float
    trainable: int
    seconds: float
    losses: list[float]


def load_halves(seed: int) -> tuple[Pictures, Pictures]:
    """Return the pictures of 0 to 4, and those of 5 to 9, shuffled."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    pixels = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    low = labels < 5
    return Pictures(pixels[low], labels[low]), Pictures(pixels[~low], labels[~low] - 5)


def build_base(seed: int) -> ViTForImageClassification:
    """Return an untrained vision transformer whose tokens are squares of 2 x 2 pixels."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def adapt(base: ViTForImageClassification, method: str, rank: int | None, seed: int) -> nn.Module:
    """Return a copy of the base, set up so that what the method trains requires gradients."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if method == "all weights":
        return model
    if method == "head alone":
        model.vit.requires_grad_(False)
        return model
    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
        **METHODS[method],
    )
    return get_peft_model(model, config)


def train(model: nn.Module, pictures: Pictures, steps: int, batch: int, rate: float, seed: int) -> list[float]:
    """Train whatever requires a gradient; return the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    model.train()
    losses = []
    for _ in range(steps):
        chosen = pictures[torch.randint(len(pictures.labels), (batch,), generator=generator)]
        loss = nn.functional.cross_entropy(model(pixel_values=chosen.pixels).logits, chosen.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Return the share of pictures that the model recognises."""
    model.eval()
    return float((model(pixel_values=pictures.pixels).logits.argmax(-1) == pictures.labels).float().mean())


def compare(base: ViTForImageClassification, pictures: Pictures, plan: Plan, seed: int) -> list[Run]:
    """Train with every method at every rank from every seed."""
    wanted = [(method, None) for method in LIMITS] + [(method, rank) for method in METHODS for rank in plan.ranks]
    runs = []
    with tqdm(total=len(wanted) * plan.seeds, unit="run", mininterval=0.5) as bar:
        for method, rank in wanted:
            bar.set_description(method if rank is None else f"{method}, rank {rank}")
            for repetition in range(seed, seed + plan.seeds):
                model = adapt(base, method, rank, repetition)
                start = time.perf_counter()
                rate = FULL_RATE if method == "all weights" else RATE
                losses = train(model, pictures[:TRAIN], plan.steps, plan.batch, rate, repetition)
                runs.append(
                    Run(
                        method=method,
                        rank=rank,
                        seed=repetition,
                        accuracy=accuracy(model, pictures[TRAIN:]),
                        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
                        seconds=time.perf_counter() - start,
                        losses=losses,
                    )
                )
                bar.update()
    return runs


def scores(runs: list[Run], method: str, rank: int | None) -> tuple[float, float]:
    """Return mean and standard deviation of the accuracy over the seeds, in percent."""
    found = [100 * run.accuracy for run in runs if (run.method, run.rank) == (method, rank)]
    return statistics.mean(found), statistics.pstdev(found)


def print_table(runs: list[Run], plan: Plan) -> None:
    """Print the table for a terminal."""

    def cell(method: str, rank: int | None) -> str:
        mean, deviation = scores(runs, method, rank)
        return f"{mean:.1f} ± {deviation:.1f}"

    print("\nheld-out accuracy on the new digits (%), mean and standard deviation over the seeds")
    print(f"{'':12}" + "".join(f"{f'rank {rank}':>13}" for rank in plan.ranks) + f"{'seconds a run':>16}")
    for method in METHODS:
        seconds = statistics.mean(run.seconds for run in runs if run.method == method)
        print(f"{method:12}" + "".join(f"{cell(method, rank):>13}" for rank in plan.ranks) + f"{seconds:>16.1f}")
    counts = [next(run.trainable for run in runs if run.rank == rank and run.method == "LoRA") for rank in plan.ranks]
    print(f"{'LoRA trains':12}" + "".join(f"{count:>13,}" for count in counts) + "   parameters")
    for method in LIMITS:
        count = next(run.trainable for run in runs if run.method == method)
        print(f"{method}: {cell(method, None)}, {count:,} parameters")


def draw(runs: list[Run], plan: Plan, path: Path) -> None:
    """Draw accuracy over rank, and how the loss falls at the highest rank."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    for offset, method in zip((-0.045, -0.015, 0.015, 0.045), METHODS):
        means, deviations = zip(*(scores(runs, method, rank) for rank in plan.ranks))
        # A little beside each other, or the bars would hide one another.
        places = [rank * 2**offset for rank in plan.ranks]
        left.errorbar(places, means, deviations, fmt="o-", capsize=3, color=COLOURS[method], label=method)
    mean, deviation = scores(runs, "all weights", None)
    left.axhspan(mean - deviation, mean + deviation, color=COLOURS["all weights"], alpha=0.12)
    left.axhline(mean, color=COLOURS["all weights"], linestyle="--", label="all weights")
    left.set_xscale("log", base=2)
    left.set_xticks(plan.ranks, [str(rank) for rank in plan.ranks])
    left.set(xlabel="rank", ylabel="held-out accuracy on the new digits (%)", title="What a rank is worth")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)

    rank = plan.ranks[-1]
    for method in (*METHODS, "all weights"):
        wanted = rank if method in METHODS else None
        curves = torch.tensor([run.losses for run in runs if (run.method, run.rank) == (method, wanted)])
        style = "--" if method == "all weights" else "-"
        right.plot(_smooth(curves.mean(0).tolist()), style, color=COLOURS[method], label=method, linewidth=2)
    right.set(yscale="log", xlabel="step", ylabel="training loss (log scale)", title=f"Learning, rank {rank}")
    right.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(ticker.NullLocator())
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _smooth(losses: list[float], keep: float = 0.8) -> list[float]:
    """Return a running average, since single steps see different pictures."""
    smooth, average = [], losses[0]
    for loss in losses:
        average = keep * average + (1 - keep) * loss
        smooth.append(average)
    return smooth


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/ranks"), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="two ranks and few steps, to see that everything works")
    parser.add_argument("--seed", type=int, default=0)
    # The model is so small that a second thread waits more than it helps.
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    plan = QUICK if arguments.quick else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)

    known, new = load_halves(arguments.seed)
    base = build_base(arguments.seed)
    train(base, known[:BASE_TRAIN], plan.base_steps, plan.batch, FULL_RATE, arguments.seed)
    base_accuracy = accuracy(base, known[BASE_TRAIN:])
    print(f"the base recognises {base_accuracy:.1%} of the digits 0 to 4")
    runs = compare(base, new, plan, arguments.seed)

    figures = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "threads": arguments.threads,
        "plan": asdict(plan),
        "base_accuracy": base_accuracy,
        "runs": [asdict(run) for run in runs],
        "seconds": time.perf_counter() - start,
    }
    (arguments.out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw(runs, plan, arguments.out / "ranks.png")
    print_table(runs, plan)
    print(f"{arguments.out / 'ranks.png'} shows it ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
