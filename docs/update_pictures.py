"""Draws the pictures of README and docs from a report: ``python docs/update_pictures.py RUN``.

Needs the packages of the extra ``test`` and Chromium (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parent / "images"


def main(run: str) -> None:
    """Photograph the frontier of a run's report."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("no Chromium here (Debian: apt-get install chromium)")
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 900}, color_scheme="light")
        page.goto((Path(run) / "report.html").resolve().as_uri())
        page.wait_for_function("() => Bokeh.documents[0]?.is_idle")
        page.locator("#frontier").screenshot(path=PICTURES / "frontier.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
