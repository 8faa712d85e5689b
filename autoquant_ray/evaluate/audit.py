"""Audits a solution: measures the scores that matter most to it, and solves its budget again.

A score predicts what a group in a format loses while everything else stays in 16 bits. An audit
measures exactly that on the first part of the shards
(:func:`~autoquant_ray.evaluate.allocation_search.split_shards`), and solves the budget again with
the measured losses. The other shards have chosen nothing: there the audited allocation is compared
with the original. Which pairs are measured, and how measurements and predictions are put on a
common
scale: :mod:`autoquant_ray.evaluate.audit_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoquant_ray.allocate.candidate import (
    Candidate,
)
from autoquant_ray.allocate.certainty.solution import certainty_of
from autoquant_ray.allocate.certainty.total_error import ratio_stderr
from autoquant_ray.allocate.read import (
    ScoredRun,
)
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluate.allocation_search import split_shards
from autoquant_ray.evaluate.audit_pairs import (
    Pair,
    choose_pairs,
    median_ratio,
    solve_again,
    write_pairs,
)
from autoquant_ray.evaluate.chosen_on import chosen_also_on, made_from
from autoquant_ray.evaluate.measurable import measurable
from autoquant_ray.evaluate.starting_point import StartingPoint, starting_point, write_candidate
from autoquant_ray.evaluate.table import mean_kl
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.audit import AuditedPair, most_wrong
from autoquant_ray.runs.names import MANIFEST_JSON, solution_folder, solution_of
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import Solution

if TYPE_CHECKING:
    from autoquant_ray.evaluate.measurement import Measurement


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A finished audit.

    Attributes:
        solution: The audited solution, written beside the original.
        before: The allocation that was audited.
        pairs: The measured pairs, in order of importance.
        num_changed: Groups whose format changed.
        path: Path of ``audit.parquet``.
    """

    solution: Solution
    before: Candidate
    pairs: list[AuditedPair]
    num_changed: int
    path: str

    @property
    def folder(self) -> str:
        """Folder of the audited solution with a trailing slash."""
        return solution_folder(self.solution.name)

    def to_json(self) -> dict[str, Any]:
        """The ``audit`` object of ``manifest.json``."""
        return audit_json(self.pairs, self.num_changed)


def audit_json(pairs: list[AuditedPair], num_changed: int) -> dict[str, Any]:
    """Summary of an audit; ``worst`` is the pair with the largest prediction error.

    Numbers that do not exist or are infinite are null.
    """
    factor = median_ratio(pairs)
    worst = most_wrong(pairs, factor)[0]
    return {
        "num_pairs": len(pairs),
        "num_samples": pairs[0].num_samples,
        "median_ratio": factor,
        "worst": {"group": worst.group, "format": worst.format, "ratio": worst.ratio},
        "num_changed": num_changed,
    }


def audit_solution(
    run: ScoredRun, measurement: Measurement, folder: str, config: EvaluationConfig
) -> Audit:
    """Measure the pairs that matter most to a solution and solve its budget again.

    Writes ``audit.parquet`` and the solution ``<name>-audited``.

    Args:
        run: The run.
        measurement: The data; its first part is used.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.
        config: Its ``audit`` is the number of pairs.

    Raises:
        DataError: The data makes fewer than three shards.
        AutoQuantError: One of its subclasses; finished measurements are kept.
    """
    state = run.state
    origin = starting_point(run, folder)
    start = measurable(state, origin)
    chosen = choose_pairs(start, run.errors, _shares(state, origin), config.audit or 0)
    if not chosen:
        raise ConfigError(
            "`audit`: the constraints leave every group in 16 bits, so there is no score to "
            "measure; audit another solution"
        )
    pairs = measure_pairs(measurement, origin, run.errors, chosen)
    name = f"{solution_of(folder) or 'scan'}-audited"
    audited = origin.candidate(name, solve_again(start, pairs))
    num_changed = sum(audited.formats[g] != format_ for g, format_ in origin.formats.items())
    measurement.require_lease()
    path = write_pairs(state.directory, name, measurement.data_key, pairs)
    notes = {"audit": audit_json(pairs, num_changed)} | _provenance(measurement, folder, config)
    return Audit(
        solution=write_candidate(run, origin, audited, notes),
        before=origin.candidate("unaudited", origin.formats),
        pairs=pairs,
        num_changed=num_changed,
        path=path,
    )


def _provenance(measurement: Measurement, folder: str, config: EvaluationConfig) -> dict[str, Any]:
    """Notes of the manifest: how to make the audited solution again, and which data chose it."""
    manifest = measurement.state.directory.read_json(f"{folder}{MANIFEST_JSON}")
    return {
        "made_from": made_from("evaluate", config),
        "chosen_on": chosen_also_on(manifest, measurement, num_parts=1),
    }


def measure_pairs(
    measurement: Measurement,
    origin: StartingPoint,
    stderrs: dict[Pair, float | None],
    chosen: list[Pair],
) -> list[AuditedPair]:
    """Measure pairs, each alone in a 16-bit model, on the first part of the shards.

    Args:
        measurement: The data.
        origin: The problem with its scores.
        stderrs: Standard errors of the scores.
        chosen: The pairs.
    """
    first, _, _ = split_shards(measurement.facts["num_shards"])
    unquantized = {group.name: NONE for group in origin.problem.searched}
    candidates = [
        origin.candidate(f"{group} {format_}", unquantized | {group: format_})
        for group, format_ in chosen
    ]
    measured = measurement.measure(candidates, first)
    return [
        AuditedPair(
            group=group,
            format=format_,
            predicted=origin.scores[group, format_],
            predicted_stderr=stderrs[group, format_],
            measured=mean_kl(losses),
            measured_stderr=ratio_stderr(losses.kl_S, losses.tokens_S),
            num_samples=len(losses.kl_S),
        )
        for (group, format_), losses in zip(chosen, measured, strict=True)
    ]


def _shares(state: RunState, origin: StartingPoint) -> dict[Pair, float]:
    """Pair -> share of the resamples that choose it; empty where shards cannot be resampled."""
    certainty = certainty_of(state, origin.problem, origin.scores, origin.options, origin.formats)
    nested = {} if certainty is None else certainty.shares
    return {(group, f): share for group, of in nested.items() for f, share in of.items()}
