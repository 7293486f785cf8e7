"""Runs an example in its short form within the test's process, which has the heavy libraries imported already."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@dataclass(frozen=True)
class Outcome:
    """What an example left behind."""

    out: Path
    results: dict[str, Any]
    printed: str

    @property
    def files(self) -> set[str]:
        return {path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if path.is_file()}

    def is_picture(self, name: str) -> bool:
        return (self.out / name).read_bytes().startswith(b"\x89PNG")


def load_example(name: str, *packages: str) -> ModuleType:
    """The module `run.py` of an example; the test is skipped where a package that it needs is not installed."""
    for package in ("matplotlib", *packages):
        pytest.importorskip(package, reason=f"the example {name} needs {package}")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_example(module: ModuleType, folder: Path, *arguments: str) -> Outcome:
    """Run `main` of an example with `--quick`, quietly, and see to it that what it sets does not reach other tests."""
    out, printed = folder / "out", io.StringIO()
    given, state = sys.argv, torch.random.get_rng_state()
    sys.argv = ["run.py", "--quick", "--threads", "1", "--out", str(out), *arguments]
    try:
        with _verbosity_kept(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            module.main()
    finally:
        sys.argv = given
        torch.random.set_rng_state(state)
    assert [path.name for path in folder.iterdir()] == ["out"]
    return Outcome(out, json.loads((out / "results.json").read_text(encoding="utf-8")), printed.getvalue())


@contextlib.contextmanager
def _verbosity_kept() -> Iterator[None]:
    loggers = [sys.modules[name].utils.logging for name in ("transformers", "diffusers") if name in sys.modules]
    levels = [logger.get_verbosity() for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.set_verbosity(level)
            logger.enable_progress_bar()
