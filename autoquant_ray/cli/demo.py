"""What the demo adds to a scan: a measured loss, the result in a sentence, what to do next."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoquant_ray.cli.edge import Result, only_ours_on_stdout, show_lines
from autoquant_ray.cli.run import scan_result
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import EVALUATION_FILE, REPORT_HTML

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

    scanned = scan_result(demo_config(out, bits), mode, says_next=False)
    run = ScoredRun.read(RunState.open(RunDirectory(out)))
    rows = _measured(run, out)

    def show() -> None:
        scanned.show()
        show_lines([*_result_lines(run, rows), *_next_lines(out)])

    return replace(scanned, show=show)


def _measured(run: ScoredRun, out: str) -> list[dict[str, Any]]:
    """Rows of the solution and of single formats within its budget."""
    from autoquant_ray.report.measured import measured_rows
    from autoquant_ray.report.sources import read_sources

    if RunDirectory(out).exists(EVALUATION_FILE):
        sources = read_sources(run, "")
        shown = measured_rows(sources.evaluations, sources.name, sources.key)
        if shown:
            return shown[0]
    from autoquant_ray.config.demo import demo_evaluation
    from autoquant_ray.evaluate.evaluate import evaluate_run

    logger.info("evaluate: text that the scan has not seen")
    with only_ours_on_stdout():
        return evaluate_run(demo_evaluation(out)).rows


def _result_lines(run: ScoredRun, rows: list[dict[str, Any]]) -> list[str]:
    """What came out, in a sentence."""
    from autoquant_ray.report.content import collect_content
    from autoquant_ray.report.headline import unquantized_bytes

    content = collect_content(run, "")
    mix = [f"{row.format} for {row.share:.0%}" for row in content.mix if row.format != NONE]
    solution, *rivals = rows
    whole = unquantized_bytes(run.problem)
    size = solution["weight_bytes"] / whole
    text = (
        f"result: {', '.join(mix)} of the weights, {size:.0%} of the size; measured loss "
        f"{solution['kl_mean']:.3f} nats per token (predicted {solution['predicted_kl']:.3f}) on "
        f"{solution['num_tokens']:,} tokens that the scan has not seen"
    )
    everywhere = [row for row in rivals if row["name"].startswith("uniform ")]
    if everywhere:
        best = min(everywhere, key=lambda row: float(row["kl_mean"]))
        name = best["name"].removeprefix("uniform ")
        text += (
            f"; {name} everywhere loses {best['kl_mean']:.3f} at "
            f"{best['weight_bytes'] / whole:.0%} of the size"
        )
    return [f"{text}."]


def _next_lines(out: str) -> list[str]:
    return [
        f"next: open {out}/{REPORT_HTML}",
        f"  autoquant-ray solve {out} --bits 5 --engine vllm --gpu hopper",
        f"  autoquant-ray explain {out} lm_head",
        f"  autoquant-ray export {out} --out served --engine vllm --gpu hopper",
    ]
