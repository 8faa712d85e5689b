"""The story of an audit: the scores that matter most to a plan, held against measurements.

A score predicts what one group in one format loses while everything else stays in 16 bits; here
just that is measured, on the first part of the shards (:func:`~autoquant_ray.evaluate.plan_search.
split_shards`), and the budget is solved again with what came out. The rest of the shards has chosen
nothing: on it the audited plan is measured beside the plan that it came from. Which pairs, and how
measurements and predictions are brought to one scale: :mod:`autoquant_ray.evaluate.audit_pairs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoquant_ray.allocate.candidate import (
    Candidate,
    as_allocation,
    make_candidate,
    without_domains,
)
from autoquant_ray.allocate.certainty.solution import certainty_of
from autoquant_ray.allocate.certainty.total_error import ratio_stderr
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import (
    load_problem,
    score_errors,
    solution_formats,
    solution_options,
)
from autoquant_ray.allocate.search import served_problem
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluate.audit_pairs import (
    Pair,
    choose_pairs,
    median_ratio,
    solve_again,
    write_pairs,
)
from autoquant_ray.evaluate.chosen_on import chosen_also_on, made_from
from autoquant_ray.evaluate.plan_search import split_shards
from autoquant_ray.evaluate.table import mean_kl
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.audit import AuditedPair, most_wrong
from autoquant_ray.runs.names import solution_folder, solution_of
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import Solution, write_solution

if TYPE_CHECKING:
    from autoquant_ray.evaluate.measurement import Measurement


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
        solution: The audited plan, written beside the one that it came from.
        before: The plan that was audited.
        pairs: What was measured, what matters most first.
        num_changed: Groups that got another format.
        path: Of ``audit.parquet``.
    """

    solution: Solution
    before: Candidate
    pairs: list[AuditedPair]
    num_changed: int
    path: str

    @property
    def start(self) -> str:
        """Folder of the audited plan with a trailing slash."""
        return solution_folder(self.solution.name)

    def to_json(self) -> dict[str, Any]:
        """The ``audit`` object of ``manifest.json``."""
        return audit_json(self.pairs, self.num_changed)


def audit_json(pairs: list[AuditedPair], num_changed: int) -> dict[str, Any]:
    """Summary of an audit; ``worst`` is the pair that the prediction misjudges most.

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


def audit_solution(measurement: Measurement, start: str, config: EvaluationConfig) -> Audit:
    """Measure the pairs that matter most to a solution and solve its budget again.

    Writes ``audit.parquet`` and the solution ``<name>-audited``.

    Args:
        measurement: The data; its first part is used.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.
        config: Says how many pairs.

    Raises:
        DataError: The data makes fewer than three shards.
        AutoQuantError: One of its subclasses; finished measurements are kept.
    """
    state = measurement.state
    problem, scores = load_problem(state)
    options = without_domains(solution_options(state, start))
    problem = problem.timed(options.latency)
    formats = solution_formats(state, start, problem)
    problem = served_problem(problem, options, formats)
    stderrs = score_errors(state.directory)
    shares = _shares(state, problem, scores, options, formats)
    chosen = choose_pairs(problem, scores, stderrs, shares, options, formats, config.audit or 0)
    if not chosen:
        raise ConfigError(
            "--audit: the constraints leave every group in 16 bits, so that there is no score to "
            "measure; audit another solution"
        )
    pairs = measure_pairs(measurement, problem, scores, stderrs, chosen)
    name = f"{solution_of(start) or 'scan'}-audited"
    audited = make_candidate(
        problem, scores, name, solve_again(problem, scores, pairs, options, formats)
    )
    num_changed = sum(formats[group] != audited.formats[group] for group in formats)
    measurement.require_lease()
    path = write_pairs(state.directory, name, measurement.data_key, pairs)
    notes = {
        "audit": audit_json(pairs, num_changed),
        "made_from": made_from("evaluate", config),
        "chosen_on": chosen_also_on(
            state.directory.read_json(f"{start}manifest.json"), measurement, num_parts=1
        ),
    }
    allocation = as_allocation(problem, scores, options, audited)
    return Audit(
        solution=write_solution(state, problem, scores, options, allocation, name, notes),
        before=make_candidate(problem, scores, "unaudited", formats),
        pairs=pairs,
        num_changed=num_changed,
        path=path,
    )


def measure_pairs(
    measurement: Measurement,
    problem: Problem,
    scores: Scores,
    stderrs: dict[Pair, float | None],
    chosen: list[Pair],
) -> list[AuditedPair]:
    """Measure pairs, each alone in a model in 16 bits, on the first part of the shards.

    Args:
        measurement: The data.
        problem: Groups with their costs.
        scores: (group, format) -> predicted loss in nats per token.
        stderrs: Their standard errors.
        chosen: The pairs.
    """
    first, _, _ = split_shards(measurement.facts["num_shards"])
    nothing = {group.name: NONE for group in problem.searched}
    plans = [
        make_candidate(problem, scores, f"{group} {format_}", nothing | {group: format_})
        for group, format_ in chosen
    ]
    return [
        AuditedPair(
            group=group,
            format=format_,
            predicted=scores[group, format_],
            predicted_stderr=stderrs[group, format_],
            measured=mean_kl(one),
            measured_stderr=ratio_stderr(one.kl_S, one.tokens_S),
            num_samples=len(one.kl_S),
        )
        for (group, format_), one in zip(chosen, measurement.measure(plans, first), strict=True)
    ]


def _shares(
    state: RunState,
    problem: Problem,
    scores: Scores,
    options: SolveOptions,
    formats: dict[str, str],
) -> dict[Pair, float]:
    """Share of the resamples that choose a pair; empty where there are no shards to resample."""
    certainty = certainty_of(state, problem, scores, options, formats)
    nested = {} if certainty is None else certainty.shares
    return {(group, f): share for group, of in nested.items() for f, share in of.items()}
