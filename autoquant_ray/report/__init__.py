"""Reports for people: Markdown and HTML, written from a run's files alone.

Imports ``allocate.certainty``, ``allocate``, ``plan``, ``runs`` and below. No torch, no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.report.content import collect_content
from autoquant_ray.report.html import render_html
from autoquant_ray.report.markdown import render_markdown
from autoquant_ray.runs.names import REPORT_HTML, REPORT_MARKDOWN


@dataclass(frozen=True, kw_only=True)
class Reports:
    """What was written.

    Attributes:
        paths: File name -> full path.
        grave: Reasons why the solution should not be used as it is, one line each.
    """

    paths: dict[str, str]
    grave: list[str]


def write_reports(run: ScoredRun, folder: str) -> Reports:
    """Write ``report.md`` and ``report.html`` next to a solution's manifests.

    Args:
        run: The run.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.
    """
    content, directory = collect_content(run, folder), run.state.directory
    texts = {REPORT_MARKDOWN: render_markdown(content), REPORT_HTML: render_html(content)}
    return Reports(
        paths={name: directory.write_text(f"{folder}{name}", t) for name, t in texts.items()},
        grave=[f"{c.title}: {c.text}" for c in content.concerns if c.is_grave],
    )
