"""Predicted KL along all sizes, from one sweep: milliseconds, nothing read, nothing written.

Between the steps of the sweep an allocation is not the best one for its size, only close to it;
:mod:`autoquant_ray.allocate.frontier` solves its budgets exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from autoquant_ray.allocate.allocation import Solver, frontier_allocations
from autoquant_ray.allocate.group_choices import GroupChoices, Scores
from autoquant_ray.allocate.kv_caches import require_cache_limit
from autoquant_ray.allocate.losses import predicted_loss, sizes
from autoquant_ray.allocate.options import BITS_PER_BYTE, UNQUANTIZED_BITS, SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import allowed_choices, ties_of
from autoquant_ray.allocate.ties import TiedChoices, Ties
from autoquant_ray.arrays import Floats
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.notebook import table_html
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import brief_lease
from autoquant_ray.runs.names import FRONTIER_FILE
from autoquant_ray.runs.state import RunState

NUM_POINTS, MOST_POINTS = 64, 10_000
"""Of a frontier, each of them solved: usually, and at most."""
Loss = Callable[[Mapping[str, str]], float]
"""Of searched group -> format, in nats per token."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget.

    Attributes:
        effective_bits: Stored bits per weight of the searched groups.
        weight_bytes: Of the whole model.
        predicted_kl: In nats per token.
        is_knee: Beyond it bytes buy less.
    """

    effective_bits: float
    weight_bytes: float
    predicted_kl: float
    is_knee: bool = False


class Frontier(list[Point]):
    """The points of a frontier in order of size; a notebook shows them as a table."""

    def __repr__(self) -> str:
        if not self:
            return "Frontier(no points)"
        ends = f"{self[0].effective_bits:.2f} to {self[-1].effective_bits:.2f} bits"
        return f"Frontier({len(self)} points, {ends})"

    def _repr_html_(self) -> str:
        return table_html(
            ("Bits", "Size of the model", "Predicted KL", ""),
            (
                (
                    f"{point.effective_bits:.3f}",
                    f"{point.weight_bytes / 2**20:,.1f} MiB",
                    f"{point.predicted_kl:.4g}",
                    "knee" if point.is_knee else "",
                )
                for point in self
            ),
        )


def sweep_points(
    problem: Problem, scores: Scores, ties: Ties = (), num_points: int = NUM_POINTS
) -> list[Point]:
    """Points along the whole reachable range, the knee marked.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> nats per token.
        ties: Groups that share a format, such as the experts of a cluster.
        num_points: Number of budgets, evenly spaced in bits.
    """
    low, high = reachable_bits(problem, ties)
    weights = problem.menus.weights("storage")
    limits = [float(bits) * weights / BITS_PER_BYTE for bits in np.linspace(low, high, num_points)]
    tied = TiedChoices(problem.choices(scores), ties)
    allocations = frontier_allocations(tied.choices, "storage", limits)
    loss = partial(predicted_loss, scores)
    return mark_knee(
        [point_of(problem, loss, tied.spread(allocation.formats)) for allocation in allocations]
    )


def uniform_points(problem: Problem, loss: Loss) -> dict[str, Point]:
    """Format -> what all groups would lose under it.

    A group that lacks it takes the same format by another method, or else stays in 16 bits, and so
    does a tied head; caches keep the first of their formats.
    """
    weights = [group for group in problem.searched if not group.is_cache]
    caches = {g.name: next(iter(g.rows)) for g in problem.searched if g.is_cache}
    names = dict.fromkeys(f for group in weights for f in group.rows if f != NONE)
    alike: dict[tuple[str, ...], list[GroupChoices]] = {}  # most groups have the same menu
    for group in weights:
        alike.setdefault((*group.rows, "tied" if group.is_tied else ""), []).append(group)
    return {
        name: point_of(problem, loss, caches | _uniform(name, alike.values())) for name in names
    }


def _uniform(name: str, alike: Iterable[Sequence[GroupChoices]]) -> dict[str, str]:
    """What groups take where all are to have one format.

    Args:
        name: The format.
        alike: Groups with the same menu together.
    """
    taken = ((groups, groups[0].uniform(name)) for groups in alike)
    return {group.name: format_ for groups, format_ in taken for group in groups}


def point_of(problem: Problem, loss: Loss, formats: Mapping[str, str]) -> Point:
    """Size and predicted loss of an allocation.

    Args:
        problem: Groups with their costs.
        loss: Of the allocation.
        formats: Searched group -> format.
    """
    effective_bits, weight_bytes = sizes(problem, formats)
    return Point(
        effective_bits=effective_bits, weight_bytes=weight_bytes, predicted_kl=loss(formats)
    )


def mark_knee(points: Sequence[Point]) -> list[Point]:
    """Drop points that no size distinguishes from a later one, and mark the knee."""
    distinct = list({point.effective_bits: point for point in points}.values())
    knee = find_knee(distinct)
    return [replace(point, is_knee=number == knee) for number, point in enumerate(distinct)]


def find_knee(points: Sequence[Point]) -> int | None:
    """Index of the knee; None where fewer than three points lose anything, or the ends are alike.

    The knee is the point farthest below the straight line between the ends, sizes and logarithms of
    losses scaled to 0..1 (Satopaa et al. 2011, "Finding a kneedle in a haystack").
    """
    losing = [n for n, point in enumerate(points) if point.predicted_kl > 0]
    if len(losing) < 3:
        return None
    sizes = np.array([points[n].weight_bytes for n in losing])
    losses = np.log([points[n].predicted_kl for n in losing])
    if sizes[-1] == sizes[0] or losses[0] == losses[-1]:
        return None
    x = (sizes - sizes[0]) / (sizes[-1] - sizes[0])
    y = (losses - losses[-1]) / (losses[0] - losses[-1])
    return losing[int(np.argmax(1 - x - y))]


def reachable_bits(problem: Problem, ties: Ties = ()) -> tuple[float, float]:
    """Least and most effective bits; a tied head is better left in 16 bits, where it adds none.

    Args:
        problem: Groups with their costs.
        ties: Groups that share a format.
    """
    choices = TiedChoices(problem.choices(None), ties).choices
    is_stored = [not problem.groups[group].is_tied for group in choices.groups]
    cost_GF, has_GF = choices.costs["storage"][is_stored], choices.has_GF[is_stored]
    weights = problem.menus.weights("storage")

    def average(costs_G: Floats) -> float:
        return BITS_PER_BYTE * math.fsum(costs_G.tolist()) / weights

    least_G = np.where(has_GF, cost_GF, np.inf).min(axis=1)
    return rounded_up(average(least_G)), average(cost_GF.max(axis=1))


def rounded_up(bits: float) -> float:
    """A hair more, so that a cost of exactly so many bits is within it."""
    return min(16.0, bits * (1 + 1e-12))


_NUM_HALVINGS = 50
_MANY_GROUPS, _CLOSE = 5_000, 1e-5  # of more groups, points may lose so much more than the best


def frontier_of(directory: RunDirectory, num_points: int = NUM_POINTS) -> list[Point]:
    """Solve budgets along the whole reachable range and write ``frontier.parquet``.

    Reports draw from the file, so that it always holds at least ``NUM_POINTS`` budgets, evenly
    spaced in bits.

    Args:
        directory: A run whose scores are complete.
        num_points: Number of points to return, the knee among them.

    Raises:
        StoreError: Not a run, or its files are damaged.
        ConfigError: Fewer than two points, or more than :data:`MOST_POINTS`.
    """
    if not 2 <= num_points <= MOST_POINTS:
        raise ConfigError(f"`points` {num_points}: give a number from 2 to {MOST_POINTS:,}")
    directory.require_run()
    with brief_lease(directory):
        curve = _Curve(ScoredRun.read(RunState.open(directory)))
        budgets = np.linspace(curve.least_bits, curve.most_bits, max(num_points, NUM_POINTS))
        points = mark_knee([curve.point(float(bits)) for bits in budgets])
        directory.write_table(FRONTIER_FILE, [vars(point) for point in points])
    return fewer(points, num_points)


def fewer(points: Sequence[Point], count: int) -> list[Point]:
    """Of the points of a curve the ends and those nearest to an even spacing in bits.

    Args:
        points: By size, one of them the knee if there is any.
        count: At least 2; of more than 2 points the knee is one.
    """
    if count >= len(points):
        return list(points)
    bits = np.array([point.effective_bits for point in points])
    wanted = np.linspace(bits[0], bits[-1], count)
    taken = {int(np.abs(bits - size).argmin()) for size in wanted}
    knee = next((number for number, point in enumerate(points) if point.is_knee), None)
    between = taken - {0, len(points) - 1}
    if knee is not None and knee not in taken and between:
        taken.remove(min(between, key=lambda number: abs(bits[number] - bits[knee])))
        taken.add(knee)
    return [points[number] for number in sorted(taken)]


def smallest_within(run: ScoredRun, largest_kl: float) -> SolveOptions:
    """The smallest budget whose solution is predicted to lose at most so much.

    Args:
        run: The run.
        largest_kl: Nats per token.

    Returns:
        Options of ``solve`` whose solution is it.

    Raises:
        InfeasibleBudgetError: Even 16 bits are not enough: the loss asked for is negative, or less
            than what the limit on the KV cache loses.
    """
    if not largest_kl >= 0:
        raise InfeasibleBudgetError(
            f"a predicted KL of {largest_kl:g} cannot be met; 16 bits lose 0"
        )
    curve = _Curve(run)
    low, high = curve.least_bits, curve.most_bits
    lost = curve.point(high).predicted_kl
    if lost > largest_kl:
        raise InfeasibleBudgetError(
            f"a predicted KL of {largest_kl:g} cannot be met: the run's limit on the KV cache "
            f"alone loses {lost:.4g}"
        )
    if curve.point(low).predicted_kl <= largest_kl:
        return frontier_options(run, low)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if curve.point(middle).predicted_kl <= largest_kl:
            high = middle
        else:
            low = middle
    exact = curve.point(high)
    return frontier_options(run, min(high, rounded_up(exact.effective_bits)))


class _Curve:
    """Solves budgets of a run, in bits, with the scan's limit on the KV cache.

    Attributes:
        least_bits, most_bits: What can be reached.
    """

    def __init__(self, run: ScoredRun) -> None:
        self._run, options = run, frontier_options(run, UNQUANTIZED_BITS)
        require_cache_limit(run.problem.caches, options.kv_bytes_per_token)
        ties = ties_of(run.problem, options)
        self._tied = TiedChoices(allowed_choices(run.problem, run.scores, options), ties)
        choices = self._tied.choices
        self._solver = Solver(choices, run.problem.resources)
        self._close = _CLOSE if len(choices.groups) > _MANY_GROUPS else 0.0
        self._loss = partial(predicted_loss, run.scores)
        self.least_bits, self.most_bits = reachable_bits(run.problem, ties)

    def point(self, bits: float) -> Point:
        """The best allocation within so many bits; of many groups, nearly the best."""
        problem = self._run.problem
        budgets = problem.budgets(frontier_options(self._run, bits))
        allocation = self._solver.solve(budgets, close=self._close)
        return point_of(problem, self._loss, self._tied.spread(allocation.formats))


def frontier_options(run: ScoredRun, bits: float) -> SolveOptions:
    """A budget in bits, with the scan's own limit on the KV cache."""
    config = run.state.record.config or {}
    return SolveOptions(bits=bits, kv_bytes_per_token=config.get(KV_BYTES))
