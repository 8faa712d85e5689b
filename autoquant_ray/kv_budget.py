"""The limit on the KV cache as a budget: bytes that a token of context takes over all layers.

Weights and caches are separate resources: a cache takes no bytes of the weights' budgets, and what
one leaves the other cannot use. Only the loss is shared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from autoquant_ray.allocation import Budget
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats import NONE
from autoquant_ray.knapsack import Indices
from autoquant_ray.kv_formats import KV_BYTES, KV_OPTION, limit_problem, reachable_cache

if TYPE_CHECKING:
    from autoquant_ray.budget import Problem
    from autoquant_ray.group_choices import GroupChoices


def caches_of(problem: Problem) -> list[GroupChoices]:
    """The groups that are caches."""
    return [group for group in problem.groups.values() if group.is_cache]


def require_cache_limit(problem: Problem, limit: float | None) -> None:
    """Refuse to choose formats of caches without a limit, or to limit what has no choice.

    Raises:
        ConfigError: Names the option and the remedy.
    """
    reason = limit_problem(any(group.is_searched for group in caches_of(problem)), limit)
    if reason is not None:
        raise ConfigError(reason)


def cache_budget(problem: Problem, limit: float | None) -> list[Budget]:
    """The limit on the searched caches; none without one.

    Args:
        problem: Groups with their costs.
        limit: Bytes per token of context of the whole model; caches that are not searched count in
            16 bits.
    """
    if limit is None:
        return []
    fixed = math.fsum(g.cost(NONE, KV_BYTES) for g in caches_of(problem) if not g.is_searched)
    return [
        Budget(
            resource=KV_BYTES,
            limit=limit - fixed,
            unit_per_bit=None,
            description=f"{KV_OPTION} {limit:g}",
            fixed=fixed,
            reachable=reachable_cache,
        )
    ]


def shuffled_order(groups: Sequence[GroupChoices], generator: np.random.Generator) -> Indices:
    """An order of groups that puts weights in the places of weights, caches in those of caches."""
    order = np.arange(len(groups), dtype=np.intp)
    for is_cache in (False, True):
        own = np.flatnonzero([group.is_cache == is_cache for group in groups])
        order[own] = own[generator.permutation(len(own))]
    return order


def held_caches(problem: Problem, formats: Mapping[str, str]) -> Problem:
    """The same problem in which no cache has another choice than a plan's format.

    Args:
        problem: Groups with their costs.
        formats: The plan: group -> format; groups without one stay in 16 bits.
    """
    held = copy(problem)
    held.groups = dict(problem.groups)
    for group in caches_of(problem):
        name = formats.get(group.name, NONE)
        held.groups[group.name] = replace(group, rows={name: group.rows[name]})
    return held


def cache_summary(problem: Problem, formats: Mapping[str, str]) -> dict[str, Any]:
    """What a solution's summary says of the cache: its bytes per token; nothing without caches.

    Args:
        problem: Groups with their costs.
        formats: Group -> format.
    """
    if not caches_of(problem):
        return {}
    total = math.fsum(group.cost(formats[group.name], KV_BYTES) for group in caches_of(problem))
    return {KV_BYTES: total}
