"""How sure a plan is that was solved for weighted domains.

As in :mod:`autoquant_ray.certainty`, with one difference: shards are drawn within their domain
(a stratified bootstrap), because a weight says how much a domain counts, however many of its
shards a draw would hold. A resample's score is
``sum_d w_d * 1/2 * (sum of the drawn sums of d) / (sum of their tokens)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow.compute as pc

from autoquant_ray.budget import Problem, SolveOptions
from autoquant_ray.certainty import (
    MAX_CHOICES,
    Certainty,
    as_arrays,
    bucket_sums,
    found_certainty,
)
from autoquant_ray.domain_scores import read_domain_scores
from autoquant_ray.knapsack import Floats
from autoquant_ray.run_files import DOMAIN_RESAMPLING_FILE
from autoquant_ray.stability import NUM_RESAMPLES, compare_resamples, drawn_counts
from autoquant_ray.state import RunState


def assess_weighted(
    state: RunState, problem: Problem, options: SolveOptions, formats: Mapping[str, str]
) -> Certainty | None:
    """Resample the shards of each domain behind a plan.

    Args:
        state: The run.
        problem: Its groups with their costs.
        options: What the plan was solved for, domains with their weights among it.
        formats: The plan: group -> format.

    Returns:
        None where a domain with a weight has a single bucket, for more than 100,000 (group,
        format), and where the fast solver finds no allocation.
    """
    domains = read_domain_scores(state)
    if domains is None:
        return None
    buckets = state.directory.read_table(DOMAIN_RESAMPLING_FILE, "domain_resampling")
    menu = list(dict.fromkeys(buckets.column("format").to_pylist()))
    num_groups = len(problem.searched)
    if num_groups * (len(menu) + 1) > MAX_CHOICES:
        return None
    totals_BGF = np.zeros((NUM_RESAMPLES, num_groups, len(menu) + 1))
    num_buckets = 0
    for number, (name, weight) in enumerate(options.domains.items()):
        own = buckets.filter(pc.equal(buckets.column("domain"), name))
        sums_SGF = bucket_sums(own, problem, menu)
        tokens_S = own.column("bucket_tokens").to_numpy()[:: len(own) // len(sums_SGF)]
        if len(tokens_S) < 2:
            return None
        totals_BGF += weight * _resampled_scores(sums_SGF, tokens_S, number)
        num_buckets += len(tokens_S)
    scores = domains.weighted(options.domains)
    costs, truth = as_arrays(problem, scores, options, formats, menu)
    found = compare_resamples(costs, truth, totals_BGF)
    if found is None:
        return None
    return found_certainty(problem, formats, menu, truth, found, num_buckets)


def _resampled_scores(sums_SGF: Floats, tokens_S: Floats, seed: int) -> Floats:
    """Scores (B, G, F) of one domain from as many of its buckets as there are, drawn anew."""
    counts_BS = drawn_counts(len(tokens_S), (0, seed, len(tokens_S)), NUM_RESAMPLES)
    sums_BGF = np.zeros((NUM_RESAMPLES, *sums_SGF.shape[1:]))
    for counts_B, sums_GF in zip(counts_BS.T, sums_SGF, strict=True):
        sums_BGF += counts_B[:, None, None] * sums_GF
    tokens_B = (counts_BS * tokens_S).sum(axis=1)
    scores_BGF: Floats = 0.5 * sums_BGF / tokens_B[:, None, None]
    return scores_BGF
