"""The order of changes from a backward pass: against measured flips, and where pairs interact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from evaluations import measured_as
from laboratory import NUM_SHARDS, Laboratory
from scipy.stats import spearmanr

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.evaluate.allocation_search import search_allocations
from autoquant_ray.evaluate.flip_estimates import Flip, FlipEstimates, flip_rows, merge_flips
from autoquant_ray.evaluate.flip_estimator import ShardFlips
from autoquant_ray.evaluate.rescoring import choose_flips, solve_flips
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.evaluate.swaps import Change, Swaps
from autoquant_ray.evaluate.table import mean_kl
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.names import FLIPS
from autoquant_ray.runs.schemas import schema_of
from autoquant_ray.runs.state import RunState
from autoquant_ray.score.flip_hooks import FlipSums

OPTIONS = SolveOptions(bits=6.0)
WEIGHT_FORMATS = ("wint4_afp16:max", "wint8_afp16", "wfp8_afp16")
INPUT_FORMATS = ("wint4_aint4:max", "wint4_afp16:max", "wint8_aint8")


def rank_correlations(laboratory: Laboratory, formats: Mapping[str, str]) -> tuple[float, float]:
    """Of the scores, and of the backward pass, with every single flip measured on other tokens."""
    origin = laboratory.starting_point(OPTIONS)
    start = origin.candidate("start", formats)
    changes = laboratory.estimate(start, range(2)).changes
    flips = list(changes)
    assert len(flips) == len(laboratory.names) * len(laboratory.menu)
    flipped = [origin.candidate("flip", {**formats, **dict([flip])}) for flip in flips]
    before, *after = laboratory.measure([start, *flipped], range(2, NUM_SHARDS))
    measured = [mean_kl(losses) - mean_kl(before) for losses in after]
    losses = laboratory.scores | {(group, NONE): 0.0 for group in laboratory.names}
    scores = [losses[flip] - losses[flip[0], formats[flip[0]]] for flip in flips]
    predicted = [changes[flip] for flip in flips]
    return spearmanr(scores, measured).statistic, spearmanr(predicted, measured).statistic


@pytest.mark.parametrize("menu", [WEIGHT_FORMATS, INPUT_FORMATS], ids=["weights", "inputs"])
def test_backward_pass_orders_flips_where_the_scores_do_not(
    menu: tuple[str, ...], make_scorer: Any, make_samples: Any
) -> None:
    """Around the coarsest allocation; around solutions and random ones as well as the scores."""
    prepared = make_scorer("llama", menu, labels="model")
    laboratory = Laboratory(prepared, make_samples, menu)
    rng = np.random.default_rng(0)
    starts = [dict.fromkeys(laboratory.names, menu[0])]
    starts += [laboratory.starting_point(SolveOptions(bits=bits)).formats for bits in (5.0, 8.0)]
    starts += [{name: menu[rng.integers(2)] for name in laboratory.names} for _ in range(4)]
    ranks = np.array([rank_correlations(laboratory, formats) for formats in starts])
    assert ranks[0, 1] > ranks[0, 0] + 0.02
    assert ranks[:, 1].mean() > ranks[:, 0].mean() - 0.002
    assert ranks[:, 1].min() > 0.85


def test_search_by_backward_pass_is_deterministic_and_never_worse(laboratory: Laboratory) -> None:
    start = laboratory.starting_point(SolveOptions(bits=6.0))
    shards: list[Sequence[int]] = []

    def estimate(candidate: Candidate, of: Sequence[int]) -> FlipEstimates:
        shards.append(of)
        assert candidate.formats == start.formats
        return laboratory.estimate(candidate, of)

    first, second = (
        search_allocations(laboratory.measure, NUM_SHARDS, start, num_trials=24, estimate=estimate)
        for _ in range(2)
    )
    assert first.winner == second.winner
    assert shards == [[2], [2]]
    on_first = laboratory.measure([first.winner, first.start], range(2))
    assert mean_kl(on_first[0]) <= mean_kl(on_first[1])


def part(shard: ShardFlips, groups: Sequence[str], formats: Sequence[str]) -> pa.Table:
    rows = flip_rows(shard, groups, formats)
    return pa.Table.from_pylist(rows, schema=schema_of(f"{FLIPS}/shard-000000.parquet"))


def test_shards_are_added_in_their_order() -> None:
    rng = np.random.default_rng(0)
    common_FF = rng.normal(size=(3, 3))
    shards = [
        ShardFlips(
            sums=FlipSums(
                slope_GF=rng.normal(size=(3, 3)),
                curvature_GF=rng.random((3, 3)),
                interactions={(0, 2): 10 * common_FF + 0.1 * rng.normal(size=(3, 3))},
            ),
            kl=0.0,  # curvatures count by half
            num_tokens=num_tokens,
        )
        for num_tokens in (10, 30)
    ]
    formats = {"a": "x", "b": "y", "c": NONE}
    merged = merge_flips([part(shard, "abc", "xy") for shard in shards], formats)
    names = ("x", "y", NONE)
    assert set(merged.changes) == {(g, f) for g in "abc" for f in names if formats[g] != f}
    for (group, name), change in merged.changes.items():
        place = "abc".index(group), names.index(name)
        sums = [shard.sums.slope_GF[place] + shard.sums.curvature_GF[place] / 2 for shard in shards]
        assert change == pytest.approx(sum(sums) / 40)
    pairs = {pair for pair in merged.interactions if pair[0][0] == "a"}
    assert pairs
    for first, second in pairs:
        place = names.index(first[1]), names.index(second[1])
        expected = sum(shard.sums.interactions[0, 2][place] for shard in shards) / 2 / 40
        assert merged.interactions[first, second] == pytest.approx(expected)
        assert merged.interactions[second, first] == merged.interactions[first, second]


@pytest.mark.parametrize(
    ("power", "weight"), [(2.0, 0.5), (1.5, 0.1875), (1.2, 0.06), (0.9, 0.0), (2.5, 0.5)]
)
def test_curvature_counts_less_where_the_loss_grows_more_slowly(
    power: float, weight: float
) -> None:
    """Undoing all quantization has the slope ``-p KL``."""
    kl = 0.5
    sums = FlipSums(
        slope_GF=np.array([[0.0, 0.25, -0.2 * power * kl], [0.0, 0.25, -0.8 * power * kl]]),
        curvature_GF=np.array([[0.0, 0.125, 0.0], [0.0, 0.0, 0.5]]),
        interactions={(0, 1): np.array([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])},
    )
    shard = ShardFlips(sums=sums, kl=kl, num_tokens=2)
    merged = merge_flips([part(shard, "ab", "xy")] * 2, {"a": "x", "b": "x"})
    assert merged.changes["a", "y"] == pytest.approx((0.25 + weight * 0.125) / 2)
    assert merged.changes["b", NONE] == pytest.approx((-0.8 * power * kl + weight * 0.5) / 2)
    interaction = merged.interactions.get((("a", "y"), ("b", "y")), 0.0)
    assert interaction == pytest.approx(weight)


def test_weak_interactions_do_not_count() -> None:
    sums = FlipSums(
        slope_GF=np.ones((2, 3)),
        curvature_GF=np.zeros((2, 3)),
        interactions={(0, 1): np.array([[0.0, 0.0, 0.0], [0.0, 0.39, 0.41], [0.0, -0.39, -0.41]])},
    )
    alone = part(ShardFlips(sums=sums, kl=0.0, num_tokens=1), "ab", "xy")
    merged = merge_flips([alone] * 2, {"a": "x", "b": "x"})
    pairs = {(("a", "y"), ("b", NONE)), (("a", NONE), ("b", NONE))}
    assert set(merged.interactions) == pairs | {(b, a) for a, b in pairs}
    assert merge_flips([alone], {"a": "x", "b": "x"}).interactions == {}


@pytest.mark.parametrize(("spread", "counts"), [(0.9, True), (1.1, False)])
def test_interactions_that_shards_do_not_agree_on_do_not_count(spread: float, counts: bool) -> None:
    """Of 4 shards of mean 1 and standard deviation ``spread``: the error of the sum is twice it."""
    offsets = spread * np.sqrt(3) / 2 * np.array([1, -1, 1, -1])
    parts = [
        part(
            ShardFlips(
                sums=FlipSums(
                    slope_GF=np.ones((2, 2)),
                    curvature_GF=np.zeros((2, 2)),
                    interactions={(0, 1): np.full((2, 2), 1 + offset)},
                ),
                kl=0.0,
                num_tokens=1,
            ),
            "ab",
            "x",
        )
        for offset in offsets
    ]
    assert bool(merge_flips(parts, {"a": "x", "b": "x"}).interactions) == counts


@pytest.fixture
def problem(make_run: Any) -> tuple[Problem, dict[Flip, float]]:
    run = ScoredRun.read(RunState.open(make_run()))
    return run.problem, run.scores


def neighbours(problem: Problem) -> list[tuple[str, str]]:
    """gate_up and down of each layer."""
    names = [group.name for group in problem.searched]
    pairs = zip(
        [name for name in names if "gate" in name],
        [name for name in names if "down" in name],
        strict=True,
    )
    return list(pairs)


def interactions_of(problem: Problem, formats: Mapping[str, str], seed: int) -> dict[Any, float]:
    rng = np.random.default_rng(seed)
    menu = [NONE, *next(iter(problem.searched)).rows]
    interactions = {}
    for a, b in neighbours(problem):
        for fa, fb in itertools.product(dict.fromkeys(menu), repeat=2):
            if fa != formats[a] and fb != formats[b]:
                value = float(rng.normal())
                interactions[(a, fa), (b, fb)] = interactions[(b, fb), (a, fa)] = value
    return interactions


def test_proposals_are_ordered_by_scores_and_interactions(problem: Any) -> None:
    groups, scores = problem
    formats = search(groups, scores, OPTIONS).formats
    interactions = interactions_of(groups, formats, seed=1)
    around = {pair: 3 * score for pair, score in scores.items()}
    swaps = Swaps(groups, scores, OPTIONS, around, interactions)
    pairs = neighbours(groups)

    def loss(allocation: Mapping[str, str]) -> float:
        alone = sum(0.0 if f == NONE else around[g, f] for g, f in allocation.items())
        together = [((a, allocation[a]), (b, allocation[b])) for a, b in pairs]
        return alone + sum(interactions.get(pair, 0.0) for pair in together)

    # A change of a group whose partner has changed before counts their interaction too.
    moved = {**formats, **dict(next(m for m in swaps.moves(formats) if len(m) == 2))}
    for start in (formats, moved):
        for move in swaps.moves(start):
            assert swaps.gain(move, start) == pytest.approx(
                loss({**start, **dict(move)}) - loss(start)
            )
    proposals = list(swaps.proposals(formats))
    assert len({frozenset(change) for change in proposals}) == len(proposals)
    assert max(map(len, proposals)) > 2
    assert all(swaps.fits({**formats, **dict(change)}) for change in proposals)
    losses = [loss({**formats, **dict(change)}) for change in proposals]
    assert losses == pytest.approx(sorted(losses))


@pytest.mark.parametrize("seed", range(4))
def test_plan_from_flips_counts_pairs_that_were_measured_together(problem: Any, seed: int) -> None:
    """Against all combinations of what was measured."""
    groups, scores = problem
    formats = search(groups, scores, OPTIONS).formats
    rng = np.random.default_rng(seed)
    swaps = Swaps(groups, scores, OPTIONS, None, interactions_of(groups, formats, seed=1))
    moves = swaps.moves(formats)
    singles, couples = ([m for m in moves if len(m) == size] for size in (1, 2))
    chosen = [singles[i] for i in rng.permutation(len(singles))[:8]]
    chosen += [couples[i] for i in rng.permutation(len(couples))[:4]]
    differences = dict(zip(chosen, rng.normal(size=len(chosen)).tolist(), strict=True))
    (budget,) = groups.budgets(OPTIONS)

    def loss(allocation: Mapping[str, str]) -> float:
        total = 0.0
        left = {g: (g, f) for g, f in allocation.items() if f != formats[g]}
        for a, b in neighbours(groups):
            if a in left and b in left and (left[a], left[b]) in differences:
                total += differences[left.pop(a), left.pop(b)]
        return total + sum(differences.get((flip,), math.inf) for flip in left.values())

    menus = {
        name: {format_, *(f for change in chosen for g, f in change if g == name)}
        for name, format_ in formats.items()
    }
    best = min(
        loss(allocation)
        for combination in itertools.product(*menus.values())
        if sum(
            group.cost(
                (allocation := dict(zip(menus, combination, strict=True)))[group.name],
                budget.resource,
            )
            for group in groups.searched
        )
        <= budget.limit
    )
    solved = solve_flips(groups, OPTIONS, formats, differences)
    assert best < 0
    assert loss(solved) == pytest.approx(best)
    assert list(solved) == list(formats)


def test_pair_that_only_gains_together_is_tried_together(problem: Any) -> None:
    """Each of its flips alone loses; no order of single flips would find the pair in few trials."""
    groups, scores = problem
    options = SolveOptions(bits=9.0)
    start = search(groups, scores, options).formats
    swaps = Swaps(groups, scores, options)
    flips = [move[0] for move in swaps.moves(start)]
    pair: Change = next(
        (first, second)
        for first, second in itertools.product(flips, repeat=2)
        if (first[0], second[0]) in neighbours(groups)
        and swaps.fits({**start, **dict([first, second])})
    )
    changes = {move[0]: 0.1 for move in swaps.moves(start)}
    interactions = {pair: -1.0, pair[::-1]: -1.0}

    def loss(formats: Mapping[str, str]) -> float:
        changed = [changes[flip] for flip in formats.items() if start[flip[0]] != flip[1]]
        return 2.0 + sum(changed) - (1.0 if {*pair} <= {*formats.items()} else 0.0)

    measure = measured_as(loss)
    origin = StartingPoint(problem=groups, scores=scores, options=options, formats=start)

    def refined(estimates: FlipEstimates | None) -> float:
        result = search_allocations(
            measure, 4, origin, num_trials=4, estimate=lambda _, __: estimates
        )
        return loss(result.winner.formats)

    together = FlipEstimates(changes=changes, interactions=interactions)
    assert refined(together) == pytest.approx(1.2)
    assert refined(FlipEstimates(changes=changes)) == refined(None) == 2.0
    around = Swaps(groups, scores, options, changes, interactions)
    assert choose_flips(around, start, 1) == [pair]
