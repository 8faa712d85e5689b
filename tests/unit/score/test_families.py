"""Every model family against its row of docs/model-families.md."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from families import FAMILIES
from family_checks import PAGE, family_row, update

PINNED = (Path(__file__).parents[3] / "constraints.txt").read_text("utf-8").splitlines()
IS_PINNED = all(
    f"{name}=={version(name)}" in PINNED for name in ("nvidia-modelopt", "transformers")
)
"""The page is written with these; other releases may do more, not less."""


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_family_gives_its_row_of_the_page(name: str, page: str) -> None:
    row = family_row(name)
    if IS_PINNED:
        assert row in page.splitlines(), "run: python docs/update_families.py"
    else:
        (expected,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
        worse = [
            (now, before)
            for now, before in zip(verdicts(row), verdicts(expected), strict=True)
            if now != before and now != "yes"
        ]
        assert not worse, row


def verdicts(row: str) -> list[str]:
    """The first word of what a row says of each step: yes, or no and other words."""
    return [re.split("[:;,]", cell)[0] for cell in row.split(" | ")[1:6]]


def test_page_lists_every_family_once(page: str) -> None:
    table = page.partition("<!-- end of families -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in FAMILIES]
    assert update(page, rows) == page
