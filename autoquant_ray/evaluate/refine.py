"""The story of a refinement: search around a solution by measured KL, where prediction ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autoquant_ray.allocate.candidate import SOLUTION, as_allocation, without_domains
from autoquant_ray.allocate.read import load_problem, solution_formats, solution_options
from autoquant_ray.allocate.search import served_problem
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.chosen_on import chosen_also_on, made_from, untouched_shards
from autoquant_ray.evaluate.evaluate import record
from autoquant_ray.evaluate.measurement import Measurement, measuring
from autoquant_ray.evaluate.plan_search import Found, search_plans
from autoquant_ray.evaluate.table import mean_kl, paired_difference
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import solution_folder
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import Solution, write_solution

Estimate = tuple[float, float | None]
"""Mean in nats per token, and its standard error."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a refinement found; measured on data that played no part in the search.

    Attributes:
        before: Mean measured KL of the start.
        after: The same of the winner.
        difference: Winner minus start, paired by sample.
        num_trials: Plans tried.
        num_flips: Those of them that scored the start's neighbours again.
        num_accepted: Changes taken.
        data_key: Data on which plans were tried, so that it is never measured on as unseen.
        source: Identity of that data, however it is cut.
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
    """A refinement.

    Attributes:
        solution: The winner, written beside the solution that it came from.
    """

    solution: Solution


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
    start = solution_folder(config.solution)
    problem, scores = load_problem(state)
    options = without_domains(solution_options(state, start))
    problem = problem.timed(options.latency)
    formats = solution_formats(state, start, problem)
    problem = served_problem(problem, options, formats)
    with measuring(state, config) as measurement:
        untouched_shards(measurement, start)
        found = search_plans(
            measurement.measure,
            measurement.facts["num_shards"],
            problem,
            scores,
            options,
            formats,
            num_trials=num_trials,
            seed=seed,
        )
        name = f"{config.solution or 'scan'}-refined"
        allocation = as_allocation(problem, scores, options, found.winner)
        figures = _figures(found, measurement)
        notes = {
            "refinement": figures.to_json(),
            "made_from": made_from("refine", config, trials=num_trials, seed=seed),
            "chosen_on": chosen_also_on(
                state.directory.read_json(f"{start}manifest.json"), measurement, num_parts=2
            ),
        }
        solution = write_solution(state, problem, scores, options, allocation, name, notes)
        plans = [replace(found.winner, name=SOLUTION), replace(found.start, name="unrefined")]
        record(measurement, solution_folder(name), plans, [found.after, found.before])
    return Refinement(solution=solution, **vars(figures))


def _figures(found: Found, measurement: Measurement) -> Figures:
    def mean(one: Any) -> Estimate:
        return mean_kl(one), paired_difference(one, None)[1]

    return Figures(
        before=mean(found.before),
        after=mean(found.after),
        difference=paired_difference(found.after, found.before),
        num_trials=found.num_trials,
        num_flips=found.num_flips,
        num_accepted=found.num_accepted,
        data_key=measurement.data_key,
        source=measurement.facts["source"],
    )
