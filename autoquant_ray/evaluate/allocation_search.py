"""Search for an allocation by measurement: swaps, a race, and an unbiased final measurement.

The shards are split into three parts, none of which calibration, fitted rounding or scores have
seen. What single changes of the start would do is predicted from a backward pass on the second part
(:mod:`autoquant_ray.evaluate.flip_estimates`): that is the order in which changes are tried. On the
first, which neither calibration nor this order has seen, single changes are measured
(:mod:`autoquant_ray.evaluate.rescoring`), then swaps, every allocation on the same tokens so that
differences are paired, and accepted if they improve by more than their standard error. Nothing is
accepted by prediction. The best allocations then race on the second part. The reported loss of the
winner is measured on the third, which chose nothing.

Workers divide a part by shards. All allocations of a round run on a shard in the same worker, since
they share most of their quantized weights and many of their hidden states.

This module knows nothing of files, workers or Ray: the function that measures is an argument.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.errors import DataError
from autoquant_ray.evaluate.flip_estimates import FlipEstimates
from autoquant_ray.evaluate.rescoring import choose_flips, scores_around, solve_flips
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.evaluate.swaps import Change, Swaps, combine
from autoquant_ray.evaluate.table import Measured, mean_kl, paired_difference

logger = logging.getLogger(__name__)

Measure = Callable[[Sequence[Candidate], Sequence[int]], list[Measured]]
"""Measures allocations on the given shards."""

Estimate = Callable[[Candidate, Sequence[int]], FlipEstimates | None]
"""Predicts what single changes of an allocation do, on the given shards; None: it cannot."""

_BATCH = 12  # allocations per round
_POOL = 4  # proposals per allocation drawn from them
_IDLE_ROUNDS = 2  # rounds without an improvement that end the search
_RACING = 4
_FLIPS = 4  # one trial in this many goes to rescoring single changes of the start


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Outcome of a search.

    Attributes:
        start: The allocation that the search began with.
        winner: The best allocation; the start itself where nothing was better.
        before: Losses of the start on the third part.
        after: Losses of the winner on the third part.
        num_trials: Allocations measured on the first part, not counting the start.
        num_flips: How many of them were single changes of the start.
        num_accepted: Changes accepted.
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
    """State of the search: every allocation measured so far on the first part.

    Attributes:
        most: Trials at most.
    """

    run: Measure
    origin: StartingPoint
    shards: Sequence[int]
    most: int
    seen: dict[str, tuple[Candidate, Measured]] = field(default_factory=dict)

    def measure(self, candidates: list[Candidate]) -> list[Measured]:
        """Measure allocations; if a shard newly fails, the earlier ones again without it."""
        self._say(candidates)
        measured = self.run(candidates, self.shards)
        earlier = [candidate for candidate, _ in self.seen.values()]
        if earlier and len(measured[0].kl_S) != len(next(iter(self.seen.values()))[1].kl_S):
            again = self.run(earlier, self.shards)
            self.seen = {c.key: (c, losses) for c, losses in zip(earlier, again, strict=True)}
        self.seen |= {c.key: (c, losses) for c, losses in zip(candidates, measured, strict=True)}
        return measured

    def _say(self, candidates: list[Candidate]) -> None:
        """Count the trials that begin; the start, which is measured first, is none."""
        new = {candidate.key for candidate in candidates} - self.seen.keys()
        if self.seen and new:
            first, last = len(self.seen), len(self.seen) + len(new) - 1
            which = f"trial {first}" if first == last else f"trials {first} to {last}"
            logger.info("refine: %s of at most %d", which, self.most)

    def losses(self, candidate: Candidate) -> Measured:
        """Measured losses of an allocation."""
        return self.seen[candidate.key][1]


def search_allocations(
    measure: Measure,
    num_shards: int,
    origin: StartingPoint,
    *,
    num_trials: int,
    seed: int = 0,
    estimate: Estimate | None = None,
) -> SearchResult:
    """Search around an allocation. Deterministic; on the first part never worse than its start.

    Args:
        measure: Measures allocations.
        num_shards: Shards of the data.
        origin: The start; its constraints hold for all trials.
        num_trials: Allocations to measure on the first part at most.
        seed: For drawing among proposals.
        estimate: Predicts changes of the start, which order the trials; without it, or where it
            cannot, the scores do.

    Raises:
        DataError: There are fewer than three shards.
    """
    first, second, third = split_shards(num_shards)
    search = _Search(measure, origin, first, num_trials)
    start = origin.candidate("solution", origin.formats)
    search.measure([start])
    predicted = _predicted(estimate, start, second)
    swaps = _swaps(origin, predicted, {})
    rescored, differences = _rescore(search, swaps, start, num_trials // _FLIPS)
    swaps = _swaps(origin, predicted, differences)
    num_left = num_trials - (len(search.seen) - 1)
    num_swaps = _climb(search, swaps, rescored, num_left, seed)
    winner = _race(measure, _racing(search, swaps, start), second)
    before, after = measure([start, winner], third)
    return SearchResult(
        start=start,
        winner=winner,
        before=before,
        after=after,
        num_trials=len(search.seen) - 1,
        num_flips=len(differences),
        num_accepted=int(rescored is not start) + num_swaps,
    )


def split_shards(num_shards: int) -> tuple[list[int], list[int], list[int]]:
    """Half of the shards for the search, a quarter each for the race and the final measurement.

    Raises:
        DataError: There are fewer than three shards.
    """
    if num_shards < 3:
        raise DataError(
            "refining and auditing need at least three shards of data: for the search, the race "
            f"and the result; this data makes {num_shards}; give more with `samples` or `data`, or "
            "scan with a larger `hold_out`"
        )
    quarter = max(1, num_shards // 4)
    shards = list(range(num_shards))
    half = num_shards - 2 * quarter
    return shards[:half], shards[half : half + quarter], shards[half + quarter :]


def _predicted(estimate: Estimate | None, start: Candidate, shards: Sequence[int]) -> FlipEstimates:
    """What changes of the start do; nothing where it cannot be predicted."""
    predicted = None if estimate is None else estimate(start, shards)
    if predicted is not None:
        return predicted
    logger.info("refine: changes are tried in the order of the scores")
    return FlipEstimates(changes={})


def _swaps(
    origin: StartingPoint, predicted: FlipEstimates, differences: Mapping[Change, float]
) -> Swaps:
    """Changes in the order of what is predicted and measured around the start."""
    measured = {change[0]: loss for change, loss in differences.items() if len(change) == 1}
    changes = {**predicted.changes, **measured}
    around = scores_around(origin.scores, origin.formats, changes)
    return Swaps(origin.problem, origin.scores, origin.options, around, predicted.interactions)


def _rescore(
    search: _Search, swaps: Swaps, start: Candidate, count: int
) -> tuple[Candidate, dict[Change, float]]:
    """Measure flips of the start, and solve the budget again with the measured differences.

    Args:
        search: Has measured the start.
        swaps: Changes of the start in the order in which they are tried.
        start: The start.
        count: Number of flips, or of two together.

    Returns:
        The start, or an allocation that is better by more than its standard error: the solution
        by the new scores, or a flip within the budget. And per flip, the measured difference to
        the start in nats per token plus a standard error, a cautious estimate of its gain.
    """
    origin, formats = search.origin, start.formats
    flips = choose_flips(swaps, formats, count)
    if not flips:
        return start, {}
    flipped = [origin.candidate("flip", {**formats, **dict(flip)}) for flip in flips]
    measured = search.measure(flipped)
    estimates = [paired_difference(losses, search.losses(start)) for losses in measured]
    differences = {
        flip: difference + (error or 0.0)
        for flip, (difference, error) in zip(flips, estimates, strict=True)
    }
    solved = solve_flips(origin.problem, origin.options, formats, differences)
    rescored = origin.candidate("rescored", solved)
    if rescored.key not in search.seen:
        search.measure([rescored])
    fitting = [candidate for candidate in [rescored, *flipped] if swaps.fits(candidate.formats)]
    better = _better(search, [((), candidate) for candidate in fitting], start)
    if not better:
        return start, differences
    logger.info("refine: %d flips, KL %.4g", len(flips), mean_kl(search.losses(better[0][1])))
    return better[0][1], differences


def _climb(search: _Search, swaps: Swaps, start: Candidate, num_trials: int, seed: int) -> int:
    """Accept swaps that improve by more than their standard error; returns how often."""
    rng = np.random.default_rng(seed)
    current = start
    num_tried, num_accepted, idle = 0, 0, 0
    while num_tried < num_trials and idle < _IDLE_ROUNDS:
        changes = _draw(search, swaps, current, min(_BATCH, num_trials - num_tried), rng)
        if not changes:
            break
        changed = [_changed(search, current, change) for change in changes]
        search.measure(changed)
        num_tried += len(changed)
        better = _better(search, list(zip(changes, changed, strict=True)), current)
        combined = _combined(search, swaps, current, [change for change, _ in better])
        if combined is not None and num_tried < num_trials:
            search.measure([combined])
            num_tried += 1
            better += _better(search, [((), combined)], current)
        if not better:
            idle += 1
            continue
        improved = [candidate for _, candidate in better]
        current = min(improved, key=lambda candidate: mean_kl(search.losses(candidate)))
        idle, num_accepted = 0, num_accepted + 1
        kl = mean_kl(search.losses(current))
        logger.info("refine: %d allocations tried, KL %.4g", num_tried, kl)
    return num_accepted


def _changed(search: _Search, current: Candidate, change: Change) -> Candidate:
    return search.origin.candidate("swap", {**current.formats, **dict(change)})


def _draw(
    search: _Search, swaps: Swaps, current: Candidate, count: int, rng: np.random.Generator
) -> list[Change]:
    """A random sample of the unmeasured changes with the best scores."""
    untried = (
        change
        for change in swaps.proposals(current.formats)
        if _changed(search, current, change).key not in search.seen
    )
    best = list(itertools.islice(untried, _POOL * count))
    drawn = rng.permutation(len(best))[:count]
    return [best[index] for index in sorted(drawn)]


def _better(
    search: _Search, tried: Sequence[tuple[Change, Candidate]], current: Candidate
) -> list[tuple[Change, Candidate]]:
    """Changes that improve the current allocation by more than the paired standard error, best
    first."""
    better = []
    for change, candidate in tried:
        difference, error = paired_difference(search.losses(candidate), search.losses(current))
        if difference + (error or 0.0) < 0:
            better.append((change, candidate))
    return sorted(better, key=lambda pair: mean_kl(search.losses(pair[1])))


def _combined(
    search: _Search, swaps: Swaps, current: Candidate, changes: list[Change]
) -> Candidate | None:
    """All improvements of a round that touch different groups, as far as they fit together."""
    formats = dict(current.formats)
    num_merged = 0
    for change in combine(changes):
        merged = {**formats, **dict(change)}
        if swaps.fits(merged):
            formats, num_merged = merged, num_merged + 1
    combined = search.origin.candidate("swap", formats)
    return combined if num_merged > 1 and combined.key not in search.seen else None


def _racing(search: _Search, swaps: Swaps, start: Candidate) -> list[Candidate]:
    """The start, and the best allocations of the first part that beat it there."""
    limit = mean_kl(search.losses(start))
    ranked = sorted(search.seen.values(), key=lambda pair: mean_kl(pair[1]))
    better = [
        candidate
        for candidate, losses in ranked
        if mean_kl(losses) < limit and swaps.fits(candidate.formats)  # a flip alone may not fit
    ]
    return [start, *better[:_RACING]]


def _race(measure: Measure, racing: Sequence[Candidate], shards: Sequence[int]) -> Candidate:
    """The allocation with the least loss on the shards; the first of equals."""
    measured = zip(racing, measure(racing, shards), strict=True)
    return min(measured, key=lambda pair: mean_kl(pair[1]))[0]
