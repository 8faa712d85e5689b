"""What a user is told when no allocation meets the budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoquant_ray.allocate.knapsack.problem import SLACK, Problem
from autoquant_ray.allocate.knapsack.solve import reachable

if TYPE_CHECKING:
    from autoquant_ray.allocate.allocation import Budget

_GIB, _MIB = 2**30, 2**20


def infeasible_text(
    problem: Problem, budgets: Sequence[Budget], max_formats: int | None, free: int | None
) -> str:
    """Say which budget cannot be met, and the range that can be reached.

    Args:
        problem: Scores, costs and limits, one per budget.
        budgets: As the user gave them.
        max_formats: Most distinct formats.
        free: Column of the format that does not count as one.
    """
    formats = "" if max_formats is None else f" with at most {max_formats} formats"
    ranges = reachable(problem, max_formats, free)
    if ranges is None:
        return f"no {max_formats} formats cover every group; allow more formats"
    texts = []
    for budget, (low, high) in zip(budgets, ranges, strict=True):
        text = _range(budget, low + budget.fixed, high + budget.fixed)
        if low > budget.limit * (1 + SLACK):
            return f"{budget.description} cannot be met: reachable is {text}{formats}"
        texts.append(f"{budget.description} (reachable alone: {text})")
    return f"{' and '.join(texts)} cannot be met together{formats}; raise one of them"


def _range(budget: Budget, low: float, high: float) -> str:
    if budget.reachable is not None:
        return budget.reachable(low, high)
    unit = "" if budget.unit_per_bit is None else " average bits"
    return f"{_worded(budget, low)} to {_worded(budget, high)}{unit}"


def _worded(budget: Budget, cost: float) -> str:
    """A cost in average bits, rounded up so that it can be asked for, or in bytes."""
    if budget.unit_per_bit is not None:
        return f"{math.ceil(cost / budget.unit_per_bit * 100 - 1e-6) / 100:.2f}"
    unit, name = (_GIB, "GiB") if cost >= _GIB else (_MIB, "MiB")
    return f"{cost / unit:.2f} {name} ({math.ceil(cost)} bytes)"
