"""Run the tests of clients with several sets of their releases, and print one table.

A set is a name with an environment of its own. What it pins stands in constraints/NAME.txt, in the form of constraints.txt, and
takes the place of the pins of the same packages there; a set without such a file is constraints.txt as it is.

python scripts/compat.py --constraints NAME       print all that the set pins, as a file of constraints for pip
python scripts/compat.py NAME=FOLDER ... [-- ARGS]    in each environment, run the tests that carry the mark `compat`, or
                                                  the files named in ARGS, with what else is in ARGS for pytest

Leaves pytest's report of each set as build/compat/NAME.xml, and what the table says as build/compat/results.json and
table.md. Exit code 1 if a test failed, if a set ran no test, or if an environment is not what its set pins.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints"
RESULTS = ROOT / "build" / "compat"
SHOWN = ("torch", "transformers", "diffusers", "accelerate", "tokenizers")
"""Packages with a column of their own."""

OUTCOMES = ("passed", "failed", "errors", "skipped")
MARK = "mark.compat"
SELECTED = "compat and not slow and not gpu"
PIN = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*==\s*([^\s;#]+)\s*(?:;\s*([^#]+?)\s*)?(?:#.*)?")
# Run with an environment's own Python: which packages it has, and which of the pins hold there.
ASK = """
import importlib.metadata, json, platform, sys
from packaging.markers import Marker
holds = lambda marker: not marker or Marker(marker).evaluate()
versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
pins = [pin for pin in json.load(sys.stdin) if holds(pin[2])]
json.dump({"versions": {"python": platform.python_version(), **versions}, "pins": pins}, sys.stdout)
"""


@dataclass(frozen=True)
class Pin:
    """A line of a file of constraints: a package, its version, and where that holds."""

    package: str
    version: str
    condition: str
    line: str


@dataclass
class Result:
    """How the tests of one set went."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def row(self) -> list[str]:
        versions = [self.versions.get(package, "none") for package in ("python", *SHOWN)]
        return [self.name, *versions, *(str(self.counts.get(kind, 0)) for kind in OUTCOMES), f"{self.seconds:.0f}"]


# ------------------------------------------------------------------------------------------------------------- pins


def plain(package: str) -> str:
    """A package's name in the one spelling that all of its spellings mean."""
    return re.sub(r"[-_.]+", "-", package).lower()


def read_pins(path: Path) -> list[Pin]:
    """The pins in a file of constraints.

    Raises:
        ValueError: a line is something else.
    """
    pins = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.partition("#")[0].strip():
            continue
        found = PIN.fullmatch(line)
        if found is None:
            raise ValueError(
                f"{path}:{number}: expected 'package==version' or 'package==version; condition', got {line!r}."
            )
        package, version, condition = found.groups()
        pins.append(Pin(plain(package), version, condition or "", line.strip()))
    return pins


def pins_of(name: str, root: Path = ROOT) -> list[Pin]:
    """All that a set pins: its own, and those of constraints.txt for every other package."""
    file = root / PINS.name / f"{name}.txt"
    own = read_pins(file) if file.exists() else []
    replaced = {pin.package for pin in own}
    return [*(pin for pin in read_pins(root / "constraints.txt") if pin.package not in replaced), *own]


def differences(versions: dict[str, str], pins: Iterable[Sequence[str]]) -> Iterator[str]:
    """What an environment has in another version than is pinned.

    Args:
        versions: of the packages there; what a pin names and is not among them is not needed there.
        pins: package, version and whatever else, of the pins that hold there.
    """
    have = {plain(package): version for package, version in versions.items()}
    for package, version, *_ in pins:
        found = have.get(package, version)
        if found.partition("+")[0] != version:  # 2.6.0+cpu is a build of 2.6.0
            yield f"{package} is {found}, the set pins {version}"


def examine(python: Path, pins: Iterable[Pin]) -> tuple[dict[str, str], list[str]]:
    """The versions in an environment, and where they differ from the pins.

    Raises:
        FileNotFoundError: there is no such environment.
        subprocess.CalledProcessError: its Python does not run.
    """
    question = json.dumps([[pin.package, pin.version, pin.condition] for pin in pins])
    run = subprocess.run([python, "-c", ASK], input=question, capture_output=True, text=True, check=True)
    answer = json.loads(run.stdout)
    return answer["versions"], list(differences(answer["versions"], answer["pins"]))


# ------------------------------------------------------------------------------------------------------------ tests


def marked_files(tests: Path) -> list[str]:
    """The test files in which the mark occurs: others may need what an older set does not have to be imported at all."""
    return [str(path) for path in sorted(tests.glob("test_*.py")) if MARK in path.read_text(encoding="utf-8")]


def command(python: Path, report: Path, args: Sequence[str]) -> list[str]:
    """How pytest is called: with the marked files, unless some are named."""
    named = any(arg.partition("::")[0].endswith(".py") for arg in args)
    files = [] if named else marked_files(ROOT / "tests")
    options = ["-q", "-n", "2", "--dist", "worksteal", "-m", SELECTED, f"--junitxml={report}"]
    return [str(python), "-m", "pytest", *options, *args, *files]


def test_id(case: ElementTree.Element) -> str:
    """A test's name as pytest takes it on the command line; the report has dots between folders, file and class."""
    parts = case.get("classname", "").split(".")
    file = next((at for at, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1) + 1
    return "::".join(["/".join(parts[:file]) + ".py", *parts[file:], case.get("name", "")])


def read_report(path: Path) -> tuple[dict[str, int], list[str]]:
    """The number of tests with each outcome in a report of pytest's, and a line for each that failed."""
    counts: Counter[str] = Counter()
    lines = []
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        if wrong is None:
            counts["passed" if case.find("skipped") is None else "skipped"] += 1
            continue
        counts["failed" if wrong.tag == "failure" else "errors"] += 1
        message = (wrong.get("message") or "").strip().partition("\n")[0]
        lines.append(f"{test_id(case)}: {message[:200]}")
    return {kind: counts[kind] for kind in OUTCOMES}, sorted(lines)


def run_set(name: str, python: Path, args: Sequence[str]) -> Result:
    """Run the tests in a set's environment, and read what came of it."""
    result = Result(name)
    try:
        result.versions, result.problems = examine(python, pins_of(name))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        result.problems = [f"{python} cannot be asked for its packages: {getattr(error, 'stderr', None) or error}"]
    if result.problems:
        return result
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    code = subprocess.run(command(python, report, args), cwd=ROOT).returncode
    result.seconds = time.monotonic() - start
    if report.exists():
        result.counts, result.problems = read_report(report)
    if code and not result.problems:
        reason = "no test was selected" if code == 5 else f"pytest ended with {code}; its output above says why"
        result.problems.append(reason)
    return result


# ------------------------------------------------------------------------------------------------------------ table


def table(results: Iterable[Result]) -> str:
    """The results as a table in Markdown, aligned to be read as it is."""
    rows = [["set", "python", *SHOWN, *OUTCOMES, "seconds"], *(result.row() for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def write_results(results: Sequence[Result]) -> None:
    shown = [
        {**asdict(result), "versions": dict(sorted(result.versions.items())), "seconds": round(result.seconds, 1)}
        for result in results
    ]
    (RESULTS / "results.json").write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "table.md").write_text(table(results) + "\n", encoding="utf-8")


def run(sets: dict[str, Path], args: Sequence[str]) -> list[Result]:
    """Run each set in turn; what has been done is written down after each."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = []
    for number, (name, folder) in enumerate(sets.items(), start=1):
        print(f"\n{f' {name}, set {number} of {len(sets)}, in {folder} ':=^119}", flush=True)
        results.append(run_set(name, folder / "bin" / "python", args))
        write_results(results)
    return results


def main(argv: Sequence[str]) -> int:
    if len(argv) == 2 and argv[0] == "--constraints":
        print("\n".join(pin.line for pin in pins_of(argv[1])))
        return 0
    split = argv.index("--") if "--" in argv else len(argv)
    sets, args = [word.partition("=") for word in argv[:split]], argv[split + 1 :]
    if not sets or not all(name and folder for name, _, folder in sets):
        print(__doc__, file=sys.stderr)
        return 2
    results = run({name: Path(folder).absolute() for name, _, folder in sets}, args)
    print(f"\n{table(results)}")
    for result in results:
        print(
            *(f"{result.name}: {problem}" for problem in result.problems), sep="\n", end="\n" * bool(result.problems)
        )
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
