"""Tests of moved scores: against scipy, against the definition, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from autoquant_ray.compare.moved_scores import (
    PairScores,
    benjamini_hochberg,
    find_moves,
    paired_stderr,
    rank_correlation,
)


def scores_of(samples_SK: np.ndarray, maximum: float = 0.0) -> PairScores:
    """Scores of shards of one token each."""
    num_shards, num_pairs = samples_SK.shape
    return PairScores(
        score_K=samples_SK.mean(axis=0),
        stderr_K=samples_SK.std(axis=0, ddof=1) / np.sqrt(num_shards),
        num_shards=num_shards,
        maxima_K=np.full(num_pairs, maximum),
    )


def test_unpaired_statistic_is_welchs_and_its_probability_no_smaller() -> None:
    draw = np.random.default_rng(0)
    before_SK = draw.normal(1e-9, 2e-10, size=(5, 30))
    after_SK = draw.normal(2e-9, 7e-10, size=(8, 30))
    moves = find_moves(scores_of(before_SK), scores_of(after_SK), 0.05)
    expected = stats.ttest_ind(after_SK, before_SK, equal_var=False)
    np.testing.assert_allclose(moves.z_K, expected.statistic, rtol=1e-9)
    assert (moves.p_K >= expected.pvalue * (1 - 1e-9)).all()


def test_error_bar_that_is_small_by_luck_counts_as_the_median() -> None:
    before = PairScores(
        score_K=np.ones(5),
        stderr_K=np.array([0.001, 0.1, 0.1, 0.1, 0.2]),
        num_shards=6,
        maxima_K=np.zeros(5),
    )
    np.testing.assert_allclose(before.cautious_stderr(), [0.1, 0.1, 0.1, 0.1, 0.2])


def test_noise_of_the_input_maximum_counts_twice() -> None:
    samples_SK = np.random.default_rng(0).normal(5, 1, size=(6, 3))
    plain, noisy = scores_of(samples_SK), scores_of(samples_SK, maximum=0.3)
    added_K = np.square(noisy.cautious_stderr()) - np.square(plain.cautious_stderr())
    np.testing.assert_allclose(added_K, np.square(0.6 * plain.score_K))


def test_paired_probability_is_that_of_the_paired_test() -> None:
    """Of a single pair, whose error bar is the median."""
    draw = np.random.default_rng(0)
    before_SK = draw.lognormal(size=(6, 1))
    after_SK = before_SK * draw.normal(1.05, 0.05, size=(6, 1))
    before, after = scores_of(before_SK), scores_of(after_SK)
    shards = [(row_K, 1) for row_K in after_SK - before_SK]
    stderr_K = paired_stderr(shards, after.score_K - before.score_K)
    moves = find_moves(before, after, 0.05, stderr_K)
    np.testing.assert_allclose(moves.p_K, stats.ttest_rel(after_SK, before_SK).pvalue, rtol=1e-9)


def test_paired_finds_a_small_move_that_the_error_bars_hide() -> None:
    draw = np.random.default_rng(0)
    before_SK = draw.lognormal(0, 0.3, size=(6, 30))
    after_SK = before_SK * 1.2
    before, after = scores_of(before_SK), scores_of(after_SK)
    stderr_K = paired_stderr(
        [(row_K, 1) for row_K in after_SK - before_SK], after.score_K - before.score_K
    )
    assert not find_moves(before, after, 0.05).is_significant_K.any()
    assert find_moves(before, after, 0.05, stderr_K).is_significant_K.any()


@pytest.mark.parametrize("num_shards", [4, 8])
def test_nothing_moved_is_rarely_called_moved(num_shards: int) -> None:
    """5% of trials by design; the normal distribution would call out most of them with 4 shards."""
    draw = np.random.default_rng(0)
    num_alarms, num_normal_alarms = 0, 0
    for _ in range(400):
        before, after = (scores_of(draw.normal(5, 1, size=(num_shards, 60))) for _ in range(2))
        moves = find_moves(before, after, 0.05)
        num_alarms += bool(moves.is_significant_K.any())
        normal_K = 2 * stats.norm.sf(np.abs(moves.z_K))
        num_normal_alarms += bool(benjamini_hochberg(normal_K, 0.05).any())
    assert num_alarms <= 32  # 20 expected; 8% is beyond chance
    assert num_normal_alarms > 3 * num_alarms


def test_benjamini_hochberg_is_its_definition() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        p_K = draw.uniform(size=12) ** draw.uniform(1, 6)
        order_K = np.argsort(p_K)
        passed = [k for k in range(12) if p_K[order_K[k]] <= (k + 1) / 12 * 0.1]
        expected_K = np.zeros(12, dtype=bool)
        expected_K[order_K[: max(passed, default=-1) + 1]] = True
        np.testing.assert_array_equal(benjamini_hochberg(p_K, 0.1), expected_K)


def test_untested_pairs_do_not_weaken_the_others() -> None:
    p_K = np.array([0.04, np.nan, np.nan])
    assert benjamini_hochberg(p_K, 0.05).tolist() == [True, False, False]
    assert not benjamini_hochberg(np.full(3, np.nan), 0.05).any()


def plain(scores: list[float], stderr: float, num_shards: int) -> PairScores:
    """Scores that all have the same error bar."""
    size = len(scores)
    return PairScores(
        score_K=np.array(scores),
        stderr_K=np.full(size, stderr),
        num_shards=num_shards,
        maxima_K=np.zeros(size),
    )


def test_equal_and_errorless_scores() -> None:
    """No change is never a move, not even without error bars' width; a change without one is."""
    moves = find_moves(plain([1.0, 1.0], 0.0, 4), plain([1.0, 2.0], 0.0, 4), 0.05)
    assert moves.z_K.tolist() == [0.0, np.inf]
    assert moves.p_K.tolist() == [1.0, 0.0]


def test_no_error_bars_is_untested() -> None:
    single_shard = plain([1.0, 1.0], np.nan, 1)
    moves = find_moves(single_shard, single_shard, 0.05)
    assert np.isnan(moves.p_K).all()
    assert not moves.is_significant_K.any()


def test_rank_correlation_needs_three_different_scores() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == 1.0
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1.0
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
