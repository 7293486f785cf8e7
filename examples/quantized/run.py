"""LoRA on a base model in 8 and in 4 bits, beside the same in full precision.

A vision transformer learns the handwritten digits 0 to 4 of scikit-learn. Then it is loaded in each form that bitsandbytes
and torchao have for it, and an adapter teaches it the digits 5 to 9. All adapters get the same rank, learning rate, pictures
and seeds, so what differs is what the base model's weights are rounded to. In the end each adapter is merged into the
weights that it was trained on, which rounds once more.
"""

import argparse
import importlib.util
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait slow all down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import torch
import transformers
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, TorchAoConfig, ViTConfig, ViTForImageClassification

from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils.loftq_utils import replace_lora_weights_loftq

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt
from matplotlib import ticker


def in_8_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])


def in_4_bits(quant_type: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )


def in_int8_of_torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"])


@dataclass(frozen=True)
class Form:
    """How the base model's weights are kept."""

    package: str | None
    config: Callable[[], Any] | None
    colour: str
    loftq: bool = False


FORMS = {
    "float32": Form(None, None, "#8a8f98"),
    "int8, bitsandbytes": Form("bitsandbytes", in_8_bits, "#2e6f95"),
    "int8, torchao": Form("torchao", in_int8_of_torchao, "#1b998b"),
    "NF4, bitsandbytes": Form("bitsandbytes", lambda: in_4_bits("nf4"), "#d1495b"),
    "NF4, LoftQ start": Form("bitsandbytes", lambda: in_4_bits("nf4"), "#7b3e8e", loftq=True),
    "FP4, bitsandbytes": Form("bitsandbytes", lambda: in_4_bits("fp4"), "#edae49"),
}
RANK, ALPHA, RATE, BASE_RATE = 8, 16, 2e-3, 1e-3
BASE_TRAIN, TRAIN = 700, 450  # of some 900 pictures on each side; the others are held out


@dataclass(frozen=True)
class Plan:
    """How large a model, how many repetitions, and how long to train."""

    width: int
    layers: int
    seeds: int
    base_steps: int
    steps: int
    batch: int


FULL = Plan(width=128, layers=3, seeds=3, base_steps=200, steps=100, batch=32)
QUICK = Plan(width=64, layers=2, seeds=1, base_steps=80, steps=40, batch=32)


@dataclass(frozen=True)
class Pictures:
    """Digits of 8 x 8 pixels `(count, 1, 8, 8)` from -1 to 1, and which of five digits each one is."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, chosen: slice | torch.Tensor) -> "Pictures":
        return Pictures(self.pixels[chosen], self.labels[chosen])


@dataclass
class Run:
    """One training on one form: shares of held-out pictures that are recognised, bytes, seconds a step."""

    form: str
    seed: int
    rounding: float
    """How far the base model's logits are off those in full precision, relative to their size."""
    known: float
    """Digits of the base model, before the adapter is trained."""
    new: float
    merged: float
    merge_rounding: float
    """How far merging moves the logits, in the same measure."""
    unmerged_exactly: bool
    weight_bytes: int
    trainable: int
    step_seconds: float
    losses: list[float]


def load_halves(seed: int) -> tuple[Pictures, Pictures]:
    """Return the pictures of 0 to 4, and those of 5 to 9, shuffled."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    pixels = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    low = labels < 5
    return Pictures(pixels[low], labels[low]), Pictures(pixels[~low], labels[~low] - 5)


def build_base(plan: Plan, seed: int) -> ViTForImageClassification:
    """Return an untrained vision transformer whose tokens are squares of 2 x 2 pixels."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=plan.width,
        intermediate_size=2 * plan.width,
        num_hidden_layers=plan.layers,
        num_attention_heads=4,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def installed(form: Form) -> bool:
    """Return whether the package that a form needs is there."""
    return form.package is None or importlib.util.find_spec(form.package) is not None


def adapt(folder: Path, form: Form, seed: int) -> nn.Module:
    """Load the base model in a form, and give it an adapter and a copy of its head."""
    if form.config is None:
        base = ViTForImageClassification.from_pretrained(folder)
    else:
        base = ViTForImageClassification.from_pretrained(
            folder, quantization_config=form.config(), device_map="cpu", dtype=torch.float32
        )
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(base, config)
    if form.loftq:
        replace_lora_weights_loftq(model, folder)
    return model


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a weight consists of: codes, and what says which values they stand for."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_of(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def linear_bytes(model: nn.Module) -> int:
    """Return the memory that the base model's adapted weights take, with their scales."""
    total = 0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # The state dictionary of a quantised layer has its scales beside its codes.
            entries = module.get_base_layer().state_dict().items()
            total += sum(part.nbytes for name, value in entries if name != "bias" for part in tensors_of(value))
    return total


def train(
    model: nn.Module, pictures: Pictures, steps: int, batch: int, rate: float, seed: int
) -> tuple[list[float], float]:
    """Train whatever requires a gradient; return the loss of every step, and the median of their seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    model.train()
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        chosen = pictures[torch.randint(len(pictures.labels), (batch,), generator=generator)]
        loss = nn.functional.cross_entropy(model(pixel_values=chosen.pixels).logits, chosen.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, statistics.median(seconds)


@torch.no_grad()
def predict(model: nn.Module, pictures: Pictures) -> torch.Tensor:
    """Return the logits, (count, 5)."""
    model.eval()
    return model(pixel_values=pictures.pixels).logits


def accuracy(logits: torch.Tensor, pictures: Pictures) -> float:
    """Return the share of pictures that are recognised."""
    return float((logits.argmax(-1) == pictures.labels).float().mean())


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the size of a difference relative to what is expected."""
    return float((logits - expected).norm() / expected.norm())


def run_one(folder: Path, name: str, known: Pictures, new: Pictures, plan: Plan, seed: int) -> Run:
    """Load, adapt, merge and unmerge in one form."""
    model = adapt(folder, FORMS[name], seed)
    before = predict(model, known)
    exact = predict(ViTForImageClassification.from_pretrained(folder), known)
    losses, seconds = train(model, new[:TRAIN], plan.steps, plan.batch, RATE, seed)
    held_out = new[TRAIN:]
    adapted = predict(model, held_out)
    size = linear_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that merging rounds is what we are here to see
        model.merge_adapter()
    merged = predict(model, held_out)
    model.unmerge_adapter()
    return Run(
        form=name,
        seed=seed,
        rounding=distance(before, exact),
        known=accuracy(before, known),
        new=accuracy(adapted, held_out),
        merged=accuracy(merged, held_out),
        merge_rounding=distance(merged, adapted),
        unmerged_exactly=torch.equal(predict(model, held_out), adapted),
        weight_bytes=size,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        step_seconds=seconds,
        losses=losses,
    )


def compare(folder: Path, known: Pictures, new: Pictures, plan: Plan, seed: int) -> list[Run]:
    """Train in every form that is installed from every seed."""
    names = [name for name, form in FORMS.items() if installed(form)]
    wanted = [(name, repetition) for repetition in range(seed, seed + plan.seeds) for name in names]
    runs = []
    with tqdm(wanted, unit="run") as bar:
        for name, repetition in bar:
            bar.set_description(name)
            runs.append(run_one(folder, name, known[BASE_TRAIN:], new, plan, repetition))
    return runs


def scores(runs: list[Run], form: str, figure: str) -> tuple[float, float]:
    """Return mean and standard deviation of a share over the seeds, in percent."""
    found = [100 * getattr(run, figure) for run in runs if run.form == form]
    return statistics.mean(found), statistics.pstdev(found)


def print_table(runs: list[Run]) -> None:
    """Print the table for a terminal."""
    print("\nheld-out accuracy and how far logits are off (%), mean and standard deviation over the seeds")
    heads = ("logits off by", "known digits", "new digits", "merged", "moved by")
    print(f"{'weights':20}{'kB':>8}" + "".join(f"{head:>15}" for head in heads))
    figures = ("rounding", "known", "new", "merged", "merge_rounding")
    for form in dict.fromkeys(run.form for run in runs):
        cells = ("{:.1f} ± {:.1f}".format(*scores(runs, form, figure)) for figure in figures)
        size = next(run.weight_bytes for run in runs if run.form == form) / 1e3
        print(f"{form:20}{size:>8,.0f}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"each adapter trains {runs[0].trainable:,} parameters, with the head")
    missing = sorted({form.package for form in FORMS.values() if not installed(form)})
    if missing:
        print(f"left out, since they are not installed: {', '.join(missing)}")


def draw(runs: list[Run], path: Path) -> None:
    """Draw rounding over memory, accuracy with the adapter and merged, and how the loss falls."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14.5, 4.6), layout="constrained", width_ratios=(1, 1.3, 1)
    )
    forms = list(dict.fromkeys(run.form for run in runs))
    for number, form in enumerate(forms):
        colour, own = FORMS[form].colour, [run for run in runs if run.form == form]
        # A little beside each other, since some forms take the same memory.
        size = own[0].weight_bytes / 1e3 * 1.03 ** (number - len(forms) / 2)
        off, moved = scores(runs, form, "rounding")[0], scores(runs, form, "merge_rounding")[0]
        if off:
            left.plot(size, off, "o", color=colour, label=form, markersize=8)
            left.plot(size, moved, "o", markerfacecolor="white", color=colour, markersize=8)
        else:
            left.axvline(size, color=colour, linestyle="--", label=form)
        for figure_name, place, fill in (("new", number - 0.13, colour), ("merged", number + 0.13, "white")):
            mean, deviation = scores(runs, form, figure_name)
            middle.errorbar(
                place, mean, deviation, fmt="o", capsize=3, color=colour, markerfacecolor=fill, markersize=8
            )
        curves = torch.tensor([run.losses for run in own])
        right.plot(_smooth(curves.mean(0).tolist()), color=colour, linewidth=2)
    left.set(xscale="log", yscale="log")
    right.set_yscale("log")
    for axis, locator in (
        (left.xaxis, ticker.LogLocator(base=2)),
        (left.yaxis, ticker.LogLocator(subs=(1, 2, 5))),
        (right.yaxis, ticker.LogLocator(subs=(1, 2, 5))),
    ):
        axis.set_major_locator(locator)
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter("{x:,g}")
    left.set(
        xlabel="memory of the adapted weights (kB, log scale)",
        ylabel="logits off by (%, log scale)",
        title="Rounding: the base (full), merging (hollow)",
    )
    middle.set(
        ylabel="held-out accuracy on the new digits (%)",
        title="With the adapter (full), merged (hollow)",
        xticks=range(len(forms)),
        ylim=(50, 100),
    )
    middle.set_xticklabels([form.replace(", ", "\n") for form in forms], fontsize=8)
    right.set(xlabel="step", ylabel="training loss (log scale)", title="Learning")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6)
    for axis in (left, middle, right):
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
    parser.add_argument("--out", type=Path, default=Path("outputs/quantized"), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="a smaller model and few steps, to see that all works")
    parser.add_argument("--seed", type=int, default=0)
    # The model is so small that a second thread waits more than it helps.
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which tells of each cast
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    plan = QUICK if arguments.quick else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)

    known, new = load_halves(arguments.seed)
    base = build_base(plan, arguments.seed)
    train(base, known[:BASE_TRAIN], plan.base_steps, plan.batch, BASE_RATE, arguments.seed)
    base_accuracy = accuracy(predict(base, known[BASE_TRAIN:]), known[BASE_TRAIN:])
    print(f"the base recognises {base_accuracy:.1%} of the digits 0 to 4")
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        runs = compare(Path(folder), known, new, plan, arguments.seed)

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
    draw(runs, arguments.out / "quantized.png")
    print_table(runs)
    print(f"{arguments.out / 'quantized.png'} shows it ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
