"""The story of a refinement: search around a solution by measured KL, where prediction ends.

The data that the scan has not seen is cut in three. On the first part swaps are tried (every plan
on the same tokens, so that differences are paired), and taken if they are better by more than
their standard error. The best plans then race on the second part. What is said about the winner
is measured on the third, which played no part in choosing it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autoquant_ray.allocation import Allocation
from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.candidates import Candidate, make_candidate, solution_options
from autoquant_ray.errors import DataError
from autoquant_ray.evaluation import record
from autoquant_ray.evaluation_config import EvaluationConfig
from autoquant_ray.evaluation_table import Measured, mean_kl, paired_difference
from autoquant_ray.measurement import Measurement, measuring
from autoquant_ray.solve import Solution, load_problem, write_solution
from autoquant_ray.state import RunState
from autoquant_ray.store import SOLUTIONS, RunDirectory
from autoquant_ray.swaps import Change, Swaps, combine

logger = logging.getLogger(__name__)

_BATCH = 12  # plans per round
_POOL = 4  # proposals per plan that is drawn from them
_IDLE_ROUNDS = 2  # without an improvement, then the search ends
_RACING = 4


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What a refinement found.

    Attributes:
        solution: The winner, written beside the solution that it came from.
        before: Mean measured KL of the start on the third part, and its standard error.
        after: The same of the winner.
        difference: Winner minus start there, paired, and its standard error.
        num_trials: Plans measured on the first part, the start not counted.
        num_accepted: Swaps taken.
    """

    solution: Solution
    before: tuple[float, float | None]
    after: tuple[float, float | None]
    difference: tuple[float, float | None]
    num_trials: int
    num_accepted: int

    def to_json(self) -> dict[str, Any]:
        """The ``refinement`` object of ``manifest.json``."""
        return {
            "num_trials": self.num_trials,
            "num_accepted": self.num_accepted,
            "kl_before": self.before[0],
            "kl_before_stderr": self.before[1],
            "kl_after": self.after[0],
            "kl_after_stderr": self.after[1],
            "kl_difference": self.difference[0],
            "kl_difference_stderr": self.difference[1],
        }


@dataclass
class _Search:
    """The state of the search: every plan measured so far on the first part."""

    measurement: Measurement
    problem: Problem
    scores: Mapping[tuple[str, str], float]
    shards: list[int]
    seen: dict[str, tuple[Candidate, Measured]] = field(default_factory=dict)

    def plan(self, name: str, formats: Mapping[str, str]) -> Candidate:
        return make_candidate(self.problem, self.scores, name, formats)

    def measure(self, plans: list[Candidate]) -> list[Measured]:
        results = self.measurement.measure(plans, self.shards)
        self.seen |= {p.key: (p, one) for p, one in zip(plans, results, strict=True)}
        return results


def refine_run(config: EvaluationConfig, num_trials: int, seed: int = 0) -> Refinement:
    """Search around a solution by measured KL.

    Args:
        config: Run, solution, data and workers.
        num_trials: Plans to measure at most.
        seed: Of the choice among proposals.

    Raises:
        DataError: The data makes fewer than three shards.
        AutoQuantError: One of its subclasses; finished measurements are kept.
    """
    state = RunState.open(RunDirectory(config.run))
    start = f"{SOLUTIONS}/{config.solution}/" if config.solution else ""
    problem, scores = load_problem(state)
    options = solution_options(state, start)
    rows = state.directory.read_table(f"{start}manifest.parquet", "manifest").to_pylist()
    chosen = {row["group"]: row["format"] for row in rows}
    formats = {group.name: chosen[group.name] for group in problem.searched}
    with measuring(state, config) as measurement:
        first, second, third = split_shards(measurement.facts["num_shards"])
        search = _Search(measurement, problem, scores, first)
        own = search.plan("solution", formats)
        num_tried, num_accepted = _climb(search, own, options, num_trials, seed)
        racing = _racing(search, own)
        on_second = measurement.measure(racing, second)
        winner = min(zip(racing, on_second, strict=True), key=lambda pair: mean_kl(pair[1]))[0]
        before, after = measurement.measure([own, winner], third)
        name = config.solution or "scan"
        refined = Refinement(
            solution=write_solution(
                state,
                problem,
                scores,
                options,
                _allocation(search, options, winner),
                f"{name}-refined",
            ),
            before=(mean_kl(before), paired_difference(before, None)[1]),
            after=(mean_kl(after), paired_difference(after, None)[1]),
            difference=paired_difference(after, before),
            num_trials=num_tried,
            num_accepted=num_accepted,
        )
        _note(state, refined)
        record(measurement, f"{SOLUTIONS}/{name}-refined/", [winner, own], [after, before])
    return refined


def split_shards(num_shards: int) -> tuple[list[int], list[int], list[int]]:
    """Half of the shards for the search, a quarter each for the race and the final figure.

    Raises:
        DataError: There are fewer than three.
    """
    if num_shards < 3:
        raise DataError(
            f"refining needs three shards of data or more, one each to search, to race and to "
            f"tell the result; this data makes {num_shards}; give more with --samples or --data"
        )
    quarter = max(1, num_shards // 4)
    shards = list(range(num_shards))
    half = num_shards - 2 * quarter
    return shards[:half], shards[half : half + quarter], shards[half + quarter :]


def _climb(
    search: _Search, own: Candidate, options: SolveOptions, num_trials: int, seed: int
) -> tuple[int, int]:
    """Take swaps that are better by more than their error; returns trials and swaps taken."""
    swaps = Swaps(search.problem, search.scores, options)
    rng = np.random.default_rng(seed)
    (current,) = search.measure([own])
    plan, num_tried, num_accepted, idle = own, 0, 0, 0
    while num_tried < num_trials and idle < _IDLE_ROUNDS:
        changes = _draw(search, swaps, plan, min(_BATCH, num_trials - num_tried), rng)
        if not changes:
            break
        plans = [search.plan("swap", {**plan.formats, **dict(change)}) for change in changes]
        results = search.measure(plans)
        num_tried += len(plans)
        better = _better(changes, plans, results, current)
        together = _together(search, swaps, plan, [change for change, _, _ in better])
        if together is not None and num_tried < num_trials:
            (result,) = search.measure([together])
            num_tried += 1
            better += _better([()], [together], [result], current)
        if not better:
            idle += 1
            continue
        _, plan, current = min(better, key=lambda one: mean_kl(one[2]))
        idle, num_accepted = 0, num_accepted + 1
        logger.info("refine: %d plans tried, KL %.4g", num_tried, mean_kl(current))
    return num_tried, num_accepted


def _draw(
    search: _Search, swaps: Swaps, plan: Candidate, count: int, rng: np.random.Generator
) -> list[Change]:
    """Some of the changes that the scores like best and that were not measured yet."""
    untried = (
        change
        for change in swaps.proposals(plan.formats)
        if search.plan("swap", {**plan.formats, **dict(change)}).key not in search.seen
    )
    liked = list(itertools.islice(untried, _POOL * count))
    drawn = rng.permutation(len(liked))[:count]
    return [liked[index] for index in sorted(drawn)]


def _better(
    changes: list[Change], plans: list[Candidate], results: list[Measured], current: Measured
) -> list[tuple[Change, Candidate, Measured]]:
    """Plans that are better than the current one by more than the paired standard error."""
    found = []
    for change, plan, result in zip(changes, plans, results, strict=True):
        difference, error = paired_difference(result, current)
        if difference + (error or 0.0) < 0:
            found.append((change, plan, result))
    return sorted(found, key=lambda one: mean_kl(one[2]))


def _together(
    search: _Search, swaps: Swaps, plan: Candidate, changes: list[Change]
) -> Candidate | None:
    """All improvements of a round that touch different groups, as far as they fit together."""
    formats = dict(plan.formats)
    taken = 0
    for change in combine(changes):
        merged = {**formats, **dict(change)}
        if swaps.fits(merged):
            formats, taken = merged, taken + 1
    together = search.plan("swap", formats)
    return together if taken > 1 and together.key not in search.seen else None


def _racing(search: _Search, own: Candidate) -> list[Candidate]:
    """The start, and the best plans of the first part that are better there."""
    limit = mean_kl(search.seen[own.key][1])
    ranked = sorted(search.seen.values(), key=lambda pair: mean_kl(pair[1]))
    better = [plan for plan, result in ranked if mean_kl(result) < limit]
    return [own, *better[:_RACING]]


def _allocation(search: _Search, options: SolveOptions, plan: Candidate) -> Allocation:
    """The winner as an allocation; its gap is that of its predicted, not of its measured loss."""
    best = search.problem.solve(search.scores, options)
    predicted = plan.predicted_kl
    gap = max(0.0, predicted - best.score) / predicted if predicted else 0.0
    return replace(best, formats=plan.formats, score=predicted, optimality_gap=gap)


def _note(state: RunState, refined: Refinement) -> None:
    """Add the ``refinement`` object to the winner's manifest."""
    name = f"{SOLUTIONS}/{refined.solution.name}/manifest.json"
    manifest = state.directory.read_json(name)
    state.directory.write_json(name, manifest | {"refinement": refined.to_json()})
