"""A solution's page in headless Chromium: what a person sees, sorts, filters and reads out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fastparquet
import pytest
from page_checks import CONTRAST, OUTSIDE, wait_for_chart
from playwright.sync_api import Page, expect
from runs_folder import EVIL
from scored_run import evaluation_row, put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.solve import rewrite_reports, solve_run

NUM_LAYERS = 6
NUM_GROUPS = 4 * NUM_LAYERS + 2
MODEL = "<img src=x onerror=\"document.title='hacked'\">"
FIRST = "model</script><!--<script>document.title='hacked'</script>.layers"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile names of model and modules, data that was left out, and a budget that is met."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    left_out = [{"shard": 3, "stage": "score", "reason": EVIL}]
    directory = put_scored_run(
        folder, num_layers=NUM_LAYERS, model=MODEL, first_layer=FIRST, quarantined=left_out
    )
    solve_run(directory, SolveOptions(bits=4.8), folder="")
    measured = evaluation_row(directory, dataset=f"{EVIL}</script><!--")
    directory.write_table("evaluation.parquet", [measured])
    rewrite_reports(directory)
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> str:
    return (run / "report.html").as_uri()


def table_of(page: Page) -> Any:
    return page.get_by_role("table", name="Groups, most sensitive first")


def shown_names(page: Page) -> list[str]:
    """Names of the groups that are shown, top to bottom."""
    heads = table_of(page).locator("tbody tr:visible > th")
    return [str(head.get_attribute("data-key")) for head in heads.all()]


def column_of(page: Page, name: str) -> int:
    heads = table_of(page).locator("thead th").all_inner_texts()
    return [head.strip() for head in heads].index(name)


def numbers_of(page: Page, column: int) -> dict[str, float]:
    """Group -> the number behind the cell of a column."""
    cells = (
        table_of(page)
        .locator("tbody")
        .evaluate(
            """(body, column) => [...body.rows].map(
            (row) => [row.cells[0].dataset.key, row.cells[column].dataset.number])""",
            column,
        )
    )
    return {name: float(number) for name, number in cells if number}


def test_page_opens_offline_without_a_request_or_complaint(open_page: Any, address: str) -> None:
    opened = open_page(offline=True)
    for title in ("Reasons for concern", "Loss against size", "All groups", "How to reproduce"):
        expect(opened.page.get_by_role("heading", name=title)).to_be_visible()
    expect(opened.page.get_by_role("img", name="Loss against size")).to_be_visible()
    wait_for_chart(opened.page)
    assert opened.complaints == []
    assert opened.requests == [address]


def test_numbers_are_those_of_the_files(open_page: Any, run: Path) -> None:
    page = open_page().page
    scores = fastparquet.ParquetFile(str(run / "sensitivity.parquet")).to_pandas()
    for name in ("wint4_afp16", "wint8_aint8"):
        expected = scores[scores["format"] == name].set_index("group")["score"].to_dict()
        assert numbers_of(page, column_of(page, name)) == expected
    manifest = fastparquet.ParquetFile(str(run / "manifest.parquet")).to_pandas()
    total = manifest.drop_duplicates("group")["score"].sum()
    shown = page.locator(".numbers > div", has_text="Predicted KL").locator(".value").inner_text()
    value, _, error = shown.partition(" ± ")
    assert float(value) == pytest.approx(total, rel=5e-4)
    assert 0 < float(error) < float(value)
    chosen = manifest.drop_duplicates("group").set_index("group")["format"].to_dict()
    rows = table_of(page).locator("tbody tr")
    marked = rows.evaluate_all("rows => rows.map(r => [r.cells[0].dataset.key, r.dataset.format])")
    assert dict(marked) == chosen


def test_hostile_names_are_text(open_page: Any) -> None:
    opened = open_page()
    expect(opened.page.get_by_role("heading", level=1)).to_contain_text(MODEL)
    expect(
        opened.page.get_by_text(f"Shard 3 was left out in the stage score: {EVIL}")
    ).to_be_visible()
    assert any(name.startswith(FIRST) for name in shown_names(opened.page))
    assert opened.page.evaluate("document.title") != "hacked"
    assert opened.page.locator("script").count() == 4
    assert opened.complaints == []


def test_columns_sort_by_keyboard(open_page: Any) -> None:
    page = open_page().page
    column = column_of(page, "Share of the loss")
    head = table_of(page).locator("thead th").nth(column)
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    numbers = list(numbers_of(page, column).values())
    assert len(numbers) == NUM_GROUPS - 1
    assert numbers == sorted(numbers)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert shown_names(page)[-1] == "visual.blocks.0.attn.qkv", "without a number: last"
    assert table_of(page).locator("[aria-sort]").count() == 1
    said = page.locator("#sorted").inner_text()
    assert said == "Groups: sorted by Share of the loss, descending"


def test_rows_are_filtered_and_counted(open_page: Any) -> None:
    opened = open_page()
    page = opened.page
    status = page.locator(".filters").get_by_role("status")
    expect(status).to_have_text(f"{NUM_GROUPS} of {NUM_GROUPS} groups shown")
    page.get_by_label("Names contain").fill("K_PROJ layers.2")
    expect(status).to_have_text(f"1 of {NUM_GROUPS} groups shown")
    assert shown_names(page) == [f"{FIRST}.2.self_attn.q_proj"], "found by the name of a layer"
    page.get_by_label("Names contain").fill("no such layer")
    expect(status).to_have_text(f"0 of {NUM_GROUPS} groups shown")
    page.get_by_role("button", name="Show all").click()
    expect(status).to_have_text(f"{NUM_GROUPS} of {NUM_GROUPS} groups shown")
    page.get_by_role("combobox", name="Chosen format").select_option("none")
    unsearched = shown_names(page)
    assert "visual.blocks.0.attn.qkv" in unsearched
    expect(status).to_have_text(f"{len(unsearched)} of {NUM_GROUPS} groups shown")
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Decision").select_option("certain")
    assert 0 < len(shown_names(page)) < NUM_GROUPS
    assert opened.complaints == []


def test_heat_map_has_words(open_page: Any) -> None:
    page = open_page().page
    layers = page.get_by_role("region", name=f"{FIRST}")
    expect(layers.get_by_role("row").nth(NUM_LAYERS)).to_be_visible()
    off = page.get_by_role("region", name="visual.blocks").locator("td.off")
    assert "not searched" in str(off.get_attribute("title"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme: str, open_page: Any) -> None:
    page = open_page(color_scheme=scheme).page
    ratios = page.evaluate(CONTRAST)
    assert {f"TD l{level}" for level in (0, 6)} <= set(ratios)
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    darkest = min(int(part) for part in re.findall(r"\d+", background))
    assert (darkest > 200) is (scheme == "light")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_nothing_sticks_out(width: int, open_page: Any) -> None:
    page = open_page(viewport={"width": width, "height": 844}).page
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []


def test_page_without_javascript_has_all_rows_and_no_dead_controls(open_page: Any) -> None:
    page = open_page(java_script_enabled=False).page
    assert len(shown_names(page)) == NUM_GROUPS
    expect(page.get_by_label("Names contain")).to_be_hidden()
    expect(page.locator("#frontier")).to_be_hidden()
    expect(page.get_by_text("The chart needs JavaScript")).to_be_visible()
    expect(page.get_by_text("This solution: 4.")).to_be_visible()
    assert page.locator("th button").count() == 0
    assert page.locator(".copy:visible").count() == 0
    page.get_by_label("by sensitivity").check()
    expect(page.get_by_role("list", name="Colours of sensitivities")).to_be_visible()


def test_first_screen_has_the_result_the_frontier_and_the_layers(open_page: Any) -> None:
    opened = open_page(viewport={"width": 1400, "height": 900})
    page = opened.page
    wait_for_chart(page)
    first_row = page.locator(".strip tr").first  # below long hostile names
    for place in (page.locator(".result"), page.locator("#frontier"), first_row):
        box = place.bounding_box()
        assert box is not None
        assert 0 <= box["y"] < box["y"] + box["height"] <= 900
    concerns = page.locator("#concerns").bounding_box()
    assert concerns is not None
    assert concerns["y"] > 850, "doubts are named in the head and listed below"
    page.get_by_role("link", name="for concern").click()
    expect(page.get_by_role("heading", name="Reasons for concern")).to_be_in_viewport()


def test_layers_are_coloured_by_format_and_then_by_sensitivity(open_page: Any, run: Path) -> None:
    page = open_page().page
    manifest = fastparquet.ParquetFile(str(run / "manifest.parquet")).to_pandas()
    formats = manifest.drop_duplicates("group").set_index("group")["format"].to_dict()
    cells = page.locator(".strip td[title], .outside li")
    colours = """cells => cells.map((cell) => {
        const { backgroundColor } = getComputedStyle(cell.querySelector("i") ?? cell);
        return [(cell.title || cell.textContent).split(": ")[0], backgroundColor];
    })"""
    shown = dict(cells.evaluate_all(colours))
    by_format: dict[str, set[str]] = {}
    for group, colour in shown.items():
        by_format.setdefault(formats[group], set()).add(colour)
    assert len(shown) == NUM_GROUPS - 1, "all searched groups"
    assert all(len(colours) == 1 for colours in by_format.values())
    assert len(set.union(*by_format.values())) == len(by_format) > 2
    page.get_by_label("by sensitivity").check()
    scores = fastparquet.ParquetFile(str(run / "sensitivity.parquet")).to_pandas()
    harshest = scores.groupby("group")["score"].max()
    again = dict(cells.evaluate_all(colours))
    assert again != shown
    lightness = {g: sum(map(int, re.findall(r"\d+", colour)[:3])) for g, colour in again.items()}
    assert lightness[harshest.idxmax()] == min(lightness.values())
    assert lightness[harshest.idxmin()] == max(lightness.values())


def test_scores_of_nine_formats_are_seen_without_scrolling(open_page: Any) -> None:
    page = open_page(viewport={"width": 1400, "height": 900}).page
    heads = table_of(page).locator("thead th")
    box = heads.nth(column_of(page, "wint8_aint8")).bounding_box()
    region = page.get_by_role("region", name="Groups, most sensitive first").bounding_box()
    assert box is not None
    assert region is not None
    assert box["x"] + box["width"] <= region["x"] + region["width"]


def test_shares_of_the_chosen_formats_are_seen_without_scrolling(open_page: Any) -> None:
    page = open_page(viewport={"width": 1400, "height": 900}).page
    region = page.get_by_role("region", name="Chosen formats").last
    expect(region.get_by_role("columnheader").last).to_have_text("Share of the predicted loss")
    assert region.evaluate("(e) => e.scrollWidth - e.clientWidth") == 0


def test_button_copies_its_command(open_page: Any) -> None:
    opened = open_page(permissions=["clipboard-read", "clipboard-write"])
    page = opened.page
    command = page.locator("section", has_text="How to reproduce").last.locator(".command").first
    expect(command.locator("pre")).to_contain_text("autoquant-ray scan")
    command.get_by_role("button", name="Copy").click()
    expect(command.get_by_role("button")).to_have_text("Copied")
    text = page.evaluate("() => navigator.clipboard.readText()")
    assert text == command.locator("pre").text_content()
    assert "hacked" in text, "the hostile name, as text"
    assert opened.complaints == []
