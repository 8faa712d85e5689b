"""When enough shards are scored: decided in the order of the shards, never in that of workers.

After 8, 12, 18, 27, ... shards the expected regret of the allocation at the scan's own budget is
computed (:mod:`autoquant_ray.allocate.certainty.resampling`); the scan may stop once it is below
the threshold. The numbers of shards are fixed, a decision sees the first so many shards that were
not left out, and its resampling is seeded by the config's seed and that number. So the same shards
are used whoever scored them, in whatever order, and after any resume.

Knows nothing of files, workers or Ray. A limit on the number of formats is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from autoquant_ray.allocate.certainty.resampling import assess
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.arrays import Floats, Mask
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.record import RunRecord, Stopping

MIN_SHARDS = 8
"""Fewer shards do not show their spread; no scan stops before."""


def check_counts(num_shards: int) -> list[int]:
    """Numbers of shards after which stability is checked: 8, then half as many more each time.

    Args:
        num_shards: Shards of the run; always the last number.
    """
    counts = []
    count = MIN_SHARDS
    while count < num_shards:
        counts.append(count)
        count += count // 2
    return [*counts, num_shards]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One look at the first ``shards`` shards.

    Attributes:
        shards: Number of shards looked at.
        expected_regret: Share of the predicted KL; None where a group has no score yet or no
            allocation was found.
    """

    shards: int
    expected_regret: float | None


class StoppingRule:
    """Collects the shards' sums in any order and decides in the order of the shards.

    Args:
        knapsack: Costs and limits of the scan's budget, see :func:`budget_knapsack`. The rows of
            parts are its groups' formats, group by group, without the last column (16 bits).
        has_GF: Which choices parts have rows of, where it leaves some of them out.
        threshold: Expected regret below which the scan may stop.
        num_shards: Shards of the run.
        seed: The config's seed.
    """

    def __init__(
        self,
        knapsack: Knapsack,
        *,
        threshold: float,
        num_shards: int,
        seed: int,
        has_GF: Mask | None = None,
    ) -> None:
        self._knapsack = knapsack
        self._has_GF = scored_choices(knapsack) if has_GF is None else has_GF
        self._threshold = threshold
        self._num_shards = num_shards
        self._seed = seed
        self._counts = set(check_counts(num_shards))
        self._waiting: dict[int, Floats | None] = {}
        self._used: list[Floats] = []
        self.checks: list[Check] = []
        self.end = 0
        """Shards below this number are decided on: used, or left out."""

    @property
    def is_stable(self) -> bool:
        """Whether the last check was below the threshold."""
        last = self.checks[-1].expected_regret if self.checks else None
        return last is not None and last < self._threshold

    def add(self, shard: int, sums_K: Floats | None) -> bool:
        """Take in a shard; returns whether no more shards are needed.

        Args:
            shard: Its number.
            sums_K: Its sums from :func:`part_sums`; None for a shard that is left out.
        """
        self._waiting[shard] = sums_K
        while not self.is_stable and self.end in self._waiting:
            sums = self._waiting.pop(self.end)
            self.end += 1
            if sums is not None:
                self._used.append(sums)
            is_last = self.end == self._num_shards and len(self._used) > 0
            if is_last or (sums is not None and len(self._used) in self._counts):
                self._check()
        return self.is_stable

    def summary(self) -> Stopping:
        """The ``stopping`` object of ``run.json``."""
        return {
            "threshold": self._threshold,
            "shards_used": len(self._used),
            "shards_total": self._num_shards,
            "is_stable": self.is_stable,
            "expected_regret": self.checks[-1].expected_regret if self.checks else None,
            "checks": [asdict(check) for check in self.checks],
        }

    def _check(self) -> None:
        count = len(self._used)
        if self.checks and self.checks[-1].shards == count:
            return
        sums_SK, regret = np.stack(self._used), None
        if not np.isnan(sums_SK).all(axis=0).any():
            measured_SGF = np.zeros((count, *self._has_GF.shape))
            measured_SGF[:, self._has_GF] = np.nan_to_num(sums_SK)
            stability = assess(self._knapsack, measured_SGF, (self._seed, count))
            regret = None if stability is None else stability.expected_regret
        self.checks.append(Check(shards=count, expected_regret=regret))


def describe_stopping(run: RunRecord) -> str | None:
    """One line on how much of the data was used and why.

    Args:
        run: Content of ``run.json``.

    Returns:
        None for a scan that was not asked to stop.
    """
    stopping, used, dataset = run.stopping, run.used, run.dataset
    if not stopping or not used:
        return None
    amount = (
        f"{used['num_shards']} of {dataset['num_shards']} shards ({used['num_samples']} of "
        f"{dataset['num_samples']} samples, {used['num_tokens']} of {dataset['num_tokens']} tokens)"
    )
    regret = stopping["expected_regret"]
    if regret is None:
        return f"{amount}; not stable: the expected regret is unknown"
    verdict = "stable" if stopping["is_stable"] else "not stable"
    side = "below" if stopping["is_stable"] else "not below"
    return (
        f"{amount}; {verdict}: expected regret {regret:.2%} of the predicted KL at the scan's own "
        f"budget, {side} {100 * stopping['threshold']:g}%"
    )


def part_sums(part: pa.Table, estimator: str) -> Floats:
    """Sums of a scores part in the order of its rows; NaN for a group that it did not see."""
    sums: Floats = part.column(f"{estimator}_sum").to_numpy()
    return sums


def scored_choices(knapsack: Knapsack) -> Mask:
    """(G, F): which group has a score of which format; 16 bits, the last column, has none."""
    has_GF: Mask = knapsack.present_GF.copy()
    has_GF[:, -1] = False
    return has_GF


def budget_knapsack(problem: Problem, options: SolveOptions, formats: Sequence[str]) -> Knapsack:
    """Costs and limits of a budget as arrays, without scores.

    Args:
        problem: Groups with their costs.
        options: The budget.
        formats: The menu, in the order of the scores' parts. 16 bits becomes the last column.

    Returns:
        A knapsack whose scores are 0, and inf where a group lacks a format.
    """
    budgets = problem.budgets(options)
    columns = [*formats, NONE]
    costs = [
        [
            [group.cost(f, budget.resource) if f in group.rows else 0.0 for f in columns]
            for group in problem.searched
        ]
        for budget in budgets
    ]
    return Knapsack(
        scores_GF=np.array(
            [[0.0 if f in group.rows else np.inf for f in columns] for group in problem.searched]
        ),
        costs_RGF=np.array(costs, dtype=np.float64),
        limits_R=np.array([float(budget.limit) for budget in budgets]),
    )
