"""The errors and warnings of LoRA and its relatives, found in the code, as a page of the documentation.

python scripts/messages.py            run the tests under coverage and write the page: each message with a test that
                                      raises it; fails if some message has none
python scripts/messages.py --check    whether the page lists what the code says (quick; runs no test)
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "peft"
PAGE = ROOT / "docs" / "source" / "developer_guides" / "messages.md"
PARTS = {
    "LoRA": ("tuners/lora",),
    "AdaLoRA": ("tuners/adalora",),
    "X-LoRA": ("tuners/xlora",),
    "Poly": ("tuners/poly",),
    "Mixed models": ("tuners/mixed", "mixed_model.py"),
    "Hotswapping": ("utils/hotswap.py",),
    "Optimisers": ("optimizers",),
    "Helpers and merging": ("helpers.py", "utils/merge_utils.py", "utils/loftq_utils.py", "utils/incremental_pca.py"),
}
TESTS = (
    "weight_conversion lora xlora poly mixed optimizers hotswap helpers merge_utils loftq matrix incremental_pca stand_ins"
).split()
INTRODUCTION = """# Errors and warnings of LoRA and its relatives

What each says, which class it has, and a test that raises it. In the messages, what stands in braces is filled in: the
module, the adapter, what was expected and what was found. The page is written by `scripts/messages.py`.
"""


@dataclass(frozen=True)
class Message:
    """One `raise` or `warnings.warn` of the code."""

    part: str
    file: Path
    lines: tuple[int, ...]
    function: str
    category: str
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.function, self.category, self.text


def template(node: ast.expr) -> str:
    """A message as it stands in the code, with what is filled in as {expression}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{" + ast.unparse(node) + "}"


class Collector(ast.NodeVisitor):
    """Goes through a file and notes what it raises and warns of."""

    def __init__(self, part: str, file: Path) -> None:
        self.part, self.file = part, file
        self.names: list[str] = []
        self.found: list[Message] = []

    def _inside(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _inside

    def _note(self, node: ast.stmt | ast.expr, category: str, text: ast.expr) -> None:
        relative = self.file.relative_to(SOURCE).with_suffix("")
        function = ".".join([*relative.parts, *self.names])
        lines = tuple(range(node.lineno, node.end_lineno + 1))
        self.found.append(Message(self.part, self.file, lines, function, category, template(text)))

    def visit_Raise(self, node: ast.Raise) -> None:
        call = node.exc
        if isinstance(call, ast.Call) and call.args:
            category = ast.unparse(call.func).rsplit(".", 1)[-1]
            if category[:1].isupper():  # not a function that makes an error, whose words stand elsewhere
                self._note(node, category, call.args[0])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) == "warnings.warn":
            category = node.args[1] if len(node.args) > 1 else None
            for keyword in node.keywords:
                category = keyword.value if keyword.arg == "category" else category
            self._note(node, ast.unparse(category) if category else "UserWarning", node.args[0])
        self.generic_visit(node)


def messages() -> list[Message]:
    """All messages, part by part, in the order of the files."""
    found = []
    for part, places in PARTS.items():
        for place in places:
            path = SOURCE / place
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []:
                collector = Collector(part, file)
                collector.visit(ast.parse(file.read_text()))
                found += collector.found
    return found


def contexts() -> dict[str, dict[int, list[str]]]:
    """For each file, by line: the tests that ran it."""
    files = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if any(word in f.name for word in TESTS)]
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "coveragerc")
        settings.write_text(f"[run]\ndynamic_context = test_function\nsource = {SOURCE}\ndata_file = {folder}/data\n")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "coverage"]
        tests = ["-m", "pytest", "-q", "-p", "no:xdist", "-m", "not gpu", *files]
        subprocess.check_call([*command, "run", f"--rcfile={settings}", *tests], cwd=ROOT, env=environment)
        report = Path(folder, "report.json")
        export = ["json", f"--rcfile={settings}", "--show-contexts", "-q", "-o", str(report)]
        subprocess.check_call([*command, *export], cwd=ROOT, env=environment)
        measured = json.loads(report.read_text())["files"]
    return {
        str((ROOT / name).resolve()): {int(line): tests for line, tests in file["contexts"].items()}
        for name, file in measured.items()
    }


def raised_by(message: Message, ran: dict[str, dict[int, list[str]]]) -> str | None:
    """The test that is about the message's file if there is one, else any that raises it; None if none does."""
    tests = {test for line in message.lines[:1] for test in ran.get(str(message.file), {}).get(line, ()) if test}
    return min(tests, key=lambda test: (message.file.stem not in test, test), default=None)


def page(found: list[Message], tests: dict[tuple[str, str, str], str]) -> str:
    lines = [INTRODUCTION]
    for part in PARTS:
        rows = [message for message in found if message.part == part]
        if rows:
            lines += [f"## {part}", "", "| in | class | message | test |", "|---|---|---|---|"]
            for row in rows:
                text = html.escape(" ".join(row.text.split()), quote=False).replace("|", "\\|")
                lines.append(f"| `{row.function}` | `{row.category}` | {text} | `{tests.get(row.key, '')}` |")
            lines.append("")
    return "\n".join(lines)


def rows(text: str) -> Iterator[tuple[str, ...]]:
    """Function, class, message and test of each row of the page."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield tuple(cell.strip().strip("`") for cell in line.strip("|").replace("\\|", "\0").split(" | "))


def check() -> list[str]:
    """What is wrong with the page."""
    found = messages()
    if not PAGE.exists():
        return [f"{PAGE.relative_to(ROOT)} is missing; run scripts/messages.py."]
    written = [row[:3] for row in rows(PAGE.read_text())]
    expected = [row[:3] for row in rows(page(found, {}))]
    wrong = [f"not on the page: {row}" for row in expected if row not in written]
    wrong += [f"no longer in the code: {row}" for row in written if row not in expected]
    wrong += [f"raised by no test: {row[:3]}" for row in rows(PAGE.read_text()) if len(row) < 4 or not row[3]]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        found, ran = messages(), contexts()
        tests = {message.key: raised_by(message, ran) or "" for message in found}
        PAGE.write_text(page(found, tests))
    wrong = check()
    print("\n".join(wrong) or f"{len(messages())} messages, each on the page and raised by a test")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
