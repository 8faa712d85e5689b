"""The search of a budget under what an engine serves: each of its menus, the best of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.expert_clusters import require_apart
from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.group_names import refuse_parts
from autoquant_ray.allocate.knapsack.choices import Choices, restrict
from autoquant_ray.allocate.kv_caches import require_cache_limit
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.ties import Ties, solve_tied
from autoquant_ray.errors import AutoQuantError, InfeasibleBudgetError
from autoquant_ray.serving.kv_cache import cache_problem, with_caches
from autoquant_ray.serving.menus import (
    NotServedError,
    Served,
    formats_of,
    joined,
    require_served,
    served_sets,
)


def search(problem: Problem, scores: Scores | None, options: SolveOptions) -> Allocation:
    """Choose a format for every searched group.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> score in nats per token; None: nothing loses anything.
        options: Budget and constraints.

    Raises:
        InfeasibleBudgetError: With the reachable range.
        ConfigError: A pin or an allow pattern names something that does not exist, or the engine
            serves nothing of what is left.
    """
    require_cache_limit(problem.caches, options.kv_bytes_per_token)
    refuse_parts(options.pins, {g.name: g.module_names for g in problem.groups.values()})

    def solve(variant: Problem) -> Allocation:
        choices, budgets = allowed_choices(variant, scores, options), variant.budgets(options)
        return solve_tied(
            choices, budgets, ties_of(variant, options), max_formats=options.max_formats
        )

    return best_served(problem.timed(options.latency), options, solve)


def check_feasible(problem: Problem, options: SolveOptions) -> None:
    """Raise now, before any scoring, what :func:`search` would raise later."""
    search(problem, None, options)


def best_served(
    problem: Problem, options: SolveOptions, solve: Callable[[Problem], Allocation]
) -> Allocation:
    """The best allocation over everything that the engine serves together.

    Args:
        problem: Groups with their costs.
        options: Budget, constraints, engine.
        solve: Finds the best allocation of a problem under one menu.
    """
    allocations: list[Allocation] = []
    refused: list[tuple[int, AutoQuantError]] = []  # with the number of formats
    for variant in served_problems(problem, options):
        try:
            allocations.append(solve(variant))
        except NotServedError as error:
            refused.append((0, error))
        except InfeasibleBudgetError as error:
            if variant.served is None:
                raise
            menu = variant.served.menu
            text = f"{error}; formats that {variant.served.target} serves together: "
            refused.append((len(menu), InfeasibleBudgetError(text + ", ".join(menu))))
    if not allocations:
        raise max(refused, key=lambda pair: pair[0])[1]  # most formats reach furthest
    return min(allocations, key=lambda allocation: allocation.score)


def served_problems(problem: Problem, options: SolveOptions) -> list[Problem]:
    """The problem once per set of formats that the engine serves together; itself without one.

    Raises:
        ConfigError: The engine serves nothing of the menu, or the run does not tell what it is.
    """
    if options.engine is None or problem.served is not None:
        return [problem]
    groups = _weights(problem)
    caches = {group.name: group.rows for group in problem.caches if group.is_searched}
    is_whole = len(caches) == len(problem.caches)
    searched = [group.name for group in problem.searched if not group.is_cache]
    modules = problem.summary["modules"]
    shared = {module for module, entry in modules.items() if "shared_with" in entry}
    sets = served_sets(
        groups,
        searched,
        formats_of(problem.summary),
        options.engine,
        options.gpu,
        {module: entry["shapes"] for module, entry in modules.items() if "shapes" in entry},
        problem.summary.get("checkpoint_limits"),
        [name for name, names in groups.items() if shared.intersection(names)],
    )
    return [
        replace(
            problem,
            served=with_caches(
                served, caches, is_whole=is_whole, engine=options.engine, gpu=options.gpu
            ),
        )
        for served in sets
    ]


def served_problem(problem: Problem, options: SolveOptions, formats: Mapping[str, str]) -> Problem:
    """The problem restricted as an allocation is that the engine serves.

    Args:
        problem: Groups with their costs.
        options: Budget, constraints, engine.
        formats: The allocation: searched group -> format; others may be there in 16 bits.

    Raises:
        NotServedError: The engine cannot serve the allocation; names groups and reasons.
    """
    if options.engine is None:
        return problem
    searched_formats = {group.name: formats[group.name] for group in problem.searched}
    reason = cache_problem(
        [group.name for group in problem.caches], searched_formats, options.engine, options.gpu
    )
    if reason is not None:
        raise NotServedError(f"{options.engine} cannot serve this allocation: {reason}")
    groups = _weights(problem)
    weights = {name: chosen for name, chosen in searched_formats.items() if name in groups}
    require_served(groups, weights, formats_of(problem.summary), options.engine, options.gpu)
    for variant in served_problems(problem, options):
        if variant.served is not None and variant.served.permits(searched_formats):
            return variant
    raise NotServedError(
        f"the allocation uses formats that {options.engine} does not serve together"
    )


def _weights(problem: Problem) -> dict[str, list[str]]:
    """Groups of weights -> their modules."""
    return {name: g.module_names for name, g in problem.groups.items() if not g.is_cache}


def allowed_choices(problem: Problem, scores: Scores | None, options: SolveOptions) -> Choices:
    """The choices that pins, allowed formats, the limit of a group's loss and the engine leave.

    Raises:
        ConfigError: A constraint names something that does not exist, or nothing is left.
        InfeasibleBudgetError: A group loses more than the limit in every format that it may take.
    """
    choices = restrict(problem.choices(scores), options.pins, options.allow)
    if options.max_group_kl is not None:
        choices = _within_loss(choices, options.max_group_kl)
    if problem.served is None:
        return choices
    return _served_choices(choices, problem.served)


def _served_choices(choices: Choices, served: Served) -> Choices:
    menus = {names: np.isin(choices.formats, list(names)) for names in {*served.permitted.values()}}
    kept = choices.keep(np.stack([menus[served.permitted[group]] for group in choices.groups]))
    row = choices.first_left_out(kept)
    if row is None:
        return kept
    group = choices.groups[row]
    raise NotServedError(
        f"group {group!r} is to take {', '.join(choices.formats_of(row))}, and {served.target} "
        f"serves there {', '.join(sorted(served.permitted[group]))}; see docs/engines.md"
    )


def _within_loss(choices: Choices, limit: float) -> Choices:
    kept = choices.keep(choices.scores_GF <= limit)
    row = choices.first_left_out(kept)
    if row is None:
        return kept
    raise InfeasibleBudgetError(
        f"`max_group_kl` {limit:g} cannot be met: group {choices.groups[row]!r} loses at least "
        f"{choices.scores_GF[row].min():g} in the formats that it may take"
    )


def ties_of(problem: Problem, options: SolveOptions) -> Ties:
    """Groups that must share a format, for the engine or as experts of a cluster.

    Raises:
        ConfigError: Single experts are asked for, and the run has no scores of them.
    """
    require_apart(problem.summary.get("experts", ()), options.expert_groups)
    experts = [] if problem.experts is None else problem.experts.ties(options.expert_groups)
    served = () if problem.served is None else problem.served.ties
    if not (experts and served):
        return experts or served
    return joined([*experts, *served], [group.name for group in problem.searched])
