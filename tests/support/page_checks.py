"""Questions to a page, as JavaScript."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

CONTRAST = """() => {
    const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = (rgb) => rgb.match(/[\\d.]+/g).slice(0, 3).map(Number).map(channel)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const back = (e) => {
        for (; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(color)) return color;
        }
    };
    const found = {};
    for (const e of document.querySelectorAll("p, a, h1, h2, h3, td, th, small, span, dd, dt")) {
        if (!e.innerText || !e.innerText.trim()) continue;
        const [x, y] = [light(getComputedStyle(e).color), light(back(e))].sort((a, b) => b - a);
        const ratio = (x + 0.05) / (y + 0.05);
        const name = `${e.tagName} ${e.className}`;
        found[name] = Math.min(found[name] ?? 99, ratio);
    }
    return found;
}"""
"""Lowest contrast of text and background, by tag and class."""

OUTSIDE = """() => [...document.querySelectorAll("body *")].filter((e) => {
            const box = e.getBoundingClientRect();
            const isHidden = e.closest(".scroll table, .skip, .sr") || !box.width;
            return !isHidden && (box.right > innerWidth + 0.5 || box.left < -0.5);
        }).map((e) => e.outerHTML.slice(0, 80))"""
"""Elements that stick out of the window, other than what scrolls inside its own box."""

CHART_TEXT = "#frontier text:not([fill=none])"
"""Each text in the SVG of a report's chart; the library draws an outline in no colour besides."""

TEXTS = """(place) => {
    const texts = [];
    const search = (root) => {
        for (const e of root.querySelectorAll("*")) {
            if (e.shadowRoot) search(e.shadowRoot);
            if (!e.matches("text:not([fill=none]), .bk-label") || !e.textContent.trim()) continue;
            const { left, right, top, bottom } = e.getBoundingClientRect();
            texts.push({ text: e.textContent, box: [left, top, right, bottom] });
        }
    };
    search(place);
    return texts;
}"""
"""Texts of a chart, which stand in shadow roots, and their places: left, top, right, bottom."""

SPOT = """(kind) => {
    const view = [...Bokeh.index][0];
    const { data } = view.model.document.get_model_by_name("points");
    const { left, top } = view.el.getBoundingClientRect();
    const i = data.kind.indexOf(kind);
    return [left + view.frame.x_scale.compute(data.x[i]),
            top + view.frame.y_scale.compute(data.loss[i])];
}"""
"""Where the first point of a kind is in the window."""

SQUARES = """() => {
    const view = [...Bokeh.index][0];
    const { data } = view.model.document.get_model_by_name("points");
    const { left, top } = view.el.getBoundingClientRect();
    const { bbox, x_scale, y_scale } = view.frame;
    const squares = [...data.kind.keys()].filter((i) => data.kind[i] === "uniform").map((i) => ({
        name: data.name[i].replace("all ", ""),
        place: [left + x_scale.compute(data.x[i]), top + y_scale.compute(data.loss[i])] }));
    const frame = [left + bbox.left, left + bbox.right, top + bbox.top, top + bbox.bottom];
    return { squares, frame };
}"""
"""The squares of single formats, and the frame around the points: left, right, top, bottom."""


def wait_for_chart(page: Page) -> None:
    """Until the library has drawn it, with the names beside its points."""
    page.wait_for_function("() => Bokeh.documents[0]?.is_idle")
    page.locator(CHART_TEXT, has_text="this solution").wait_for()
