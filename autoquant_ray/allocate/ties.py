"""Groups that must share a format: solved as one, told apart again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoquant_ray.allocate.allocation import Allocation, Budget, solve
from autoquant_ray.allocate.knapsack.choices import AnyChoices, Choices, as_choices
from autoquant_ray.formats.method_names import without_method
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
    """Choose one format per group, the same one for all groups of a tie but for its rounding.

    Args:
        choices: Every allowed (group, format).
        budgets: Limits, all of which must hold.
        ties: Groups that share a format.
        max_formats: As of :func:`~autoquant_ray.allocate.allocation.solve`.

    Raises:
        NotServedError: The groups of a tie have no format in common.
        ConfigError, ScoreError, InfeasibleBudgetError: As
            :func:`~autoquant_ray.allocate.allocation.solve`.
    """
    if not ties:
        return solve(choices, budgets, max_formats=max_formats)
    tied = TiedChoices(choices, ties)
    allocation = solve(tied.choices, budgets, max_formats=max_formats)
    return replace(allocation, formats=tied.spread(allocation.formats))


class TiedChoices:
    """Choices in which groups that share a format are one.

    The groups may round what they share by different methods, which cost the same: each takes the
    one that it loses least by.

    Args:
        choices: Every allowed (group, format).
        ties: Groups that share a format.

    Attributes:
        choices: A row per tie, named as its first group, with the sums of its groups; the other
            groups as they are. A format of a tie is named as its first group rounds it.

    Raises:
        NotServedError: The groups of a tie have no format in common.
    """

    def __init__(self, choices: AnyChoices, ties: Ties) -> None:
        table = as_choices(choices)
        self._table, self._ties = table, ties
        self._taken: dict[tuple[str, str], list[str]] = {}
        self._columns: dict[str, list[int]] = {}
        for column, name in enumerate(table.formats):
            self._columns.setdefault(without_method(name), []).append(column)
        self._rows = {group: row for row, group in enumerate(table.groups)}
        has_GF, scores_GF = table.has_GF.copy(), table.scores_GF.copy()
        costs = {resource: cost_GF.copy() for resource, cost_GF in table.costs.items()}
        is_first_G = np.ones(len(self._rows), dtype=np.bool_)
        for tie in ties:
            members = [self._rows[group] for group in tie]
            first, is_first_G[members[1:]] = members[0], False
            shared = self._shared(members)
            if not shared:
                raise NotServedError(
                    f"{few(tie, 5)} must share a format, and the pinned and allowed formats leave "
                    "none in common; allow one of their formats"
                )
            has_GF[first] = False
            for columns_M in shared:
                column = columns_M[0]
                has_GF[first, column] = True
                scores_GF[first, column] = math.fsum(table.scores_GF[members, columns_M].tolist())
                for resource, cost_GF in table.costs.items():
                    costs[resource][first, column] = math.fsum(cost_GF[members, columns_M].tolist())
                names = [table.formats[column] for column in columns_M]
                self._taken[tie[0], names[0]] = names
            scores_GF[first, ~has_GF[first]] = np.inf
            for cost_GF in costs.values():
                cost_GF[first, ~has_GF[first]] = 0.0
        self.choices = Choices(
            groups=[g for g, is_first in zip(table.groups, is_first_G, strict=True) if is_first],
            formats=table.formats,
            has_GF=has_GF[is_first_G],
            scores_GF=scores_GF[is_first_G],
            costs={resource: cost_GF[is_first_G] for resource, cost_GF in costs.items()},
        )

    def _shared(self, members: Sequence[int]) -> list[list[int]]:
        """Formats that all of some rows have: the column of each row's best method."""
        has_MF, scores_MF = self._table.has_GF[members], self._table.scores_GF[members]
        shared = []
        for columns in self._columns.values():
            has_MC = has_MF[:, columns]
            if has_MC.any(axis=1).all():
                best_M = np.where(has_MC, scores_MF[:, columns], np.inf).argmin(axis=1)
                shared.append([columns[best] for best in best_M.tolist()])
        return shared

    def spread(self, formats: Mapping[str, str]) -> dict[str, str]:
        """Formats of all groups, in their order, from those of an allocation of ``choices``."""
        spread = dict(formats)
        for tie in self._ties:
            spread.update(zip(tie, self._taken[tie[0], formats[tie[0]]], strict=True))
        return {group: spread[group] for group in self._table.groups}
