"""What the demo adds to a scan: a measured loss, the result in a sentence, what to do next."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from autoquant_ray.cli.edge import Result, only_ours_on_stdout, show_lines
from autoquant_ray.cli.run import plain_scan_result
from autoquant_ray.cli.workers import warm_workers
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import REPORT_HTML

if TYPE_CHECKING:
    from autoquant_ray.allocate.read import ScoredRun
    from autoquant_ray.runs.state import Mode

logger = logging.getLogger(__name__)


def demo_result(out: str, bits: float, mode: Mode) -> Result:
    """Scan the demo's model and measure the solution, or show what a finished run has.

    Args:
        out: Run directory.
        bits: Budget.
        mode: As of a scan.
    """
    from autoquant_ray.allocate.read import ScoredRun
    from autoquant_ray.config.demo import demo_config
    from autoquant_ray.runs.state import RunState

    config = demo_config(out, bits)
    with warm_workers(config.address, config.device, config.placement):
        scanned = plain_scan_result(config, mode)
        run = ScoredRun.read(RunState.open(RunDirectory(out)))
        _measure(run, out)

    def show() -> None:
        scanned.show()
        show_lines([_result_line(run), *_next_lines(out)])

    return replace(scanned, show=show)


def _measure(run: ScoredRun, out: str) -> None:
    """Measure the solution and single formats within its budget, unless that was done."""
    from autoquant_ray.config.demo import demo_evaluation
    from autoquant_ray.evaluate.evaluate import evaluate_run
    from autoquant_ray.report.sources import read_sources

    if read_sources(run, "").measured:
        return
    logger.info(
        "a first report: %s/%s; it is written again with what is measured", out, REPORT_HTML
    )
    logger.info("evaluate: text that the scan has not seen")
    with only_ours_on_stdout():
        evaluate_run(demo_evaluation(out))


def _result_line(run: ScoredRun) -> str:
    """What came out, in a sentence."""
    from autoquant_ray.report.content import collect_content

    return f"result: {collect_content(run, '').result}"


def _next_lines(out: str) -> list[str]:
    out = shlex.quote(out)
    return [
        f"next: open {out}/{REPORT_HTML}",
        f"  autoquant-ray solve {out} --bits 5 --engine vllm --gpu hopper",
        f"  autoquant-ray explain {out} lm_head",
        f"  autoquant-ray export {out} --out served-demo --engine vllm --gpu hopper",
    ]
