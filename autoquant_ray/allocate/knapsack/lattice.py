"""Costs that are multiples of one step: a sharper limit, a sharper bound and a better filling.

Weights come in a few sizes and formats in a few widths, so summed costs are multiples of a step
that can weigh more than the whole gap of a large knapsack. Two things follow.

1. :func:`find` lowers the limit to the largest sum that can be reached. With 50,000 groups this
   alone takes most of the distance between the greedy allocation and its bound.
2. :func:`fill` starts at the hull prefix, whose distance to the limit is a whole number of steps.
   Every other allocation is that prefix and some moves, each of a whole number of steps and with
   a loss against the Lagrangian bound. The cheapest walk of moves that ends at the limit is a
   lower bound; it forgets only that a group moves once. Its moves, dealt to the groups where they
   lose least, are an allocation. Where thousands of groups are nearly equal both agree, and a
   search over single groups would not end.

Shapes as in :mod:`autoquant_ray.allocate.knapsack.knapsack`; C classes of equal moves, W nodes of
the walk.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from autoquant_ray.allocate.knapsack.knapsack import (
    MARGIN,
    SLACK,
    Answer,
    Knapsack,
    lagrangian,
    losses,
)
from autoquant_ray.arrays import Floats, Indices, Integers

_EPSILON = float(np.finfo(np.float64).eps)
_NOISE = 1e-10  # remainders up to this share of the largest cost are rounding
_FINEST = 1e-7  # least step looked for, as a share of the largest cost
_CERTAIN = 0.1  # largest share of a step that rounding may amount to, all groups together
_CLOSE = 1e-11  # distance from the cheapest walk at which to stop, as a share of the score
_MAX_NODES = 2_000_000
_MAX_EDGES = 5_000_000  # under a second
_BATCH = 100_000  # edges followed at once


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """Costs as whole numbers.

    Attributes:
        knapsack: The knapsack, its limit lowered to ``capacity`` steps.
        step: Cost of one step.
        counts_GF: Steps above the cheapest choice of the group; 0 for formats that a group lacks.
        capacity: Most steps within the limit, all groups together.
        error: Most by which the costs of an allocation differ from whole steps.
    """

    knapsack: Knapsack
    step: float
    counts_GF: Integers
    capacity: int
    error: float


def find(knapsack: Knapsack) -> Lattice | None:
    """The lattice of a knapsack with one resource; None where its costs show no useful one."""
    present_GF, cost_GF = knapsack.present_GF, knapsack.costs_RGF[0]
    least_G = np.where(present_GF, cost_GF, np.inf).min(axis=1)
    excess_GF = np.where(present_GF, cost_GF - least_G[:, None], 0.0)
    step = common_step(np.unique(excess_GF))
    limit = float(knapsack.limits_R[0])
    if not step:
        return None
    counts_GF = np.rint(excess_GF / step)
    error_GF = np.abs(excess_GF - counts_GF * step) + 4 * _EPSILON * (excess_GF + least_G[:, None])
    error = math.fsum(error_GF.max(axis=1))
    base = math.fsum(least_G)
    room = limit * (1 + SLACK) - base
    if room < 0 or error + SLACK * limit > _CERTAIN * step:
        return None
    capacity = math.floor((room + error) / step * (1 + 4 * _EPSILON))
    lowered = min(limit, base + capacity * step + error)
    return Lattice(
        knapsack=replace(knapsack, limits_R=np.array([lowered])),
        step=step,
        counts_GF=counts_GF.astype(np.int64),
        capacity=capacity,
        error=error,
    )


def common_step(values: Floats) -> float:
    """Greatest common divisor of numbers >= 0, up to rounding; 0.0 where there is none to speak of.

    Euclid's method over the ascending values. After each one the divisor is taken afresh from the
    largest value that it is known to divide, so that rounding does not build up.
    """
    values = np.sort(values[values > 0])
    if not values.size:
        return 0.0
    step, noise = float(values[0]), _NOISE * float(values[-1])
    while step > _FINEST * values[-1]:
        uneven = np.flatnonzero(_remainder(values, step) > noise)
        if not uneven.size:
            return float(values[-1] / np.rint(values[-1] / step))
        value = values[uneven[0]]
        rest = _remainder(value, step)
        while rest > noise:
            step, rest = float(rest), _remainder(np.float64(step), float(rest))
        step = float(value / np.rint(value / step))
    return 0.0


def _remainder(values: Floats | np.float64, step: float) -> Floats:
    """Distance to the nearest multiple of ``step``."""
    rest: Floats = np.abs(values - np.rint(values / step) * step)
    return rest


@dataclass(frozen=True, kw_only=True)
class _Moves:
    """Moves away from the hull prefix: equal numbers of steps together, least loss first."""

    groups_N: Indices
    columns_N: Indices
    losses_N: Floats
    steps_C: Integers
    first_C: Indices

    @classmethod
    def of(cls, lattice: Lattice, losses_GF: Floats, prefix_G: Indices, spare: float) -> _Moves:
        """All moves that lose at most ``spare``."""
        rows = np.arange(len(prefix_G))
        moved_GF = lattice.counts_GF - lattice.counts_GF[rows, prefix_G][:, None]
        groups_N, columns_N = np.nonzero((losses_GF <= spare) & (moved_GF != 0))
        losses_N, steps_N = losses_GF[groups_N, columns_N], moved_GF[groups_N, columns_N]
        order = np.lexsort((groups_N, losses_N, steps_N))
        steps_C, first_C = np.unique(steps_N[order], return_index=True)
        return cls(
            groups_N=groups_N[order],
            columns_N=columns_N[order],
            losses_N=losses_N[order],
            steps_C=steps_C,
            first_C=first_C,
        )


def fill(lattice: Lattice, multipliers_R: Floats, prefix_G: Indices, answer: Answer) -> Answer:
    """Improve an answer and its bound by the cheapest walk from the hull prefix to the limit.

    Args:
        lattice: The knapsack on its lattice.
        multipliers_R: The Lagrange multiplier (1,) at which the prefix is best.
        prefix_G: The hull prefix (G,), within the limit.
        answer: An allocation within the limit.
    """
    knapsack, price = lattice.knapsack, float(multipliers_R[0])
    lowest = lagrangian(knapsack, multipliers_R)
    spare = answer.score - lowest
    moves = _Moves.of(lattice, losses(knapsack, multipliers_R), prefix_G, spare)
    room = lattice.capacity - int(lattice.counts_GF[np.arange(len(prefix_G)), prefix_G].sum())
    walk = _Walk(moves, room, price * lattice.step, spare)
    if not walk.is_small:
        return answer
    length = walk.go(_CLOSE * answer.score)
    rounding = MARGIN * len(prefix_G) * length + 2 * price * lattice.error
    rounding += 2 * price * SLACK * float(knapsack.limits_R[0])
    columns_G = _deal(moves, prefix_G, walk.taken())
    if columns_G is not None and knapsack.is_within(columns_G):
        rank = (knapsack.score(columns_G), knapsack.costs(columns_G))
        if rank < (answer.score, knapsack.costs(answer.columns_G)):
            answer = Answer(columns_G=columns_G, score=rank[0], lower=answer.lower)
    lower = max(answer.lower, lowest + length - rounding)
    return replace(answer, lower=min(answer.score, lower))


class _Walk:
    """The cheapest walk of moves from 0 to ``room`` steps, by Dijkstra's method in batches.

    It may stop below ``room``: every step left costs ``idle``. Moves can be ordered so that the
    walk stays between the lowest and the highest sum that one move reaches from between its ends:
    down from above 0, up otherwise. Walks longer than ``spare`` are of no use.
    """

    def __init__(self, moves: _Moves, room: int, idle: float, spare: float) -> None:
        self.steps_C, self.losses_C = moves.steps_C, moves.losses_N[moves.first_C]
        self.room, self.idle, self.spare = room, idle, spare
        least_end = max(room - spare / idle, -_MAX_NODES) if idle else -_MAX_NODES
        steps = self.steps_C.tolist()
        self.low = min(0, math.floor(least_end)) + min([0, *steps])
        self.num_nodes = max([room, *steps]) - self.low + 1
        self.is_small = self.num_nodes <= _MAX_NODES

    def go(self, close: float) -> float:
        """A lower bound of the shortest length, off by at most ``close`` if the work allows."""
        self.length_W = np.full(self.num_nodes, np.inf)
        self.class_W = np.full(self.num_nodes, -1, dtype=np.int32)
        self.length_W[-self.low] = 0.0
        self.best, self.end = self.room * self.idle, -self.low
        open_N = np.array([-self.low])
        is_open_W = np.zeros(self.num_nodes, dtype=np.bool_)
        num_edges = 0
        while open_N.size:
            open_N = open_N[np.argsort(self.length_W[open_N], kind="stable")]
            least = float(self.length_W[open_N[0]])
            if self.best - least <= close or num_edges > _MAX_EDGES:
                return min(self.best, least)
            batch = max(1, _BATCH // max(1, len(self.steps_C)), len(open_N) // 4)
            left_N = open_N[:batch]
            is_open_W[left_N] = False
            is_open_W[self._leave(left_N)] = True
            num_edges += len(left_N) * len(self.steps_C)
            open_N = np.flatnonzero(is_open_W)
        return self.best

    def _leave(self, nodes_N: Indices) -> Indices:
        """Take every move from some nodes; the nodes that are now nearer."""
        to_NC = nodes_N[:, None] + self.steps_C
        length_NC = self.length_W[nodes_N][:, None] + self.losses_C
        useful_NC = (to_NC >= 0) & (to_NC < self.num_nodes) & (length_NC <= self.spare)
        useful_NC[useful_NC] = length_NC[useful_NC] < self.length_W[to_NC[useful_NC]]
        class_N = np.nonzero(useful_NC)[1]
        to_N, length_N = to_NC[useful_NC], length_NC[useful_NC]
        np.minimum.at(self.length_W, to_N, length_N)
        nearest = np.flatnonzero(length_N == self.length_W[to_N])
        to_N, length_N = to_N[nearest], length_N[nearest]
        self.class_W[to_N] = class_N[nearest]
        left_N = self.room - (to_N + self.low)
        total_N = np.where(left_N >= 0, length_N + left_N * self.idle, np.inf)
        if total_N.size and total_N.min() < self.best:
            self.best, self.end = float(total_N.min()), int(to_N[total_N.argmin()])
        nearer_N: Indices = to_N
        return nearer_N

    def taken(self) -> list[int]:
        """The classes of the moves of the best walk."""
        node, taken = self.end, []
        while node != -self.low:
            taken.append(int(self.class_W[node]))
            node -= int(self.steps_C[taken[-1]])
        return taken


def _deal(moves: _Moves, prefix_G: Indices, taken: list[int]) -> Indices | None:
    """Give the moves to the groups where they lose least; None where groups are too few."""
    ends_C = np.append(moves.first_C[1:], len(moves.groups_N))
    columns_G = prefix_G.copy()
    used: set[int] = set()
    counts = Counter(taken)
    for number in sorted(counts, key=lambda c: (ends_C[c] - moves.first_C[c], c)):
        wanted = counts[number]
        for position in range(int(moves.first_C[number]), int(ends_C[number])):
            group = int(moves.groups_N[position])
            if wanted and group not in used:
                columns_G[group] = moves.columns_N[position]
                used.add(group)
                wanted -= 1
            if not wanted:
                break
        if wanted:
            return None
    return columns_G
