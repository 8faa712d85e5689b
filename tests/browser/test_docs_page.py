"""The site of the docs in headless Chromium: what its buttons copy, and how wide its pages are."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from build_site import ROOT, build
from playwright.sync_api import expect


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="extra docs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    build(folder)
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> str:
    return (site / "docs" / "tutorial.html").as_uri()


def console_blocks(page: str) -> list[str]:
    """Blocks of a console in the Markdown of a page."""
    text = (ROOT / page).read_text("utf-8")
    return [part.split("\n```")[0] for part in text.split("```console\n")[1:]]


def test_button_copies_commands_without_prompts_and_output(open_page: Any) -> None:
    opened = open_page(permissions=["clipboard-read", "clipboard-write"])
    page = opened.page
    shown = page.locator("pre:has(.gp)")
    blocks = console_blocks("docs/tutorial.md")
    assert shown.count() == len(blocks) > 4
    printed = 0
    for block, code in zip(blocks, shown.all(), strict=True):
        code.hover()
        page.evaluate("() => navigator.clipboard.writeText('')")
        code.locator("button").first.click()
        page.wait_for_function("async () => await navigator.clipboard.readText() !== ''")
        copied = page.evaluate("() => navigator.clipboard.readText()").splitlines()
        lines = block.splitlines()
        assert copied[0] == lines[0].removeprefix("$ ")
        assert set(copied) <= set(lines) | {line.removeprefix("$ ") for line in lines}
        assert not [line for line in copied if line.startswith("$ ")]
        parsed = subprocess.run(["bash", "-n"], input="\n".join(copied), text=True, check=False)
        assert parsed.returncode == 0, copied
        commands = [line for line in lines if line.startswith("$ ")]
        assert [line for line in commands if line.removeprefix("$ ") not in copied] == []
        printed += len(lines) - len(copied)
    assert printed > 10, "lines that commands print"


def test_code_and_tables_take_the_width_that_there_is(open_page: Any, site: Path) -> None:
    page = open_page(viewport={"width": 1400, "height": 900}).page
    box = page.locator("pre > code").first.bounding_box()
    assert box is not None
    assert box["width"] > 840
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 1400
    page.goto((site / "docs" / "run-columns.html").as_uri())
    wide = page.locator(".md-typeset__scrollwrap").first
    expect(wide).to_be_visible()
    assert wide.evaluate("(e) => e.clientWidth") > 840


@pytest.mark.parametrize("width", [390, 1000])
def test_no_page_is_wider_than_the_window(width: int, open_page: Any) -> None:
    page = open_page(viewport={"width": width, "height": 844}).page
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
