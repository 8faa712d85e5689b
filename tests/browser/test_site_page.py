"""The history page in headless Chromium: what a person sees, with and without JavaScript."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from page_checks import CONTRAST, OUTSIDE
from playwright.sync_api import Page, expect
from runs_folder import EVIL, put_everything

from autoquant_ray.compare.site_page import write_site
from autoquant_ray.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    put_everything(folder)
    return Path(write_site(RunDirectory(str(folder)))).as_uri()


def first_cells(page: Page, column: int) -> list[str]:
    """Texts of one column of the first job's table, top to bottom."""
    cells = page.locator("table").first.locator(f"tbody tr > :nth-child({column})")
    return [text.strip().splitlines()[0] for text in cells.all_inner_texts()]


def test_everything_is_seen_and_nothing_else_is_asked_for(open_page: Any, address: str) -> None:
    opened = open_page()
    page = opened.page
    for text in ("Needs a look", "qwen3-32b", "Predicted KL", "Allocation churn"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    for status in ("Unfinished", "Failed", "Quarantined", "Infeasible", "Drift"):
        expect(page.locator(".status", has_text=status).first).to_be_visible()
    expect(page.get_by_text("3 bits cannot be met").first).to_be_visible()
    charts = page.get_by_role("img", name="Predicted KL")
    assert charts.count() == 3
    for chart in charts.all():
        expect(chart).to_be_visible()
    assert opened.complaints == []
    assert opened.requests == [address]


def test_hostile_name_is_text(open_page: Any) -> None:
    page = open_page().page
    expect(page.get_by_role("heading", name=f"org/{EVIL}")).to_be_visible()
    assert "hacked" not in page.title()


def test_policy_stops_a_script_that_got_through(open_page: Any) -> None:
    """A server listens where the script would send to; nobody comes."""
    opened = open_page()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        opened.page.evaluate(
            """(address) => {
                const script = document.createElement("script");
                script.textContent = "document.title = 'hacked'";
                document.body.append(script);
                new Image().src = `${address}/pixel`;
                return fetch(`${address}/data`).catch(() => {});
            }""",
            f"http://127.0.0.1:{listener.getsockname()[1]}",
        )
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert opened.page.title() != "hacked"
    assert any("Content Security Policy" in text for text in opened.complaints)


def test_columns_sort_by_keyboard(open_page: Any) -> None:
    opened = open_page()
    page = opened.page
    head = page.locator("table").first.locator("thead th", has_text="Predicted KL")
    button = head.get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    shown = first_cells(page, 5)
    numbers = [float(text) for text in shown if text != "\N{EN DASH}"]
    assert len(numbers) == 12
    assert numbers == sorted(numbers)
    assert shown[12:] == ["\N{EN DASH}"] * 3, "runs without a number are last"
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(text) for text in first_cells(page, 5)[:12]] == sorted(numbers, reverse=True)
    assert page.locator("table").first.locator("[aria-sort]").count() == 1
    assert "sorted by Predicted KL, descending" in page.get_by_role("status").inner_text()
    assert opened.complaints == []


def test_first_tab_skips_to_the_runs_and_focus_is_seen(open_page: Any) -> None:
    page = open_page().page
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    assert focused.inner_text() == "Skip to the runs"
    box = focused.bounding_box()
    assert box is not None
    assert box["y"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    link = page.locator("main :focus")
    assert link.count() == 1
    assert link.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    assert link.evaluate("e => parseFloat(getComputedStyle(e).outlineWidth)") >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(scheme: str, open_page: Any) -> None:
    page = open_page(color_scheme=scheme).page
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 15
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_dark_scheme_is_dark(open_page: Any) -> None:
    backgrounds = [
        open_page(color_scheme=scheme).page.evaluate(
            "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        for scheme in ("light", "dark")
    ]
    assert min(backgrounds[0]) > 200
    assert max(backgrounds[1]) < 60


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out(width: int, open_page: Any) -> None:
    page = open_page(viewport={"width": width, "height": 844}).page
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    outside = page.evaluate(OUTSIDE)
    assert outside == []
    tick = page.locator("figure svg:visible .tick").first
    box = tick.bounding_box()
    assert box is not None
    assert box["height"] >= 11, "labels stay readable"


def test_labels_of_an_axis_do_not_overlap(open_page: Any) -> None:
    for width in (390, 1280):
        page = open_page(viewport={"width": width, "height": 844}).page
        overlapping = page.evaluate(
            """() => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
                const boxes = [...svg.querySelectorAll(".tick")].map(
                    (e) => e.getBoundingClientRect()).filter((box) => box.width);
                return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) =>
                    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom));
            }).length"""
        )
        assert overlapping == 0


def test_page_without_javascript_says_the_same(open_page: Any) -> None:
    with_script = open_page().page.locator("main").inner_text()
    page = open_page(java_script_enabled=False).page
    assert page.locator("th button").count() == 0
    assert page.locator("table").count() == 3
    assert page.locator("main").inner_text().split() == with_script.split()


def test_report_opens(open_page: Any) -> None:
    page = open_page().page
    page.get_by_role("link", name="qwen3-32b-2026-11-14").click()
    expect(page.get_by_text("report of qwen3-32b-2026-11-14")).to_be_visible()
