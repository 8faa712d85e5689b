"""Predicted KL along all sizes, from one sweep: milliseconds, nothing read, nothing written.

Between the steps of the sweep an allocation is not the best one for its size, only close to it;
:mod:`autoquant_ray.allocate.frontier_points` solves its budgets exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoquant_ray.allocate.allocation import frontier_allocations
from autoquant_ray.allocate.losses import average_bits, model_bytes, predicted_loss
from autoquant_ray.allocate.options import BITS_PER_BYTE
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.formats.format import NONE

NUM_POINTS = 64

Scores = Mapping[tuple[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget.

    Attributes:
        effective_bits: Average stored bits over the searched groups.
        weight_bytes: Of the whole model.
        predicted_kl: In nats per token.
        is_knee: Beyond it bytes buy less.
    """

    effective_bits: float
    weight_bytes: float
    predicted_kl: float
    is_knee: bool = False


def sweep_points(problem: Problem, scores: Scores, num_points: int = NUM_POINTS) -> list[Point]:
    """Points along the whole reachable range, the knee marked.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> nats per token.
        num_points: Number of budgets, evenly spaced in bits.
    """
    low, high = reachable_bits(problem)
    weights = sum(group.num_weights for group in problem.searched)
    limits = [float(bits) * weights / BITS_PER_BYTE for bits in np.linspace(low, high, num_points)]
    found = frontier_allocations(problem.choices(scores), "storage", limits)
    return mark_knee([point_of(problem, scores, one.formats) for one in found])


def uniform_points(problem: Problem, scores: Scores) -> dict[str, Point]:
    """Format -> what all groups would lose under it; a group that lacks it stays in 16 bits.

    Caches keep the first of their formats.
    """
    weights = [group for group in problem.searched if not group.is_cache]
    caches = {g.name: next(iter(g.rows)) for g in problem.searched if g.is_cache}
    names = dict.fromkeys(f for group in weights for f in group.rows if f != NONE)
    return {
        name: point_of(
            problem, scores, caches | {g.name: name if name in g.rows else NONE for g in weights}
        )
        for name in names
    }


def point_of(problem: Problem, scores: Scores, formats: Mapping[str, str]) -> Point:
    """Size and predicted loss of an allocation.

    Args:
        problem: Groups with their costs.
        scores: (group, format) -> nats per token.
        formats: Searched group -> format.
    """
    return Point(
        effective_bits=average_bits(problem.searched, formats),
        weight_bytes=model_bytes(problem, formats),
        predicted_kl=predicted_loss(scores, formats),
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


def reachable_bits(problem: Problem) -> tuple[float, float]:
    """Least and most average stored bits over the searched groups."""
    weights = sum(group.num_weights for group in problem.searched)

    def average(choose: Any) -> float:
        costs = (choose(g.cost(f, "storage") for f in g.rows) for g in problem.searched)
        return BITS_PER_BYTE * math.fsum(costs) / weights

    return rounded_up(average(min)), average(max)


def rounded_up(bits: float) -> float:
    """A hair more, so that a cost of exactly so many bits is within it."""
    return min(16.0, bits * (1 + 1e-12))
