"""A sweep: one scan per model, every budget solved from it.

The scan of a model is run at the first budget that the model can meet; the others are solved from
its scores, into ``solutions/``. A model that fails does not stop the others. A sweep that is run
again continues: finished scans are only read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autoquant_ray.allocate.options import solve_options
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INFEASIBLE,
    EXIT_NEEDS_A_LOOK,
    EXIT_USAGE,
    AutoQuantError,
    InfeasibleBudgetError,
    one_line,
)
from autoquant_ray.jobs.file import SweepJob
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_JSON, slug
from autoquant_ray.scan import run_search
from autoquant_ray.solve import Solution, solve_run

logger = logging.getLogger(__name__)

_FROM_GOOD_TO_BAD = (EXIT_DONE, EXIT_NEEDS_A_LOOK, EXIT_INFEASIBLE, EXIT_USAGE, EXIT_FAILED)


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One model at one budget.

    Attributes:
        model: As the job names it.
        run: Run directory.
        budget: ``bits 4.5`` or ``bytes 1500000``.
        exit_code: What a scan or a solve of this row alone would have returned.
        error: Why there is no solution, or what to look at; None where all is well.
        effective_bits: Average stored bits over the searched groups.
        predicted_kl_nats: Predicted KL divergence, nats per token.
        weight_bytes: Bytes of the whole model's weights.
        manifest: Path of the solution's ``manifest.json``.
    """

    model: str
    run: str
    budget: str
    exit_code: int = EXIT_DONE
    error: str | None = None
    effective_bits: float | None = None
    predicted_kl_nats: float | None = None
    weight_bytes: float | None = None
    manifest: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self)


def run_sweep(job: SweepJob, run_id: str) -> list[SweepRow]:
    """Scan every model, or resume its scan, and solve every budget.

    Args:
        job: What to do.
        run_id: Of the sweep; a model's run gets ``<run_id>-<last part of the model's name>``.

    Returns:
        Rows in the order of the job: models, and each one's budgets.
    """
    rows = []
    for number, model in enumerate(job.models, start=1):
        logger.info("model %d of %d: %s", number, len(job.models), model)
        rows += _run_model(job, model, f"{run_id}-{slug(model)}")
    return rows


def worst_code(rows: Sequence[SweepRow]) -> int:
    """The worst exit code of all rows."""
    return max((row.exit_code for row in rows), key=_FROM_GOOD_TO_BAD.index)


def _run_model(job: SweepJob, model: str, run_id: str) -> list[SweepRow]:
    configs = [job.config(model, budget) for budget in job.budget_fields()]
    rows: list[SweepRow] = []
    quarantined: int | None = None
    for index, config in enumerate(configs):
        try:
            if quarantined is None:
                result = run_search(config, "resume", run_id)
                solution, quarantined = result.solution, len(result.quarantined)
            else:
                solution = solve_run(RunDirectory(config.out), solve_options(config))
            rows.append(_row(model, config, solution, quarantined))
        except Exception as error:  # noqa: BLE001 - one model must not stop the others
            failed = _failed_row(model, config, error)
            logger.error("%s, %s: %s", model, failed.budget, failed.error)
            if quarantined is None and not isinstance(error, InfeasibleBudgetError):
                # Without a scan there is nothing to solve the other budgets from.
                return rows + [_failed_row(model, later, error) for later in configs[index:]]
            rows.append(failed)
    return rows


def _row(model: str, config: ScanConfig, solution: Solution, quarantined: int) -> SweepRow:
    return SweepRow(
        model=model,
        run=config.out,
        budget=_budget(config),
        exit_code=EXIT_NEEDS_A_LOOK if quarantined else EXIT_DONE,
        error=f"{quarantined} shard(s) were left out" if quarantined else None,
        effective_bits=solution.summary["effective_bits"],
        predicted_kl_nats=solution.summary["predicted_kl_nats"],
        weight_bytes=solution.summary["weight_bytes"],
        manifest=solution.paths[MANIFEST_JSON],
    )


def _failed_row(model: str, config: ScanConfig, error: Exception) -> SweepRow:
    is_ours = isinstance(error, AutoQuantError)
    if not is_ours:
        logger.debug("traceback", exc_info=error)
    return SweepRow(
        model=model,
        run=config.out,
        budget=_budget(config),
        exit_code=error.exit_code if isinstance(error, AutoQuantError) else EXIT_FAILED,
        error=one_line(error) if is_ours else f"{type(error).__name__}: {one_line(error)}",
    )


def _budget(config: ScanConfig) -> str:
    return f"bytes {config.bytes}" if config.bits is None else f"bits {config.bits:g}"
