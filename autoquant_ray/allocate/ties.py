"""Groups that must share a format: solved as one, told apart again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from autoquant_ray.allocate.allocation import Allocation, Budget, Choice, solve
from autoquant_ray.serving.menus import NotServedError
from autoquant_ray.wording import few

Ties = Sequence[Sequence[str]]
"""Sets of groups that share a format; no group is in two of them."""


def solve_tied(
    choices: Sequence[Choice],
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
    allocation = solve(merged(choices, ties), budgets, max_formats=max_formats)
    groups = [choice.group for choice in choices]
    return replace(allocation, formats=spread(allocation.formats, groups, ties))


def spread(formats: Mapping[str, str], groups: Iterable[str], ties: Ties) -> dict[str, str]:
    """Formats of all groups from those of each tie's first group.

    Args:
        formats: Group -> format, the groups of a tie after its first one left out.
        groups: All groups, in the order of the result; may repeat.
        ties: Groups that share a format.
    """
    first = {group: tie[0] for tie in ties for group in tie}
    return {group: formats[first.get(group, group)] for group in groups}


def merged(choices: Sequence[Choice], ties: Ties) -> list[Choice]:
    """One choice per tie and common format, with the sums of its groups.

    Raises:
        NotServedError: The groups of a tie have no format in common.
    """
    table = {(choice.group, choice.format): choice for choice in choices}
    of_group: dict[str, list[str]] = {}
    for choice in choices:
        of_group.setdefault(choice.group, []).append(choice.format)
    members = {tie[0]: tuple(tie) for tie in ties}
    behind = {group for tie in ties for group in tie[1:]}
    together = []
    for group, names in of_group.items():
        if group in behind:
            continue
        tie = members.get(group, (group,))
        common = [name for name in names if all((other, name) in table for other in tie)]
        if not common:
            raise NotServedError(
                f"{few(tie, 5)} must share a format, and the pinned and allowed formats leave none "
                "in common; allow one of their formats"
            )
        for name in common:
            parts = [table[other, name] for other in tie]
            together.append(
                replace(
                    parts[0],
                    score=math.fsum(part.score for part in parts),
                    costs={
                        resource: math.fsum(part.costs[resource] for part in parts)
                        for resource in parts[0].costs
                    },
                )
            )
    return together
