"""Questions to a page, as JavaScript."""

from __future__ import annotations

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
