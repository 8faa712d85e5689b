"""Draws the pictures of README and docs: ``python docs/update_pictures.py RUN [MERMAID]``.

RUN is the demo's run, whose report is photographed: the frontier, and its first screen on a desktop
in light and dark and on a phone. MERMAID is ``mermaid.min.js`` of the npm package ``mermaid``
(``npm pack mermaid`` gets it); with it the diagram of README is drawn too. Needs the packages of
the extra ``test`` and Chromium (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from build_site import DIAGRAM, MERMAID, ROOT
from playwright.sync_api import Browser, sync_playwright

PICTURES = DIAGRAM.parent
DESKTOP, PHONE = {"width": 1500, "height": 900}, {"width": 400, "height": 800}
SCREENS = {
    "report-light.png": (DESKTOP, "light"),
    "report-dark.png": (DESKTOP, "dark"),
    "report-phone.png": (PHONE, "light"),
}
FRONTIERS = {"report-light.png": "frontier.png", "report-dark.png": "frontier-dark.png"}
"""Screen -> picture of the frontier on it."""


def photograph_report(browser: Browser, report: Path) -> None:
    """The frontier of a report, and its first screens."""
    for name, (viewport, scheme) in SCREENS.items():
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        page.goto(report.resolve().as_uri())
        page.wait_for_function("() => Bokeh.documents[0]?.is_idle")
        page.screenshot(path=PICTURES / name)
        if name in FRONTIERS:
            page.locator("#frontier").screenshot(path=PICTURES / FRONTIERS[name])
        page.close()


def draw_diagram(browser: Browser, mermaid: Path) -> None:
    """The Mermaid diagram of README as SVG, its text in a comment before it."""
    source = MERMAID.findall((ROOT / "README.md").read_text("utf-8"))[0]
    page = browser.new_page()
    page.add_script_tag(path=mermaid)
    drawn = page.evaluate(
        """async (source) => {
          mermaid.initialize({startOnLoad: false, theme: "neutral", htmlLabels: false,
                              flowchart: {htmlLabels: false}});
          return (await mermaid.render("pipeline", source)).svg;
        }""",
        source,
    )
    note = f"<!-- {json.dumps(source).replace('--', '- -')} -->\n"
    DIAGRAM.write_text(f"{note}{drawn}\n", encoding="utf-8")


def main(run: str, mermaid: str | None = None) -> None:
    """Draw them all."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("no Chromium here (Debian: apt-get install chromium)")
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if mermaid is not None:
            draw_diagram(browser, Path(mermaid))
        photograph_report(browser, Path(run) / "report.html")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
