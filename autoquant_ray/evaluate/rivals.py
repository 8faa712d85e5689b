"""Allocations to measure: a run's solution and its rivals under the same budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from autoquant_ray.allocate.candidate import AT_SIZE_OF, SOLUTION, Candidate, make_candidate
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.kv_caches import shuffled_order
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun, solution_formats, solution_options
from autoquant_ray.allocate.search import search, served_problems
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError, one_line
from autoquant_ray.evaluate.measurable import measurable_problem, require_measurable
from autoquant_ray.formats.format import NONE

logger = logging.getLogger(__name__)

MODELOPT_SHAPLEY = "modelopt-shapley"
KINDS = ("uniform", "modelopt", MODELOPT_SHAPLEY, "random")
NUM_RANDOM = 20


def collect_candidates(
    run: ScoredRun,
    folder: str,
    against: Sequence[str],
    *,
    num_random: int = NUM_RANDOM,
    shapley: Scores | None = None,
) -> list[Candidate]:
    """A solution and its rivals.

    Args:
        run: A finished run.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.
        against: Members of ``KINDS``, other solutions of the run, or files of other tools
            (:mod:`autoquant_ray.imports.tool_files`); beside a file, what the run's scores choose
            at its size, under the solution's other constraints. ``uniform``: every format of the
            menu that fits the budget when all groups take it (a group that lacks it takes the same
            format by another method, or else stays in 16 bits, and so does a tied head).
            ``modelopt``: solved with the scores that ModelOpt would compute from this run's sums:
            per batch, clamped along its sorted formats. ``modelopt-shapley``: solved with the
            scores that it computes itself (:mod:`autoquant_ray.evaluate.shapley`). ``random``:
            solved with scores shuffled among the groups, the null hypothesis.
        num_random: Number of shuffles.
        shapley: Scores for ``modelopt-shapley``; None: that rival is not made yet.

    Raises:
        ConfigError: An unknown kind.
        DataError: A file is not an allocation of this model.
        StoreError: The solution does not exist, or a format of it cannot be measured.
    """
    from autoquant_ray.imports.tool_allocations import rival_allocations

    state, scores = run.state, run.scores
    options = solution_options(state, folder)
    problem = run.problem.timed(options.latency)
    chosen = solution_formats(state, folder, problem)
    candidates = [make_candidate(problem, scores, SOLUTION, chosen)]
    others = [name for name in against if name not in KINDS]
    rivals = rival_allocations(state, others, problem, options)
    candidates += [make_candidate(problem, scores, n, formats) for n, formats in rivals.items()]
    require_measurable(state, candidates)
    problem, options = measurable_problem(state, problem, options)
    for rival in [candidate for candidate in candidates if candidate.name.startswith("file ")]:
        candidates += _at_size_of(problem, scores, options, rival)
    if "uniform" in against:
        candidates += _uniform(problem, scores, options, chosen)
    if "modelopt" in against:
        formats = _solve(problem, run.modelopt_scores, options)
        candidates.append(make_candidate(problem, scores, "modelopt", formats))
    if MODELOPT_SHAPLEY in against and shapley is not None:
        formats = _solve(problem, shapley, options)
        candidates.append(make_candidate(problem, scores, MODELOPT_SHAPLEY, formats))
    if "random" in against:
        candidates += _random(problem, scores, options, num_random)
    return candidates


def shuffle_scores(problem: Problem, scores: Scores, seed: int) -> dict[tuple[str, str], float]:
    """Give each group the scores of another: formats differ as before, but in other places.

    A format that the other group lacks gets that group's largest score.
    """
    groups = problem.searched
    order = shuffled_order(groups, np.random.default_rng([seed, len(groups)]))
    shuffled = {}
    for group, index in zip(groups, order, strict=True):
        other = groups[index]
        largest = max(scores[other.name, f] for f in other.rows if f != NONE)
        for format_ in group.rows:
            if format_ != NONE:
                score = scores.get((other.name, format_), largest)
                shuffled[group.name, format_] = score
    return shuffled


def _at_size_of(
    problem: Problem, scores: Scores, options: SolveOptions, rival: Candidate
) -> list[Candidate]:
    """What the scores choose at a rival's bytes, its KV cache as in the rival; none if nothing
    under the constraints is that small."""
    changes = {"bits": None, "bytes": math.floor(rival.weight_bytes), "kv_bytes_per_token": None}
    try:
        held = problem.with_held_caches(rival.formats)
        formats = _solve(held, scores, options.replaced(**changes, latency=None))
    except (ConfigError, InfeasibleBudgetError) as error:
        logger.warning("nothing is measured at the size of %s: %s", rival.name, one_line(error))
        return []
    return [make_candidate(problem, scores, f"{AT_SIZE_OF}{rival.name}", formats)]


def _solve(problem: Problem, scores: Scores, options: SolveOptions) -> dict[str, str]:
    return search(problem, scores, options).formats


def _random(
    problem: Problem, scores: Scores, options: SolveOptions, num_random: int
) -> list[Candidate]:
    candidates = []
    for number in range(num_random):
        formats = _solve(problem, shuffle_scores(problem, scores, number), options)
        candidates.append(make_candidate(problem, scores, f"random {number + 1}", formats))
    return candidates


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
    """A format in every group that has it; None where the engine would not serve that."""
    every = {group.name: group.rows for group in problem.searched}
    for served in served_problems(problem, options):
        permitted = served.served.permitted if served.served else every
        formats = {
            g.name: g.uniform(name, [f for f in g.rows if f in permitted[g.name]])
            for g in problem.searched
            if not g.is_cache
        }
        formats |= {g.name: next(iter(g.rows)) for g in problem.searched if g.is_cache}
        if served.served is None:
            return formats
        if name in served.served.menu and served.served.permits(formats):
            return formats
    return None
