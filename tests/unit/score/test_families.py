"""Every model family against its row of docs/model-families.md."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import every_family
import pytest
from families import FAMILIES
from family_checks import PAGE, family_row, update

PINNED = (Path(__file__).parents[3] / "constraints.txt").read_text("utf-8").splitlines()
IS_PINNED = all(
    f"{name}=={version(name)}" in PINNED for name in ("nvidia-modelopt", "transformers")
)
"""The page is written with these; other releases may do more, not less."""


ODD = (
    "aria_text",  # experts that ModelOpt's exporter has no preparation for
    "bloom",  # an attention that ModelOpt cannot prepare
    "blip-2",  # its own forward does not run on text alone
    "minimax_m3_vl",  # files hold parts of a linear that transformers joins
    "modernbert-decoder",  # its head is named decoder
    "qwen2_5_omni_thinker",  # its own forward embeds what it is given
    "whisper",  # ModelOpt's exporter would run it on sound
    "zaya",  # a linear runs on a constant too
)
"""Families of the table of all in which a step once stopped."""


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


@pytest.mark.parametrize("name", ODD)
def test_odd_family_gives_its_row_of_the_table_of_all(name: str, page: str) -> None:
    row = every_family.family_row(name)
    if IS_PINNED:
        assert row in page.splitlines(), f"run: python docs/update_families.py --all --only {name}"
    assert " no: " not in row.replace("no: `format` modelopt cannot hold experts", "")


@pytest.mark.skipif(not IS_PINNED, reason="ModelOpt 0.48 takes the experts of DBRX as they are")
def test_family_whose_experts_modelopt_divides_is_refused_by_export() -> None:
    cells = every_family.family_row("dbrx").split(" | ")
    assert cells[1:4] == ["yes", "yes", "yes"]
    assert cells[5].startswith("no: `format` modelopt cannot hold this model: ModelOpt makes ")
    assert ".w1_linear.0.weight of its weights, which is in no file of it" in cells[5]


def test_every_no_of_the_page_has_a_reason(page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    cut = [row for row in rows if re.search(r"no: [^|]*\b(model|files|solution|out) \|", row)]
    assert not cut, "an error without what follows its colon"
    raw = [row for row in rows if re.search(r"ModelOpt stops: \w+Error", row)]
    assert not raw, "an error in place of a reason"


def verdicts(row: str) -> list[str]:
    """The first word of what a row says of each step: yes, or no and other words."""
    return [re.split("[:;,]", cell)[0] for cell in row.split(" | ")[1:6]]


def test_page_lists_every_family_once(page: str) -> None:
    table = page.partition("<!-- end of families -->")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in FAMILIES]
    assert update(page, rows) == page


def test_page_lists_every_family_of_transformers_and_counts_them(page: str) -> None:
    table = page.partition(every_family.START)[2].partition(every_family.END)[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    if IS_PINNED:
        assert [row.split("`")[1] for row in rows] == every_family.all_families()
    assert table.startswith(f"{every_family.summary(rows)}\n")
    assert f"all {len(rows)} families" in (PAGE.parent / "status.md").read_text("utf-8")
