"""Compare this library with the released one, case by case, in one run; writes a table.

Two environments measure in turn, round by round, so that a machine that slows down slows both. Reported is the median over
the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
RELEASE = "0.21.2"
PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", f"peft=={RELEASE}")
MARKS = {
    "import peft": 0.1,
    "get_peft_model, 64 layers": 0.33,
    "get_peft_model, 1000 layers": 0.33,
    "get_peft_model, 4000 layers": 0.33,
    "PeftModel.from_pretrained, 256 layers": 0.4,
    "disable_adapter and back, 1000 layers": 0.4,
    "add_weighted_adapter svd, 32 layers of 256": 0.3,
    "load_adapter, the 2nd of 30, 256 layers": 0.33,
    "load_adapter, the 30th of 30, 256 layers": 0.33,
    "training step, hidden 64: overhead": 0.7,
    "training step, hidden 1024: overhead": 1.0,
    "DoRA beyond LoRA, training step, hidden 64": 0.6,
    "DoRA beyond LoRA, training step, hidden 1024": 0.6,
}
"""What a ratio to the release is to stay under."""
WITHIN = {
    ("batch of 8 with 8 adapters, hidden 64", "batch of 8 with one adapter, hidden 64"): 1.3,
    ("batch of 8 with 8 adapters, hidden 768", "batch of 8 with one adapter, hidden 768"): 1.3,
}
"""What the ratio of two cases of one library is to stay under."""


def release_python(folder: Path) -> Path:
    """The interpreter of an environment with the released library; made on the first run."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"Making an environment with the release {RELEASE} in {folder} ...")
        venv.create(folder, with_pip=True)
        subprocess.check_call([python, "-m", "pip", "install", "-q", *PACKAGES])
    return python


def measure(python: Path | str, only: list[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [os.fspath(python), "-W", "ignore", os.fspath(HERE / "cases.py"), *(["--only", *only] if only else [])]
    output = subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL, text=True)
    return json.loads(output.strip().splitlines()[-1])


def ratios(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, tuple[float, float, float]]:
    """Case -> median seconds of ours, of the release, and median ratio."""
    table = {}
    for case in rounds[0][0]:
        ours = [mine[case] for mine, _ in rounds]
        theirs = [other[case] for _, other in rounds]
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs))
        table[case] = (statistics.median(ours), statistics.median(theirs), ratio)
    return table


def as_markdown(table: dict[str, tuple[float, float, float]], rounds: int) -> str:
    lines = [
        f"Median of {rounds} rounds against release {RELEASE}, one thread. Ratios below 1 are faster.",
        "",
        "| case | ours, ms | release, ms | ratio | mark |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, (ours, theirs, ratio) in table.items():
        mark = MARKS.get(case)
        verdict = "" if mark is None else f"{mark:.2f} {'met' if ratio <= mark else 'missed'}"
        lines.append(f"| {case} | {ours * 1e3:.2f} | {theirs * 1e3:.2f} | {ratio:.2f} | {verdict} |")
    compared = [pair for pair in WITHIN if table.keys() >= set(pair)]
    if compared:
        lines += ["", "| one case over another | ours | release | mark |", "|---|---:|---:|---:|"]
    for above, below in compared:
        ours, theirs = (table[above][side] / table[below][side] for side in (0, 1))
        mark = WITHIN[above, below]
        verdict = f"{mark:.2f} {'met' if ours <= mark else 'missed'}"
        lines.append(f"| {above} / {below} | {ours:.2f} | {theirs:.2f} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="cases of cases.py")
    parser.add_argument("--release-env", type=Path, default=HERE.parent / ".venv-release")
    parser.add_argument("--out", type=Path, default=HERE.parent / "outputs" / "benchmarks")
    arguments = parser.parse_args()
    python = release_python(arguments.release_env)
    rounds = [
        (measure(sys.executable, arguments.only), measure(python, arguments.only))
        for _ in tqdm(range(arguments.rounds), desc="Rounds")
    ]
    table = ratios(rounds)
    text = as_markdown(table, arguments.rounds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(text)
    (arguments.out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
