"""Search for a plan by measurement: swaps, a race, and a figure on data that chose nothing.

The shards are cut in three. On the first part the plan's neighbours are scored again
(:mod:`autoquant_ray.evaluate.rescoring`), then swaps are tried (every plan on the same tokens, so
that differences are paired), and taken if they are better by more than their standard error. The
best plans then race on the second part. What is said about the winner is measured on the third.

The workers share a part by its shards. All plans of a round run on one shard in one worker: they
have most of their quantized weights and many of their hidden states in common.

Knows nothing of files, workers or Ray: who measures is handed in.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autoquant_ray.allocate.candidate import Candidate, make_candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.errors import DataError
from autoquant_ray.evaluate.rescoring import Flip, choose_flips, scores_around, solve_flips
from autoquant_ray.evaluate.swaps import Change, Swaps, combine
from autoquant_ray.evaluate.table import Measured, mean_kl, paired_difference

logger = logging.getLogger(__name__)

Measure = Callable[[Sequence[Candidate], Sequence[int]], list[Measured]]
"""Measures plans on the same shards."""

_BATCH = 12  # plans per round
_POOL = 4  # proposals per plan that is drawn from them
_IDLE_ROUNDS = 2  # without an improvement, then the search ends
_RACING = 4
_FLIPS = 4  # one trial of so many scores the start's neighbours again


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        start: The plan that it began with.
        winner: The plan that it ends with; the start itself where nothing was better.
        before: The start on the third part.
        after: The winner on the third part.
        num_trials: Plans measured on the first part, the start not counted.
        num_flips: Those of them that scored the start's neighbours again.
        num_accepted: Changes taken.
    """

    start: Candidate
    winner: Candidate
    before: Measured
    after: Measured
    num_trials: int
    num_flips: int
    num_accepted: int


@dataclass
class _Search:
    """The state of the search: every plan measured so far on the first part."""

    run: Measure
    problem: Problem
    scores: Mapping[tuple[str, str], float]
    shards: Sequence[int]
    seen: dict[str, tuple[Candidate, Measured]] = field(default_factory=dict)

    def plan(self, name: str, formats: Mapping[str, str]) -> Candidate:
        return make_candidate(self.problem, self.scores, name, formats)

    def measure(self, plans: list[Candidate]) -> list[Measured]:
        """Measure plans; where a shard is left out from now on, the earlier ones once more."""
        results = self.run(plans, self.shards)
        earlier = [plan for plan, _ in self.seen.values()]
        if earlier and len(results[0].kl_S) != len(next(iter(self.seen.values()))[1].kl_S):
            again = self.run(earlier, self.shards)
            self.seen = {p.key: (p, one) for p, one in zip(earlier, again, strict=True)}
        self.seen |= {p.key: (p, one) for p, one in zip(plans, results, strict=True)}
        return results

    def result(self, plan: Candidate) -> Measured:
        """What was measured of a plan."""
        return self.seen[plan.key][1]


def search_plans(
    measure: Measure,
    num_shards: int,
    problem: Problem,
    scores: Mapping[tuple[str, str], float],
    options: SolveOptions,
    formats: Mapping[str, str],
    *,
    num_trials: int,
    seed: int = 0,
) -> Found:
    """Search around a plan. Deterministic; on the first part never worse than its start.

    Args:
        measure: Who measures.
        num_shards: Shards of the data.
        problem: Groups with their costs.
        scores: (group, format) -> predicted loss; they order what is tried.
        options: Budgets and constraints that hold for every plan.
        formats: The start: searched group -> format.
        num_trials: Plans to measure on the first part at most.
        seed: Of the choice among proposals.

    Raises:
        DataError: There are fewer than three shards.
    """
    first, second, third = split_shards(num_shards)
    search = _Search(measure, problem, scores, first)
    own = search.plan("solution", formats)
    search.measure([own])
    begin, measured = _rescore(search, own, options, num_trials // _FLIPS)
    swaps = Swaps(problem, scores_around(scores, formats, measured), options)
    left = num_trials - (len(search.seen) - 1)
    num_accepted = int(begin is not own) + _climb(search, swaps, begin, left, seed)
    racing = _racing(search, swaps, own)
    times = zip(racing, measure(racing, second), strict=True)
    winner = min(times, key=lambda pair: mean_kl(pair[1]))[0]
    before, after = measure([own, winner], third)
    return Found(
        start=own,
        winner=winner,
        before=before,
        after=after,
        num_trials=len(search.seen) - 1,
        num_flips=len(measured),
        num_accepted=num_accepted,
    )


def split_shards(num_shards: int) -> tuple[list[int], list[int], list[int]]:
    """Half of the shards for the search, a quarter each for the race and the final figure.

    Raises:
        DataError: There are fewer than three.
    """
    if num_shards < 3:
        raise DataError(
            "refining and auditing need three shards of data or more, to choose, to race and to "
            f"tell the result; this data makes {num_shards}; give more with --samples or --data"
        )
    quarter = max(1, num_shards // 4)
    shards = list(range(num_shards))
    half = num_shards - 2 * quarter
    return shards[:half], shards[half : half + quarter], shards[half + quarter :]


def _rescore(
    search: _Search, own: Candidate, options: SolveOptions, count: int
) -> tuple[Candidate, dict[Flip, float]]:
    """Measure flips of the start, and solve again with what they lose.

    Args:
        search: The start is measured.
        own: The start.
        options: Budgets and constraints.
        count: How many flips.

    Returns:
        The start, or what is better than it by more than its error: the plan that the new scores
        lead to, or a flip that keeps the budget. And what each flip loses more than the start, in
        nats per token, one standard error added: it is taken for what it is at least worth.
    """
    problem, formats = search.problem, own.formats
    swaps = Swaps(problem, search.scores, options)
    flips = choose_flips(swaps, formats, count)
    if not flips:
        return own, {}
    plans = [search.plan("flip", {**formats, group: other}) for group, other in flips]
    results = search.measure(plans)
    told = [paired_difference(one, search.result(own)) for one in results]
    measured = {
        flip: difference + (error or 0.0)
        for flip, (difference, error) in zip(flips, told, strict=True)
    }
    again = search.plan("rescored", solve_flips(problem, options, formats, measured))
    if again.key not in search.seen:
        search.measure([again])
    fitting = [plan for plan in [again, *plans] if swaps.fits(plan.formats)]
    better = _better(search, [((), plan) for plan in fitting], own)
    if not better:
        return own, measured
    logger.info("refine: %d flips, KL %.4g", len(flips), mean_kl(search.result(better[0][1])))
    return better[0][1], measured


def _climb(search: _Search, swaps: Swaps, plan: Candidate, num_trials: int, seed: int) -> int:
    """Take swaps that are better by more than their error; returns how many times."""
    rng = np.random.default_rng(seed)
    num_tried, num_accepted, idle = 0, 0, 0
    while num_tried < num_trials and idle < _IDLE_ROUNDS:
        changes = _draw(search, swaps, plan, min(_BATCH, num_trials - num_tried), rng)
        if not changes:
            break
        plans = [search.plan("swap", {**plan.formats, **dict(change)}) for change in changes]
        search.measure(plans)
        num_tried += len(plans)
        better = _better(search, list(zip(changes, plans, strict=True)), plan)
        together = _together(search, swaps, plan, [change for change, _ in better])
        if together is not None and num_tried < num_trials:
            search.measure([together])
            num_tried += 1
            better += _better(search, [((), together)], plan)
        if not better:
            idle += 1
            continue
        plan = min((one for _, one in better), key=lambda one: mean_kl(search.result(one)))
        idle, num_accepted = 0, num_accepted + 1
        logger.info("refine: %d plans tried, KL %.4g", num_tried, mean_kl(search.result(plan)))
    return num_accepted


def _draw(
    search: _Search, swaps: Swaps, plan: Candidate, count: int, rng: np.random.Generator
) -> list[Change]:
    """Some of the changes that the scores like best and that were not measured yet."""
    untried = (
        change
        for change in swaps.proposals(plan.formats)
        if search.plan("swap", {**plan.formats, **dict(change)}).key not in search.seen
    )
    liked = list(itertools.islice(untried, _POOL * count))
    drawn = rng.permutation(len(liked))[:count]
    return [liked[index] for index in sorted(drawn)]


def _better(
    search: _Search, tried: Sequence[tuple[Change, Candidate]], current: Candidate
) -> list[tuple[Change, Candidate]]:
    """Changes whose plans are better than the current one by more than the paired standard error,
    best first."""
    found = []
    for change, plan in tried:
        difference, error = paired_difference(search.result(plan), search.result(current))
        if difference + (error or 0.0) < 0:
            found.append((change, plan))
    return sorted(found, key=lambda one: mean_kl(search.result(one[1])))


def _together(
    search: _Search, swaps: Swaps, plan: Candidate, changes: list[Change]
) -> Candidate | None:
    """All improvements of a round that touch different groups, as far as they fit together."""
    formats = dict(plan.formats)
    taken = 0
    for change in combine(changes):
        merged = {**formats, **dict(change)}
        if swaps.fits(merged):
            formats, taken = merged, taken + 1
    together = search.plan("swap", formats)
    return together if taken > 1 and together.key not in search.seen else None


def _racing(search: _Search, swaps: Swaps, own: Candidate) -> list[Candidate]:
    """The start, and the best plans of the first part that are better there."""
    limit = mean_kl(search.result(own))
    ranked = sorted(search.seen.values(), key=lambda pair: mean_kl(pair[1]))
    better = [
        plan
        for plan, result in ranked
        if mean_kl(result) < limit and swaps.fits(plan.formats)  # a flip alone may not fit
    ]
    return [own, *better[:_RACING]]
