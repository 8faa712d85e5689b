"""Choose one format per group: least summed score within cost budgets.

One budget is solved exactly, in float64 and in milliseconds
(:mod:`autoquant_ray.allocate.knapsack.knapsack`); only among thousands of nearly equal groups does
``optimality_gap`` stay above 0, by parts in a billion. Several budgets, and a limit on the number
of formats, are proven exact where the search stays small; otherwise ``optimality_gap`` says how far
from proven the answer is. The frontier over all budgets comes from one sweep and is not exact
between its points.

This module holds names, checks and error texts; it knows nothing of models, bits or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoquant_ray.allocate.knapsack.choices import AnyChoices, Choices, as_choices
from autoquant_ray.allocate.knapsack.greedy import frontier_points, relax
from autoquant_ray.allocate.knapsack.knapsack import SLACK, Answer, FormatLimit, Knapsack, sweep
from autoquant_ray.allocate.knapsack.solve import reachable, solve_knapsack
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.method_names import without_method


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The summed cost of one resource must not exceed a limit.

    Attributes:
        resource: Key in :attr:`~autoquant_ray.allocate.knapsack.choices.Choice.costs`.
        limit: In the resource's unit. Meeting it exactly counts as met.
        unit_per_bit: Cost of one average bit; error texts then speak of bits. None: of bytes.
        description: How the user wrote it, with the option between back quotes.
        fixed: Cost outside the choices that the user's own number includes; added to the
            reachable range in error texts.
        reachable: Words a reachable range (lowest, highest cost) in the user's unit; None: bits or
            bytes.
        highest: Where the reachable range ends in error texts, as more cannot be asked for.
    """

    resource: str
    limit: float
    unit_per_bit: float | None
    description: str
    fixed: float = 0.0
    reachable: Callable[[float, float], str] | None = None
    highest: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The chosen formats.

    Attributes:
        formats: Group -> format, in the order in which the groups were given.
        score: Summed score, in nats per token.
        costs: Resource -> summed cost, for every resource of the choices.
        optimality_gap: (score - proven lower bound) / score; 0.0 where proven best.
        is_satisfied: Whether all budgets are met.
    """

    formats: dict[str, str]
    score: float
    costs: dict[str, float]
    optimality_gap: float
    is_satisfied: bool


def solve(
    choices: AnyChoices, budgets: Sequence[Budget], *, max_formats: int | None = None
) -> Allocation:
    """Choose one format per group: least summed score within all budgets.

    The same input gives the same output. Of equal scores the cheaper one is chosen.

    Args:
        choices: Every allowed (group, format).
        budgets: Limits, all of which must hold.
        max_formats: Most distinct formats used; ``none`` is not counted, and a format that is
            rounded by several methods is counted once.

    Raises:
        ConfigError: There are no choices, one occurs twice, or a limit is not a number.
        ScoreError: A score or cost is missing, negative or not finite.
        InfeasibleBudgetError: No allocation meets the budgets; the text has the reachable range.
    """
    resources = [budget.resource for budget in budgets]
    return Solver(choices, resources).solve(budgets, max_formats=max_formats)


class Solver:
    """The same choices under any number of budgets.

    Args:
        choices: Every allowed (group, format).
        resources: Of the budgets; every choice needs a cost of each.

    Raises:
        ConfigError: There are no choices, or one occurs twice.
        ScoreError: A score or cost is missing, negative or not finite.
    """

    def __init__(self, choices: AnyChoices, resources: Sequence[str]) -> None:
        self._table = _Table.of(choices, resources)

    def solve(
        self, budgets: Sequence[Budget], *, max_formats: int | None = None, close: float = 0.0
    ) -> Allocation:
        """As :func:`solve`.

        Args:
            budgets: Limits, all of which must hold.
            max_formats: Most distinct formats used, ``none`` not counted.
            close: Relative distance from the proven bound that is good enough.
        """
        if max_formats is not None and max_formats < 0:
            raise ConfigError(f"the number of formats must be 0 or more, not {max_formats}")
        for budget in budgets:
            if math.isnan(budget.limit):
                raise ConfigError(f"{budget.description}: the limit is not a number")
        table = self._table
        knapsack = table.limited([(budget.resource, budget.limit) for budget in budgets])
        limit = format_limit(table.formats, max_formats)
        answer = solve_knapsack(knapsack, limit, close=close)
        if answer is None:
            raise InfeasibleBudgetError(infeasible_text(knapsack, budgets, limit))
        return table.allocation(knapsack, answer)


def frontier(choices: AnyChoices, resource: str) -> list[tuple[float, float]]:
    """Points (summed cost, summed score) of the lower convex hull, cheapest first.

    Each point is the best allocation at its cost. :func:`frontier_allocation` with a point's
    cost as limit returns its allocation.

    Raises:
        ConfigError: There are no choices, or one occurs twice.
        ScoreError: A score or cost is missing, negative or not finite.
    """
    knapsack = _Table.of(choices, [resource]).limited([(resource, math.inf)])
    return frontier_points(knapsack)


def frontier_allocation(choices: AnyChoices, resource: str, limit: float) -> Allocation:
    """The last allocation on the frontier within a limit: fast, and not exact between points.

    Raises:
        ConfigError: There are no choices, or one occurs twice.
        ScoreError: A score or cost is missing, negative or not finite.
        InfeasibleBudgetError: The cheapest allocation exceeds the limit.
    """
    return frontier_allocations(choices, resource, [limit])[0]


def frontier_allocations(
    choices: AnyChoices, resource: str, limits: Sequence[float]
) -> list[Allocation]:
    """:func:`frontier_allocation` for many limits at once, from one sweep.

    Raises:
        As :func:`frontier_allocation`, for the first limit that cannot be met.
    """
    table = _Table.of(choices, [resource])
    steps = sweep(table.everything.scores_GF, table.everything.costs_RGF[0])
    allocations = []
    for limit in limits:
        knapsack = table.limited([(resource, limit)])
        relaxed = relax(knapsack, fill=False, steps=steps)
        if relaxed is None:
            named = f"a limit of {limit} on {resource}"
            budget = Budget(resource=resource, limit=limit, unit_per_bit=None, description=named)
            raise InfeasibleBudgetError(infeasible_text(knapsack, [budget], None))
        allocations.append(table.allocation(knapsack, relaxed.answer))
    return allocations


def format_limit(formats: Sequence[str], most: int | None) -> FormatLimit | None:
    """The limit on the number of formats; None where there is none.

    Args:
        formats: Names of the columns. Those of a format rounded by different methods count once,
            and 16 bits do not count.
        most: Formats used at most.
    """
    if most is None:
        return None
    names = [without_method(name) for name in formats]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names)) if name != NONE}
    return FormatLimit(most=most, number_F=np.array([numbers.get(n, -1) for n in names]))


def without_scores(choices: Choices, budgets: Sequence[Budget]) -> Knapsack:
    """Costs and limits of choices, none of which loses anything: to be solved for other scores.

    Args:
        choices: Every allowed (group, format).
        budgets: Limits, at least one.
    """
    return Knapsack(
        scores_GF=np.where(choices.has_GF, 0.0, np.inf),
        costs_RGF=np.stack([choices.costs[budget.resource] for budget in budgets]),
        limits_R=np.array([float(budget.limit) for budget in budgets]),
    )


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Choices as arrays, with the names of rows, columns and resources."""

    groups: list[str]
    formats: list[str]
    resources: list[str]
    everything: Knapsack

    @classmethod
    def of(cls, choices: AnyChoices, wanted: Sequence[str]) -> _Table:
        """Check the choices and lay them out."""
        table = as_choices(choices)
        if not table.groups:
            raise ConfigError("there are no choices: the search has no group with a format")
        table = table.with_used_formats()
        resources = list(dict.fromkeys((*wanted, *table.costs)))
        table.require_numbers(resources)
        shape = (len(resources), *table.has_GF.shape)
        everything = Knapsack(
            scores_GF=table.scores_GF,
            costs_RGF=np.array([table.costs[name] for name in resources]).reshape(shape),
            limits_R=np.full(len(resources), np.inf),
        )
        return cls(
            groups=list(table.groups),
            formats=list(table.formats),
            resources=resources,
            everything=everything,
        )

    def limited(self, limits: Sequence[tuple[str, float]]) -> Knapsack:
        """The knapsack under (resource, limit) pairs; without any, everything costs nothing."""
        if not limits:
            free_RGF = np.zeros((1, *self.everything.scores_GF.shape))
            return replace(self.everything, costs_RGF=free_RGF, limits_R=np.zeros(1))
        costs_RGF = self.everything.costs_RGF[[self.resources.index(name) for name, _ in limits]]
        # Arithmetic with an infinite limit would give NaN; the dearest allocation is as good.
        limits_R = np.minimum([float(limit) for _, limit in limits], costs_RGF.max(2).sum(1))
        return replace(self.everything, costs_RGF=costs_RGF, limits_R=limits_R)

    def allocation(self, knapsack: Knapsack, answer: Answer) -> Allocation:
        """Names and exact sums of an answer."""
        chosen = [self.formats[column] for column in answer.columns_G]
        costs = self.everything.costs(answer.columns_G)
        return Allocation(
            formats=dict(zip(self.groups, chosen, strict=True)),
            score=knapsack.score(answer.columns_G),
            costs=dict(zip(self.resources, costs, strict=True)),
            optimality_gap=answer.gap,
            is_satisfied=knapsack.is_within(answer.columns_G),
        )


_GIB, _MIB = 2**30, 2**20


def infeasible_text(
    knapsack: Knapsack, budgets: Sequence[Budget], limit: FormatLimit | None
) -> str:
    """Say which budget cannot be met, and the range that can be reached.

    Args:
        knapsack: Scores, costs and limits, one per budget.
        budgets: As the user gave them.
        limit: How many formats may be used; None: any number.
    """
    most, formats = "", ""
    if limit is not None:
        most, formats = str(limit.most), f" with at most {limit.most} formats"
    ranges = reachable(knapsack, limit)
    if ranges is None:
        return f"no {most} formats cover every group; allow more formats"
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
    high = max(low, min(high, budget.highest))
    beyond = "" if low <= budget.highest else ", more than can be asked for: give `bytes`"
    return f"{_worded(budget, low)} to {_worded(budget, high)}{unit}{beyond}"


def _worded(budget: Budget, cost: float) -> str:
    """A cost in average bits, rounded up so that it can be asked for, or in bytes."""
    if budget.unit_per_bit is not None:
        return f"{math.ceil(cost / budget.unit_per_bit * 100 - 1e-6) / 100:.2f}"
    unit, name = (_GIB, "GiB") if cost >= _GIB else (_MIB, "MiB")
    return f"{cost / unit:.2f} {name} ({math.ceil(cost)} bytes)"
