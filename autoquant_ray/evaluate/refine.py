"""Refines a solution: searches around it by measured KL, where predictions no longer hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.allocate.candidate import SOLUTION
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.allocation_search import SearchResult, search_allocations
from autoquant_ray.evaluate.chosen_on import chosen_also_on, made_from, untouched_shards
from autoquant_ray.evaluate.evaluate import Evaluation, record
from autoquant_ray.evaluate.measurable import measurable
from autoquant_ray.evaluate.measurement import Measurement, measuring
from autoquant_ray.evaluate.starting_point import starting_point, write_candidate
from autoquant_ray.evaluate.table import Measured, mean_kl, paired_difference
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_JSON, solution_folder
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import Solution

Estimate = tuple[float, float | None]
"""Mean in nats per token, and its standard error."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Results of a refinement, measured on data that played no part in the search.

    Attributes:
        before: Mean measured KL of the start.
        after: Mean measured KL of the winner.
        difference: Winner minus start, paired by sample.
        num_trials: Allocations tried.
        num_flips: How many of them were single changes of the start.
        num_accepted: Changes accepted.
        data_key: Data used by the search, so that it never counts as unseen.
        source: Identity of that data, however it is cut into samples.
    """

    before: Estimate
    after: Estimate
    difference: Estimate
    num_trials: int
    num_flips: int
    num_accepted: int
    data_key: str
    source: list[str]

    def to_json(self) -> dict[str, Any]:
        """The ``refinement`` object of ``manifest.json``."""
        return {
            "num_trials": self.num_trials,
            "num_flips": self.num_flips,
            "num_accepted": self.num_accepted,
            "kl_before": self.before[0],
            "kl_before_stderr": self.before[1],
            "kl_after": self.after[0],
            "kl_after_stderr": self.after[1],
            "kl_difference": self.difference[0],
            "kl_difference_stderr": self.difference[1],
            "data_key": self.data_key,
            "source": self.source,
        }


@dataclass(frozen=True, kw_only=True)
class Refinement(Figures):
    """A finished refinement.

    Attributes:
        solution: The winner, written beside the solution that was refined.
    """

    solution: Solution


def refine_run(config: EvaluationConfig, num_trials: int, seed: int = 0) -> Refinement:
    """Search around a solution by measured KL.

    Args:
        config: Run, solution, data and workers.
        num_trials: Allocations to measure at most.
        seed: For drawing among proposals.

    Raises:
        DataError: The data makes fewer than three shards.
        AutoQuantError: One of its subclasses; finished measurements are kept.
    """
    state = RunState.open(RunDirectory(config.run))
    folder = solution_folder(config.solution)
    run = ScoredRun.read(state)
    origin = starting_point(run, folder)
    start = measurable(state, origin)
    with measuring(state, config) as measurement:
        untouched_shards(measurement, folder)
        result = search_allocations(
            measurement.measure,
            measurement.facts["num_shards"],
            start,
            num_trials=num_trials,
            seed=seed,
            estimate=measurement.estimate,
        )
        name = f"{config.solution or 'scan'}-refined"
        figures = _figures(result, measurement)
        manifest = state.directory.read_json(f"{folder}{MANIFEST_JSON}")
        notes = {
            "refinement": figures.to_json(),
            "made_from": made_from("refine", config, trials=num_trials, seed=seed),
            "chosen_on": chosen_also_on(manifest, measurement, num_parts=2),
        }
        solution = write_candidate(run, origin, replace(result.winner, name=name), notes)
        solution = replace(solution, grave=_record(run, measurement, name, result).grave)
    return Refinement(solution=solution, **vars(figures))


def _record(
    run: ScoredRun, measurement: Measurement, name: str, result: SearchResult
) -> Evaluation:
    """Write the evaluation of the refined solution, beside what it was before."""
    candidates = [replace(result.winner, name=SOLUTION), replace(result.start, name="unrefined")]
    measured = [result.after, result.before]
    return record(run, measurement, solution_folder(name), candidates, measured)


def _figures(result: SearchResult, measurement: Measurement) -> Figures:
    def mean(losses: Measured) -> Estimate:
        return mean_kl(losses), paired_difference(losses, None)[1]

    return Figures(
        before=mean(result.before),
        after=mean(result.after),
        difference=paired_difference(result.after, result.before),
        num_trials=result.num_trials,
        num_flips=result.num_flips,
        num_accepted=result.num_accepted,
        data_key=measurement.data_key,
        source=measurement.facts["source"],
    )
