"""Groups that must share a format: solved as one, told apart again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoquant_ray.allocate.allocation import Allocation, Budget, solve
from autoquant_ray.allocate.knapsack.choices import AnyChoices, Choices, as_choices
from autoquant_ray.arrays import Floats, Mask
from autoquant_ray.serving.menus import NotServedError
from autoquant_ray.wording import few

Ties = Sequence[Sequence[str]]
"""Sets of groups that share a format; no group is in two of them."""


def solve_tied(
    choices: AnyChoices,
    budgets: Sequence[Budget],
    ties: Ties,
    *,
    max_formats: int | None = None,
) -> Allocation:
    """Choose one format per group, the same one for all groups of a tie.

    Args:
        choices: Every allowed (group, format).
        budgets: Limits, all of which must hold.
        ties: Groups that share a format.
        max_formats: Most distinct formats used, ``none`` not counted.

    Raises:
        NotServedError: The groups of a tie have no format in common.
        ConfigError, ScoreError, InfeasibleBudgetError: As
            :func:`~autoquant_ray.allocate.allocation.solve`.
    """
    if not ties:
        return solve(choices, budgets, max_formats=max_formats)
    table = as_choices(choices)
    allocation = solve(merged(table, ties), budgets, max_formats=max_formats)
    return replace(allocation, formats=spread(allocation.formats, table.groups, ties))


def spread(formats: Mapping[str, str], groups: Iterable[str], ties: Ties) -> dict[str, str]:
    """Formats of all groups from those of each tie's first group.

    Args:
        formats: Group -> format, the groups of a tie after its first one left out.
        groups: All groups, in the order of the result; may repeat.
        ties: Groups that share a format.
    """
    first = {group: tie[0] for tie in ties for group in tie}
    return {group: formats[first.get(group, group)] for group in groups}


def merged(choices: AnyChoices, ties: Ties) -> Choices:
    """One choice per tie and common format, with the sums of its groups.

    Raises:
        NotServedError: The groups of a tie have no format in common.
    """
    table = as_choices(choices)
    rows = {group: row for row, group in enumerate(table.groups)}
    has_GF, scores_GF = table.has_GF.copy(), table.scores_GF.copy()
    costs = {resource: cost_GF.copy() for resource, cost_GF in table.costs.items()}
    is_first_G = np.ones(len(rows), dtype=np.bool_)
    for tie in ties:
        members = [rows[group] for group in tie]
        first = members[0]
        common_F: Mask = np.logical_and.reduce(table.has_GF[members])
        if not common_F.any():
            raise NotServedError(
                f"{few(tie, 5)} must share a format, and the pinned and allowed formats leave none "
                "in common; allow one of their formats"
            )
        is_first_G[members[1:]] = False
        has_GF[first] = common_F
        scores_GF[first] = np.where(common_F, _sums(table.scores_GF[members], common_F), np.inf)
        for resource, cost_GF in table.costs.items():
            costs[resource][first] = _sums(cost_GF[members], common_F)
    return Choices(
        groups=[g for g, is_first in zip(table.groups, is_first_G, strict=True) if is_first],
        formats=table.formats,
        has_GF=has_GF[is_first_G],
        scores_GF=scores_GF[is_first_G],
        costs={resource: cost_GF[is_first_G] for resource, cost_GF in costs.items()},
    )


def _sums(values_MF: Floats, common_F: Mask) -> Floats:
    """Exact sums over the members of a tie; 0 where they have no format in common."""
    columns = zip(values_MF.T.tolist(), common_F.tolist(), strict=True)
    return np.array([math.fsum(column) if is_common else 0.0 for column, is_common in columns])
