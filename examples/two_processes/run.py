"""The same training by one process, and by two with DDP and with FSDP2: equal to rounding, and what each costs.

`train.py` is the training, LoRA and a head on a pretrained sentence model that learns which words people like. It is
started as a user would: by itself, and by torchrun with two processes that talk over gloo. Then each adapter is loaded
in this process, and must give what the processes got.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

import train

from peft import PeftModel

matplotlib.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt

PROCESSES = 2
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
TITLES = {"one": "one process", "ddp": "two, DDP", "fsdp2": "two, FSDP2"}
COLOURS = {"one": "#8a8f98", "ddp": "#2e6f95", "fsdp2": "#d1495b"}
SIZES = {"ddp": 7, "fsdp2": 3}  # rings around dots, since the two often come out the same
PARTS = {"weight_bytes": "weights", "state_bytes": "optimizer", "step_bytes": "step"}
STRENGTHS = {"weight_bytes": 1.0, "state_bytes": 0.7, "step_bytes": 0.35}


@dataclass
class Result:
    """One way of training: what its processes reported, and what became of the adapter in this one."""

    way: str
    reports: list[dict]
    loaded_off_by: float
    """The most by which logits of the adapter, loaded here, differ from those of the processes."""

    @property
    def losses(self) -> list[float]:
        return self.reports[0]["losses"]

    def largest(self, figure: str) -> float:
        return max(report[figure] for report in self.reports)

    def off_by(self, reference: "Result") -> float:
        """Return the most by which losses differ from those of another way."""
        return max(abs(a - b) for a, b in zip(self.losses, reference.losses))


def start(ways: list[str], processes: int, arguments: argparse.Namespace) -> None:
    """Run `train.py` in some processes for some ways, and pass on what goes wrong."""
    launcher = [*TORCHRUN, "--nproc-per-node", str(processes)] if processes > 1 else []
    options = ["--out", str(arguments.out), "--seed", str(arguments.seed), "--threads", str(arguments.threads)]
    command = [sys.executable, *launcher, train.__file__, "--ways", *ways, *options]
    done = subprocess.run(
        command + ["--quick"] * arguments.quick,
        env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-5000:]}")


def collect(way: str, arguments: argparse.Namespace) -> Result:
    """Read what the processes reported, and load their adapter onto a fresh model."""
    paths = sorted(arguments.out.glob(f"{way}[0-9].json"))
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path in paths:
        path.unlink()
    torch.manual_seed(arguments.seed + 1)  # another head than the one that was trained
    reader = train.Reader()
    model = PeftModel.from_pretrained(train.SentimentModel(reader), arguments.out / way)
    _, held_out = train.read_words(arguments.seed, train.QUICK if arguments.quick else train.FULL)
    found, expected = train.predict(model, reader, held_out), torch.tensor(reports[0].pop("logits"))
    for report in reports[1:]:
        del report["logits"]
    return Result(way, reports, float((found - expected).abs().max()))


def print_table(results: list[Result]) -> None:
    """Print the table for a terminal."""
    heads = ("losses off by", "loaded, off by", "weights", "optimizer", "a step", "s per step", "accuracy")
    print("\nmemory for tensors in MB, of the process that needs most")
    print(f"{'':13}" + "".join(f"{head:>15}" for head in heads))
    for result in results:
        cells = [f"{result.off_by(results[0]):.0e}", f"{result.loaded_off_by:.0e}"]
        cells += [f"{result.largest(figure) / 1e6:.1f}" for figure in PARTS]
        cells += [f"{result.largest('step_seconds'):.2f}", f"{result.reports[0]['accuracy']:.1%}"]
        print(f"{TITLES[result.way]:13}" + "".join(f"{cell:>15}" for cell in cells))


def draw(results: list[Result], path: Path) -> None:
    """Draw the losses on top of each other, by how much they differ, memory and time."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 4, figsize=(14.5, 4.2), layout="constrained", width_ratios=(1.3, 1.3, 1.2, 0.9))
    curves, differences, memory, seconds = axes
    for width, result in zip((7, 4, 1.5), results):  # each narrower than the one below it
        curves.plot(result.losses, color=COLOURS[result.way], linewidth=width, label=TITLES[result.way])
    for result in results[1:]:
        gaps = [abs(a - b) for a, b in zip(result.losses, results[0].losses)]
        hollow = {"markerfacecolor": "none"} if result.way == "ddp" else {}
        differences.plot(gaps, "o", color=COLOURS[result.way], markersize=SIZES[result.way], **hollow)
    for place, result in enumerate(results):
        _stack(memory, place, result)
        seconds.bar(place, result.largest("step_seconds"), color=COLOURS[result.way], width=0.6)
        seconds.text(
            place, result.largest("step_seconds"), f"{result.largest('step_seconds'):.2f}", ha="center", va="bottom"
        )
    curves.set(xlabel="step", ylabel="loss of the whole batch", title="Three runs, one curve")
    differences.set(xlabel="step", ylabel="difference to one process", title="Equal to rounding")
    differences.set_ylim(bottom=0)
    memory.set(ylabel="MB of tensors per process", title="Memory")
    seconds.set(ylabel="seconds per step", title="Time")
    names = [TITLES[result.way].replace(", ", ",\n").replace("one process", "one\nprocess") for result in results]
    for axis in (memory, seconds):
        axis.set_xticks(range(len(results)), names)
        axis.margins(y=0.12)
    for axis in axes:
        axis.grid(alpha=0.25, axis="y")
        axis.set_axisbelow(True)
    figure.legend(*curves.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _stack(axis: plt.Axes, place: int, result: Result) -> None:
    bottom = 0.0
    for figure, name in PARTS.items():
        height = result.largest(figure) / 1e6
        axis.bar(
            place, height, bottom=bottom, width=0.6, color=COLOURS[result.way], alpha=STRENGTHS[figure], linewidth=0
        )
        if height > 10:  # otherwise there is no room
            ink = "white" if STRENGTHS[figure] == 1 else "black"
            middle = bottom + height / 2
            axis.text(place, middle, f"{name}\n{height:.0f}", ha="center", va="center", fontsize=8, color=ink)
        bottom += height
    axis.text(place, bottom, f"{bottom:.0f}", ha="center", va="bottom", fontweight="bold")


def main() -> None:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/two_processes"), help="where the results go")
    parser.add_argument("--quick", action="store_true", help="few words, to see that everything works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    train.logging.set_verbosity_error()
    train.logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)

    # What takes longest in the short form is to start processes, so that these do everything.
    runs = (
        [(list(TITLES), PROCESSES)]
        if arguments.quick
        else [(["one"], 1), (["ddp"], PROCESSES), (["fsdp2"], PROCESSES)]
    )
    for ways, processes in tqdm(runs, unit="run"):
        start(ways, processes, arguments)
    results = [collect(way, arguments) for way in TITLES]

    figures = {
        "seed": arguments.seed,
        "quick": arguments.quick,
        "threads": arguments.threads,
        "runs": [
            {"way": r.way, "off_by": r.off_by(results[0]), "loaded_off_by": r.loaded_off_by, "reports": r.reports}
            for r in results
        ],
        "seconds": time.perf_counter() - begin,
    }
    (arguments.out / "results.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw(results, arguments.out / "two_processes.png")
    print_table(results)
    print(f"{arguments.out / 'two_processes.png'} shows it ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
