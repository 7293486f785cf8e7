"""Render the documentation to HTML, and refuse to when a link or an entry of the table of contents leads nowhere.

Usage: build_docs.py [--check]. With --check nothing is written, and the package `markdown` is not needed.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "source"
OUTPUT = ROOT / "build" / "docs"

FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
EXTERNAL = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)

STYLE = """
body { margin: 0; display: flex; font: 16px/1.55 system-ui, sans-serif; color: #222; }
nav { flex: 0 0 15rem; height: 100vh; overflow-y: auto; position: sticky; top: 0; padding: 1rem; background: #f5f6f8; }
nav ul { list-style: none; padding-left: .8rem; margin: .2rem 0; }
nav .here { font-weight: 700; }
main { flex: 1; max-width: 52rem; min-width: 0; padding: 1rem 2.5rem 4rem; }
pre { background: #f5f6f8; padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; }
code { font: .9em ui-monospace, monospace; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #d5d8de; padding: .3rem .6rem; text-align: left; vertical-align: top; }
"""


@dataclass(frozen=True)
class Entry:
    """A line of the table of contents: a page, a heading over others, or both."""

    title: str
    local: str | None = None
    children: list[Entry] = field(default_factory=list)


def read_toc(path: Path) -> list[Entry]:
    """The table of contents: lists of `sections:`, each with pages (`local:`, `title:`) or further sections."""
    return [_entry(item) for item in yaml.safe_load(path.read_text(encoding="utf-8"))]


def _entry(item: dict[str, Any]) -> Entry:
    unknown = set(item) - {"title", "local", "sections", "isExpanded"}
    if unknown:
        raise ValueError(f"an entry of the table of contents has title, local and sections, found {sorted(unknown)}")
    return Entry(item.get("title", ""), item.get("local"), [_entry(child) for child in item.get("sections", [])])


def pages_in(entries: list[Entry]) -> Iterator[Entry]:
    """The entries that are pages, in the order of reading."""
    for entry in entries:
        if entry.local is not None:
            yield entry
        yield from pages_in(entry.children)


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading."""
    words = re.sub(r"[^\w\s-]", "", heading.lower()).split()
    return separator.join(words)


def anchors(text: str) -> set[str]:
    """The anchors of a page; a repeated heading gets a number, as the renderer does it."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        base = anchor = slug(heading)
        count = 0
        while anchor in found:
            count += 1
            anchor = f"{base}_{count}"
        found.add(anchor)
    return found


def links(text: str) -> Iterator[str]:
    """The targets of a page's links and pictures, those in code left out."""
    yield from LINK.findall(CODE_SPAN.sub("", FENCE.sub("", text)))


def broken_links(page: Path) -> Iterator[str]:
    """A line for each relative link of a Markdown file whose file or anchor does not exist."""
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        if EXTERNAL.match(link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target) if target else page
        if not file.exists():
            yield f"{page}: the link {link!r} leads to no file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{page}: {link!r}: that page has no heading {anchor!r}"


def problems(source: Path) -> list[str]:
    """What is wrong with the documentation under `source`."""
    listed = [entry.local for entry in pages_in(read_toc(source / "_toctree.yml"))]
    written = {path.relative_to(source).with_suffix("").as_posix(): path for path in source.rglob("*.md")}
    found = [f"{source / '_toctree.yml'}: there is no page {name!r}" for name in listed if name not in written]
    found += [
        f"{path}: the table of contents does not list it" for name, path in written.items() if name not in listed
    ]
    found += [f"{source / '_toctree.yml'}: {name!r} is listed twice" for name in set(listed) if listed.count(name) > 1]
    for path in sorted(written.values()):
        found += broken_links(path)
    return found


def render(source: Path, output: Path) -> int:
    """Write a page of HTML for each page of Markdown, other files beside them as they are; returns how many pages."""
    import markdown

    toc = read_toc(source / "_toctree.yml")
    shutil.rmtree(output, ignore_errors=True)
    for path in source.rglob("*"):
        if path.is_file() and path.suffix not in (".md", ".yml"):
            target = output / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    pages = list(pages_in(toc))
    for entry in pages:
        text = (source / f"{entry.local}.md").read_text(encoding="utf-8")
        body = markdown.markdown(
            text,
            extensions=["fenced_code", "tables", "toc", "sane_lists"],
            extension_configs={"toc": {"slugify": slug}},
        )
        target = output / f"{entry.local}.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_page(entry, toc, _to_html_links(body)), encoding="utf-8")
    return len(pages)


def _to_html_links(body: str) -> str:
    return re.sub(r'href="(?![a-z]+:)([^"#]+)\.md(#[^"]*)?"', r'href="\1.html\2"', body)


def _page(entry: Entry, toc: list[Entry], body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(entry.title)} - PEFT</title><style>{STYLE}</style></head>\n"
        f"<body><nav>{_menu(toc, entry)}</nav>\n<main>{body}</main></body></html>\n"
    )


def _menu(entries: list[Entry], here: Entry) -> str:
    return f"<ul>{''.join(f'<li>{_menu_entry(entry, here)}</li>' for entry in entries)}</ul>"


def _menu_entry(entry: Entry, here: Entry) -> str:
    title = html.escape(entry.title)
    below = _menu(entry.children, here) if entry.children else ""
    if entry.local is None:
        return title + below
    path = os.path.relpath(f"{entry.local}.html", os.path.dirname(here.local))
    chosen = ' class="here"' if entry is here else ""
    return f'<a{chosen} href="{path}">{title}</a>{below}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="look for broken links and entries only")
    arguments = parser.parse_args()
    found = problems(SOURCE)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        found += broken_links(ROOT / name)
    if found:
        print("\n".join(found))
        return 1
    if arguments.check:
        print("docs: no broken link")
        return 0
    print(f"{render(SOURCE, OUTPUT)} pages in {OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
