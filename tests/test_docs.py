"""The README and the documentation: their code runs, their links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

import build_docs
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "source"
PAGES = [ROOT / "README.md", *sorted(SOURCE.rglob("*.md"))]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"# not run: \S")


def blocks(text):
    """(options, first line number, code) of each fenced block of Python in a page."""
    for match in BLOCK.finditer(text):
        yield match.group(1).strip(), text.count("\n", 0, match.start(2)), match.group(2)


def runnable(page):
    """The code to run, each block on the lines where it stands in the page, so that a traceback points there."""
    for option, line, code in blocks(page.read_text(encoding="utf-8")):
        if not option:
            yield compile("\n" * line + code, str(page), "exec")
            continue
        where = f"{page.name}:{line}"
        assert option == "no-run", f"{where}: a block of Python has no option but 'no-run', found {option!r}"
        assert REASON.match(code), f"{where}: a block that is not run says why on its first line: '# not run: ...'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    code = list(runnable(page))
    if not code:
        pytest.skip("no code to run on this page")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in code:
            exec(block, names)


def test_links_and_table_of_contents():
    assert build_docs.problems(SOURCE) == []
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert list(build_docs.broken_links(ROOT / name)) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "_toctree.yml").write_text("- sections:\n  - local: a\n    title: A\n  - local: gone\n    title: B\n")
    (tmp_path / "a.md").write_text("# Top\n[x](a.md#top) [y](a.md#nowhere) [z](b.md) `[c](d.md)` [w](https://x.org)\n")
    (tmp_path / "forgotten.md").write_text("# F\n```\n[x](nothing.md)\n```\n")
    found = "\n".join(build_docs.problems(tmp_path))
    assert len(found.splitlines()) == 4
    for part in (
        "no page 'gone'",
        "forgotten.md: the table of contents",
        "no heading 'nowhere'",
        "'b.md' leads to no file",
    ):
        assert part in found


def test_the_pages_render(tmp_path):
    pytest.importorskip("markdown")
    count = build_docs.render(SOURCE, tmp_path / "html")
    assert count == len(list(SOURCE.rglob("*.md"))) == len(list((tmp_path / "html").rglob("*.html")))
    assert 'href="quickstart.html"' in (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
