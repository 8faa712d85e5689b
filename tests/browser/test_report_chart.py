"""The chart of a solution's page in headless Chromium: drawn from the files, in any size."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import fastparquet
import pytest
from page_checks import CHART_TEXT, SPOT, SQUARES, TEXTS, wait_for_chart
from playwright.sync_api import Page, expect
from runs_folder import EVIL
from scored_run import evaluation_row, put_scored_run

from autoquant_ray.allocate.frontier import frontier_of
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.solve import rewrite_reports, solve_run

DATA = f"{EVIL}</script><!--<script>document.title='hacked'</script>\u2028 $$x$$ @name"
LEGEND = [
    "best allocation of its size",
    "knee: diminishing returns beyond",
    "this solution",
    "one format everywhere",
    "measured",
]
SOFT = {"light": "rgb(85, 97, 111)", "dark": "rgb(163, 176, 191)"}
INK = {"light": "rgb(22, 32, 44)", "dark": "rgb(230, 235, 241)"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan measured on data with a hostile name, beside the exact frontier."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    directory = put_scored_run(folder, num_layers=3)
    solve_run(directory, SolveOptions(bits=5), folder="")
    frontier_of(directory)
    solution = evaluation_row(directory, dataset=DATA)
    rival = solution | {
        "name": "uniform",
        "allocation": "u",
        "effective_bits": 4.2,
        "kl_stderr": 9.0,
    }
    directory.write_table("evaluation.parquet", [solution, rival])
    rewrite_reports(directory)
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> str:
    return (run / "report.html").as_uri()


def drawn(page: Page) -> dict[str, list[Any]]:
    """The columns of the chart's data source."""
    wait_for_chart(page)
    return page.evaluate("() => Bokeh.documents[0].get_model_by_name('points').data")


def rows_of(points: dict[str, list[Any]], kind: str, *columns: str) -> list[tuple[Any, ...]]:
    indices = [i for i, name in enumerate(points["kind"]) if name == kind]
    return [tuple(points[column][i] for column in columns) for i in indices]


def is_shown(page: Page, name: str) -> bool:
    shown = page.evaluate("(name) => Bokeh.documents[0].get_model_by_name(name).visible", name)
    return bool(shown)


def test_chart_shows_the_numbers_of_the_files(open_page: Any, run: Path) -> None:
    opened = open_page(offline=True)
    points = drawn(opened.page)
    manifest = fastparquet.ParquetFile(str(run / "manifest.parquet")).to_pandas()
    ((plan_bits, loss, low, high),) = rows_of(points, "solution", "bits", "loss", "low", "high")
    assert loss == pytest.approx(manifest.drop_duplicates("group")["score"].sum())
    assert low < loss < high
    curve = fastparquet.ParquetFile(str(run / "frontier.parquet")).to_pandas()
    curve = curve[curve["predicted_kl"] > curve["predicted_kl"].max() * 1e-5]
    curve_points = rows_of(points, "curve", "bits", "loss") + rows_of(
        points, "knee", "bits", "loss"
    )
    of_file = list(zip(curve["effective_bits"], curve["predicted_kl"], strict=True))
    rest = [point for point in curve_points if point not in of_file]
    assert len(curve_points) == len(of_file) + len(rest)
    ((size, least),) = rest  # the best of the plan's own size
    assert (size, least) == (pytest.approx(plan_bits), pytest.approx(loss))
    evaluation = fastparquet.ParquetFile(str(run / "evaluation.parquet")).to_pandas()
    expected = evaluation.set_index("effective_bits")[["kl_mean", "kl_stderr"]]
    measured = rows_of(points, "measured", "bits", "loss", "high")
    assert len(measured) == len(expected) == 2
    for bits, loss, high in measured:
        assert loss == expected.loc[bits, "kl_mean"]
        assert high == pytest.approx(loss + expected.loc[bits, "kl_stderr"])
    assert opened.complaints == []


def test_points_are_the_rows_of_the_table(open_page: Any) -> None:
    page = open_page().page
    points = drawn(page)
    chart = page.get_by_role("img", name="Loss against size")
    assert chart.get_attribute("aria-describedby") == "frontier-summary"
    expect(page.locator("#frontier-summary")).to_contain_text("This solution: 4.9")
    page.get_by_text("Numbers of this chart").click()
    table = page.get_by_role("table", name="Points of the chart")
    expect(table.get_by_role("row", name="this solution")).to_be_visible()
    rows = table.locator("tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    columns = (points[name] for name in ("name", "bits_text", "size_text", "loss_text"))
    shown = sorted(zip(*columns, strict=True))
    left_out = [row for row in rows if tuple(row) not in shown]
    assert sorted(tuple(row) for row in rows if row not in left_out) == shown
    most = max(points["loss"])
    assert all(float(row[3]) < 1e-5 * most for row in left_out)


def test_pointing_at_the_allocation_tells_its_numbers(open_page: Any) -> None:
    opened = open_page()
    page = opened.page
    points = drawn(page)
    page.locator("#frontier").scroll_into_view_if_needed()
    for kind in ("solution", "measured"):
        page.mouse.move(*page.evaluate(SPOT, kind))
        tooltip = page.locator(".bk-Tooltip")
        expect(tooltip).to_be_visible()
        expect(tooltip).to_have_count(1)
        row = rows_of(points, kind, "name", "loss_text", "bits_text", "size_text")[0]
        for text in row[1:]:
            expect(tooltip).to_contain_text(text)
    expect(tooltip).to_contain_text(EVIL)
    assert page.title() != "hacked"
    assert page.locator("script").count() == 4
    assert opened.complaints == []


def test_legend_names_every_kind_and_hides_it(open_page: Any) -> None:
    page = open_page().page
    wait_for_chart(page)
    expect(page.locator("#frontier-missing")).to_be_hidden()
    assert page.locator("#frontier .bk-label").all_inner_texts() == LEGEND
    for name in ("measured", "measured errors", "uniform", "solution"):
        assert is_shown(page, name)
    entries = page.locator("#frontier .bk-item")
    entries.filter(has_text="measured").click()
    assert not is_shown(page, "measured")
    assert not is_shown(page, "measured errors")
    assert is_shown(page, "solution")
    key, names = page.locator("#frontier-squares"), "() => Bokeh.documents[0].get_model_by_name"
    names += "('names').source.data.text"
    expect(key).to_contain_text("1\N{NO-BREAK SPACE}wint4_afp16")
    assert {"this solution", "1", "2"} < set(page.evaluate(names))
    entries.filter(has_text="one format everywhere").click()
    expect(key).to_be_hidden()
    assert set(page.evaluate(names)) == {"this solution", "knee"}
    page.locator("#frontier").scroll_into_view_if_needed()
    page.mouse.move(*page.evaluate(SPOT, "measured"))
    expect(page.locator(".bk-Tooltip", has_text="measured")).to_have_count(0)


IS_STILL = """() => {
    const frames = globalThis.scrolledTo ??= [];
    frames.push(scrollY);
    return frames.length > 10 && new Set(frames.slice(-10)).size === 1;
}"""
"""Whether the page has not scrolled in ten frames, as it is asked in each."""


def test_wheel_scrolls_the_page_and_a_drag_zooms(open_page: Any) -> None:
    page = open_page().page
    wait_for_chart(page)
    page.locator("#frontier").scroll_into_view_if_needed()
    range_of = "() => { const r = Bokeh.documents[0].roots()[0].x_range; return r.end - r.start; }"
    before, scrolled = page.evaluate(range_of), page.evaluate("() => scrollY")
    x, y = page.evaluate(SPOT, "knee")
    page.mouse.move(x, y)
    page.mouse.wheel(0, 60)
    page.wait_for_function("(before) => scrollY > before", arg=scrolled)
    page.wait_for_function(IS_STILL)  # a chart that still moves would not be hit
    assert page.evaluate(range_of) == before
    x, y = page.evaluate(SPOT, "knee")
    page.mouse.move(x - 60, y - 40)
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=4)
    page.mouse.up()
    page.wait_for_function(f"(before) => ({range_of})() < before / 2", arg=before)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_those_of_the_page(scheme: str, open_page: Any) -> None:
    page = open_page(color_scheme=scheme).page
    wait_for_chart(page)
    name = page.locator(CHART_TEXT, has_text="this solution")
    axis = page.locator(CHART_TEXT, has_text="stored bits per searched weight")
    expect(name).to_have_css("fill", INK[scheme])
    expect(axis).to_have_css("fill", SOFT[scheme])
    other = {"light": "dark", "dark": "light"}[scheme]
    page.emulate_media(color_scheme=other)
    expect(name).to_have_css("fill", INK[other])
    expect(axis).to_have_css("fill", SOFT[other])
    expect(page.locator("#frontier .bk-label").first).to_have_css("color", SOFT[other])


@pytest.mark.parametrize("width", [320, 350, 680, 1100])
def test_texts_fit_and_do_not_overlap(width: int, open_page: Any) -> None:
    page = open_page(viewport={"width": width, "height": 900}).page
    wait_for_chart(page)
    place = page.locator("#frontier")
    frame = place.bounding_box()
    assert frame is not None
    texts = place.evaluate(TEXTS)
    assert {"this solution", *LEGEND} <= {entry["text"] for entry in texts}
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    for entry in texts:
        left, top, right, bottom = entry["box"]
        assert bottom - top >= 11, f"{entry['text']} is too small to read"
        assert left >= frame["x"] - 1, entry
        assert right <= frame["x"] + frame["width"] + 1, entry
        assert frame["y"] - 1 <= top < bottom <= frame["y"] + frame["height"] + 1, entry
    for first, second in itertools.combinations(texts, 2):
        a, b = first["box"], second["box"]
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
        assert apart, (first, second)


@pytest.mark.parametrize("width", [320, 390, 1400])
def test_squares_are_named_beside_them_or_by_number_below(width: int, open_page: Any) -> None:
    page = open_page(viewport={"width": width, "height": 900}).page
    wait_for_chart(page)
    page.locator("#frontier").scroll_into_view_if_needed()
    chart = page.evaluate(SQUARES)
    left, right, top, bottom = chart["frame"]
    squares = sorted(chart["squares"], key=lambda square: (square["place"][0], -square["place"][1]))
    for square in squares:
        x, y = square["place"]
        assert left + 6 < x < right - 6, square
        assert top + 6 < y < bottom - 6, square
    names = [square["name"] for square in squares]
    key, texts = page.locator("#frontier-squares"), [f"all {name}" for name in names]
    if key.is_visible():
        texts = [f"{number}" for number in range(1, len(names) + 1)]
        pairs = zip(texts, names, strict=True)
        listed = ", ".join("\N{NO-BREAK SPACE}".join(pair) for pair in pairs)
        assert key.inner_text() == f"One format everywhere, left to right: {listed}."
    named = 0
    for entry in page.locator("#frontier").evaluate(TEXTS):
        a, c, b, d = entry["box"]
        if entry["text"] in texts and left <= a < b <= right and top <= c < d <= bottom:
            x, y = squares[texts.index(entry["text"])]["place"]
            assert math.hypot(max(a - x, x - b, 0), max(c - y, y - d, 0)) < 13, entry
            named += 1
    assert named == len(squares) or key.is_visible()
    assert named > 0


def test_chart_fits_on_white_paper(open_page: Any) -> None:
    page = open_page(color_scheme="dark", viewport={"width": 1600, "height": 900}).page
    wait_for_chart(page)
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    chart = page.locator("#frontier")
    svg = page.locator("#frontier svg").first.bounding_box()
    assert svg is not None
    assert svg["width"] <= 900
    assert "invert(1)" in str(chart.get_attribute("style"))
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert chart.get_attribute("style") is None
    page.emulate_media(media="print", color_scheme="dark")
    ink = page.evaluate("() => getComputedStyle(document.body).color")
    assert ink == INK["light"]
