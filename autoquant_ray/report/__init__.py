"""Reports for people: Markdown and HTML, written from a run's files alone.

Imports ``allocate.certainty``, ``allocate``, ``plan``, ``runs`` and below. No torch, no Ray.
"""

from __future__ import annotations

from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.report.content import collect_content
from autoquant_ray.report.html import render_html
from autoquant_ray.report.markdown import render_markdown
from autoquant_ray.runs.names import REPORT_HTML, REPORT_MARKDOWN


def write_reports(run: ScoredRun, folder: str) -> dict[str, str]:
    """Write ``report.md`` and ``report.html`` next to a solution's manifests.

    Args:
        run: The run.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.

    Returns:
        File name -> full path.
    """
    content, directory = collect_content(run, folder), run.state.directory
    texts = {REPORT_MARKDOWN: render_markdown(content), REPORT_HTML: render_html(content)}
    return {name: directory.write_text(f"{folder}{name}", text) for name, text in texts.items()}
