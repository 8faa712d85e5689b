"""The pages of the reference are those that the code gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from columns import FILES, MEANINGS
from reference import PAGES

from autoquant_ray.runs.schemas import SCHEMAS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_page_is_that_of_the_code(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == PAGES[name](), "run: python docs/update.py"


def test_columns_that_are_described_are_those_of_the_files() -> None:
    assert set(FILES) == set(SCHEMAS)
    columns = {name for schema in SCHEMAS.values() for name in schema.names}
    in_files = {f"{file}: {name}" for file, schema in SCHEMAS.items() for name in schema.names}
    described = set(MEANINGS)
    assert described - in_files <= columns
    assert columns <= described | {key.partition(": ")[2] for key in described}


def test_reference_has_every_command_and_option() -> None:
    page = (DOCS / "options.md").read_text("utf-8")
    for text in ("## scan\n", "## jobs logs\n", "| `--hold-out TEXT` |", "**Budget**"):
        assert text in page
