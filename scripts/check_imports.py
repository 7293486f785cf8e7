"""Check that imports inside the library go downwards only.

A module's layer follows from where it stands (`LAYERS`), or from a comment in its first lines when it stands where
clients expect it rather than where it belongs:

    # layer: top

A module may import from its own layer and from those below. What only type checkers see does not count. An import
upwards within a function is allowed where its line says why:

    from ..peft_model import PeftModel  # lazy: only when a model is asked for

Usage: check_imports.py [SRC], by default the `src` beside this folder. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "peft"
LAYERS = ("utils", "config", "engine", "tuners", "top")
"""From the ground up. All that is not listed below stands at the top."""

HOMES = {
    "utils": ("peft.utils", "peft.import_utils"),
    "config": ("peft.config",),
    "engine": ("peft.engine",),
    "tuners": ("peft.tuners",),
}
DECLARED = re.compile(r"^# layer: *(\w+)", re.MULTILINE)
LAZY = re.compile(r"# lazy: *\S")


@dataclass(frozen=True)
class Module:
    """A source file of the library."""

    name: str
    path: Path
    layer: str

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Import:
    """One imported module."""

    target: str
    line: int
    nested: bool
    lazy: bool


def layer_of(name: str, source: str) -> str:
    """The layer that a module declares, or the one of the place where it stands."""
    declared = DECLARED.search("\n".join(source.splitlines()[:20]))
    if declared:
        return declared.group(1)
    for layer, homes in HOMES.items():
        if any(name == home or name.startswith(f"{home}.") for home in homes):
            return layer
    return "top"


def find_modules(root: Path) -> dict[str, Module]:
    """All modules of the library under `root`, by dotted name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, layer_of(name, path.read_text(encoding="utf-8")))
    return found


def imports_of(module: Module, modules: dict[str, Module]) -> Iterator[Import]:
    """What a module imports of the library at run time, within functions too."""
    source = module.path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node, nested in _import_nodes(ast.parse(source), nested=False):
        lazy = any(LAZY.search(line) for line in lines[node.lineno - 1 : node.end_lineno])
        for target in _targets(node, module, modules):
            yield Import(target, node.lineno, nested, lazy)


def _import_nodes(node: ast.AST, nested: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, nested
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for branch in child.orelse:
                yield from _import_nodes(ast.Module([branch], []), nested)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _import_nodes(child, nested or inside)


def _targets(node: ast.Import | ast.ImportFrom, module: Module, modules: dict[str, Module]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        base = _absolute(node, module)
        # `from package import name` means the module of that name where there is one.
        names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
    yield from sorted({name for name in names if name == PACKAGE or name.startswith(f"{PACKAGE}.")})


def _absolute(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parents = module.package.split(".")
    base = ".".join(parents[: len(parents) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base


def problems(root: Path) -> list[str]:
    """A line for each import that should not be, and each declaration of a layer that does not exist."""
    modules = find_modules(root)
    wrong = [
        f"{module.path}: there is no layer {module.layer!r}, there are {', '.join(LAYERS)}"
        for module in modules.values()
        if module.layer not in LAYERS
    ]
    return wrong or [line for module in modules.values() for line in _problems_of(module, modules)]


def _problems_of(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    for found in imports_of(module, modules):
        where = f"{module.path}:{found.line}"
        if found.target not in modules:
            yield f"{where}: imports {found.target}, which does not exist"
            continue
        above = modules[found.target].layer
        if LAYERS.index(above) <= LAYERS.index(module.layer) or (found.lazy and found.nested):
            continue
        excuse = "; a reason after '# lazy:' counts within functions only" if found.lazy else ""
        yield f"{where}: {module.layer} must not import {found.target}, which is above it ({above}){excuse}"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "src"
    found = problems(root)
    print("\n".join(found) if found else "imports: all go downwards")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
