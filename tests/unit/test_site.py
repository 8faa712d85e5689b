"""The site of README and docs: its navigation, its diagram, and what is built."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from build_site import DIAGRAM, MERMAID, ROOT, build, commands_of, pages

_TARGETS = {"a": "href", "img": "src", "script": "src", "link": "href", "source": "srcset"}


class Places(HTMLParser):
    """Anchors of a page, and what it links to or loads, as (tag, target)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values[name] or "" for name in ("id", "name") if name in values}
        target = values.get(_TARGETS.get(tag, ""))
        if target is not None:
            self.targets.append((tag, target))


def test_every_page_is_in_the_navigation_once() -> None:
    written = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    written |= {"README.md", "CONTRIBUTING.md", "cluster/README.md", "benchmarks/PROFILE.md"}
    assert sorted(pages()) == sorted(written)


def test_diagram_is_drawn_from_the_readme() -> None:
    source = MERMAID.findall((ROOT / "README.md").read_text("utf-8"))
    drawn_from = DIAGRAM.read_text("utf-8").splitlines()[0]
    assert [f"<!-- {json.dumps(text).replace('--', '- -')} -->" for text in source] == [drawn_from]
    others = [page for page in pages() if page != "README.md"]
    assert not [page for page in others if MERMAID.search((ROOT / page).read_text("utf-8"))]


def test_commands_go_on_within_quotes_and_after_backslashes() -> None:
    block = """\
$ MODEL=$(python -c 'print("a
$ b")') && scan $MODEL \\
    --bits 6  # it's short
effective bits: 5.9
$ ls
runs"""
    lines = block.splitlines()
    assert commands_of(block).splitlines() == [lines[0][2:], *lines[1:3], lines[4][2:]]
    assert commands_of("effective bits: 5.9") == ""


def test_site_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="extra docs")
    site = tmp_path / "site"
    build(site)
    built = {file: Places(file.read_text("utf-8")) for file in site.rglob("*.html")}
    assert len(built) >= len(pages())
    wrong = []
    for file, places in built.items():
        for tag, target in places.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                wrong += [f"{file.name} loads {target}"] * (tag != "a")
                continue
            there = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            is_there = there.is_file() or (there / "index.html").is_file()
            anchors = built[there].anchors if there in built else {parts.fragment}
            if file.name != "404.html" and not (
                is_there and (not parts.fragment or unquote(parts.fragment) in anchors)
            ):
                wrong.append(f"{file.name} links to {target}")
    styles = [file.read_text("utf-8") for file in site.rglob("*.css")]
    wrong += re.findall(r"url\((?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", "".join(styles))
    assert not wrong, "\n".join(wrong)
