"""Every model family against its row of docs/model-families.md."""

from __future__ import annotations

import pytest
from families import FAMILIES
from family_checks import PAGE, family_row, update


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_family_gives_its_row_of_the_page(name: str, page: str) -> None:
    assert family_row(name) in page.splitlines(), "run: python docs/update_families.py"


def test_page_lists_every_family_once(page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in FAMILIES]
    assert update(page, rows) == page
