"""Allocations to measure: a run's solution, and what it is compared with under the same budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoquant_ray.allocation import Allocation
from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.errors import StoreError
from autoquant_ray.formats import NONE
from autoquant_ray.kv_budget import shuffled_order
from autoquant_ray.latency_target import Latency
from autoquant_ray.manifest import allocation_key, average_bits, model_bytes, predicted_loss
from autoquant_ray.served_search import search, served_problems
from autoquant_ray.solve import load_problem
from autoquant_ray.state import RunState

logger = logging.getLogger(__name__)

KINDS = ("uniform", "modelopt", "random")
NUM_RANDOM = 20
SOLUTION = "solution"

Scores = Mapping[tuple[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An allocation with a name.

    Attributes:
        name: ``solution``, ``uniform FORMAT``, ``modelopt``, ``random NUMBER``, ``solution NAME``
            or ``file NAME``.
        formats: Searched group -> format.
        predicted_kl: Summed score in nats per token.
        weight_bytes: Of the whole model.
        effective_bits: Average stored bits over the searched groups.
    """

    name: str
    formats: dict[str, str]
    predicted_kl: float
    weight_bytes: float
    effective_bits: float

    @property
    def key(self) -> str:
        """Digest of the formats: equal allocations are measured once."""
        return allocation_key(self.formats)


def collect_candidates(
    state: RunState, start: str, against: Sequence[str], *, num_random: int = NUM_RANDOM
) -> list[Candidate]:
    """A solution and its rivals.

    Args:
        state: A finished run.
        start: Folder of the solution with a trailing slash, or '' for the scan's own.
        against: Of ``KINDS``, other solutions of the run, or files of AutoRound and mlx-lm
            (:mod:`autoquant_ray.foreign_plans`). ``uniform``: every format of the menu that fits
            the budget when all groups take it (a group that lacks it stays in 16 bits).
            ``modelopt``: solved with the scores as ModelOpt makes them of this run's sums: per
            batch, clamped along its sorted formats. ``random``: solved with the groups' scores
            shuffled, the null.
        num_random: Number of shuffles.

    Raises:
        ConfigError: An unknown kind.
        DataError: A file is not an allocation of this model.
        StoreError: The solution does not exist.
    """
    from autoquant_ray.foreign_plans import rival_plan

    problem, scores = load_problem(state)
    options = solution_options(state, start)
    problem = problem.timed(options.latency)
    chosen = solution_formats(state, start, problem)
    found = [make_candidate(problem, scores, SOLUTION, chosen)]
    rivals = [rival_plan(state, n, problem, options) for n in against if n not in KINDS]
    found += [make_candidate(problem, scores, name, formats) for name, formats in rivals]
    if "uniform" in against:
        found += _uniform(problem, scores, options, chosen)
    if "modelopt" in against:
        theirs = _modelopt_scores(state)
        found.append(make_candidate(problem, scores, "modelopt", _solve(problem, theirs, options)))
    if "random" in against:
        for number in range(num_random):
            shuffled = shuffle_scores(problem, scores, number)
            formats = _solve(problem, shuffled, options)
            found.append(make_candidate(problem, scores, f"random {number + 1}", formats))
    return found


def make_candidate(
    problem: Problem, scores: Scores, name: str, formats: Mapping[str, str]
) -> Candidate:
    """Name an allocation and state what it costs and is predicted to lose.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> nats per token.
        name: Its name.
        formats: Searched group -> format.
    """
    return Candidate(
        name=name,
        formats=dict(formats),
        predicted_kl=predicted_loss(scores, formats),
        weight_bytes=model_bytes(problem, formats),
        effective_bits=average_bits(problem.searched, formats),
    )


def without_domains(options: SolveOptions) -> SolveOptions:
    """What is measured is the loss on all of the data; domains have no say in that."""
    if options.domains or options.worst_domain:
        logger.warning(
            "measurements lower the KL of the data as a whole, not by the domains that the "
            "solution was solved for; the new plan may give some of their gain back"
        )
    return replace(options, domains={}, worst_domain=False)


def as_allocation(
    problem: Problem, scores: Scores, options: SolveOptions, plan: Candidate
) -> Allocation:
    """A plan that measurement chose, as an allocation; its gap is that of its predicted loss."""
    best = search(problem, scores, options)
    predicted = plan.predicted_kl
    gap = max(0.0, predicted - best.score) / predicted if predicted else 0.0
    return replace(best, formats=plan.formats, score=predicted, optimality_gap=gap)


def solution_formats(state: RunState, start: str, problem: Problem) -> dict[str, str]:
    """Searched group -> format of a solution."""
    rows = state.directory.read_table(f"{start}manifest.parquet", "manifest").to_pylist()
    chosen = {row["group"]: row["format"] for row in rows}
    return {group.name: chosen[group.name] for group in problem.searched}


def solution_options(state: RunState, start: str) -> SolveOptions:
    """Budget and constraints that a solution was solved for.

    Raises:
        StoreError: There is no such solution.
    """
    if not state.directory.exists(f"{start}manifest.json"):
        names = ", ".join(state.directory.list_folders("solutions")) or "none"
        raise StoreError(
            f"{state.directory.path(start)} is not a solution; solutions of the run: {names}"
        )
    budget = state.directory.read_json(f"{start}manifest.json")["budget"]
    return SolveOptions(**budget | {"latency": Latency.from_json(budget.get("latency"))})


def shuffle_scores(problem: Problem, scores: Scores, seed: int) -> dict[tuple[str, str], float]:
    """Give each group the scores of another one: keeps how much formats differ, forgets where.

    A format that the other group lacks takes its largest score.
    """
    groups = problem.searched
    order = shuffled_order(groups, np.random.default_rng([seed, len(groups)]))
    scores_there = {}
    for group, index in zip(groups, order, strict=True):
        other = groups[index]
        known = [scores[other.name, f] for f in other.rows if f != NONE]
        for format_ in group.rows:
            if format_ != NONE:
                found = scores.get((other.name, format_), max(known))
                scores_there[group.name, format_] = found
    return scores_there


def _solve(problem: Problem, scores: Scores, options: SolveOptions) -> dict[str, str]:
    return search(problem, scores, options).formats


def _uniform(
    problem: Problem, scores: Scores, options: SolveOptions, chosen: Mapping[str, str]
) -> list[Candidate]:
    budgets = problem.budgets(options)
    weights = [group for group in problem.searched if not group.is_cache]
    names = dict.fromkeys(f for group in weights for f in group.rows if f != NONE)
    fitting = []
    for name in names:
        formats = _everywhere(problem.with_held_caches(chosen), options, name)
        if formats is None:
            continue
        costs = {
            budget.resource: math.fsum(
                group.cost(formats[group.name], budget.resource) for group in problem.searched
            )
            for budget in budgets
        }
        if all(costs[budget.resource] <= budget.limit * (1 + 1e-12) for budget in budgets):
            fitting.append(make_candidate(problem, scores, f"uniform {name}", formats))
    return fitting


def _everywhere(problem: Problem, options: SolveOptions, name: str) -> dict[str, str] | None:
    """The plan with a format wherever it can be; None where the engine would not serve that."""
    for one in served_problems(problem, options):
        permitted = None if one.served is None else one.served.permitted
        formats = {
            g.name: name if name in (g.rows if permitted is None else permitted[g.name]) else NONE
            for g in problem.searched
            if not g.is_cache
        }
        formats |= {g.name: next(iter(g.rows)) for g in problem.searched if g.is_cache}
        if one.served is None:
            return formats
        if name in one.served.menu and one.served.permits(formats):
            return formats
    return None


def _modelopt_scores(state: RunState) -> dict[tuple[str, str], float]:
    """ModelOpt's scores: each at most that of the coarser format before it in ModelOpt's order."""
    compressions = {
        entry["name"]: entry["modelopt_compression"]
        for entry in state.values["plan"]["formats"]
        if entry.get("weight")
    }
    table = state.directory.read_table("sensitivity.parquet", "sensitivity")
    rows = table.select(["group", "format", "modelopt_score"]).to_pylist()
    scores: dict[tuple[str, str], float] = {}
    lowest: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: compressions.get(row["format"], 1.0)):
        group = row["group"]
        if row["format"] not in compressions:  # ModelOpt does not search caches
            scores[group, row["format"]] = row["modelopt_score"]
            continue
        lowest[group] = min(row["modelopt_score"], lowest.get(group, math.inf))
        scores[group, row["format"]] = lowest[group]
    return scores
