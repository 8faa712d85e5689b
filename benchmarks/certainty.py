"""How sure solutions are by two solvers of the resamples, and the regret that is stated of them.

For every run and budget: groups that are certain and coin tosses where resamples are solved by the
greedy sweep along the hulls, and where they are solved as exactly as the plan, which is the exact
one in both. Coin tosses of the greedy solver whose format exact resamples keep in 95% are named.
Then the stated regret beside the true one, where the truth is known: made-up scores, of which
shards are drawn. Prints a table, and the machine as the last line of JSON.

    python benchmarks/certainty.py runs/demo runs/other --bits 5 6
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
from machine import describe_machine

from autoquant_ray.allocate.certainty.resampling import Stability, assess, drawn_counts
from autoquant_ray.allocate.certainty.solution import (
    CERTAIN,
    COIN_TOSS,
    bucket_sums,
    unscored_knapsack,
)
from autoquant_ray.allocate.knapsack.greedy import relax
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.solve import solve_knapsack
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.arrays import Floats, Indices
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import RESAMPLING_FILE
from autoquant_ray.runs.state import RunState

_TRUTHS = [(shards, shape) for shards in (4, 8, 24) for shape in (0.8, 4.0)]
"""Shards, and shape of the gamma noise of a shard's scores: the smaller, the noisier."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="Scored runs.")
    parser.add_argument("--bits", type=float, nargs="+", default=[5.0, 6.0])
    parser.add_argument("--models", type=int, default=40, help="Made-up models per row.")
    options = parser.parse_args()
    cases = [compare(path, bits) for path in options.runs for bits in options.bits]
    truths = [regrets(shards, shape, options.models) for shards, shape in _TRUTHS]
    print(json.dumps({**describe_machine(), "cases": cases, "regrets": truths}))


def compare(path: str, bits: float) -> dict[str, Any]:
    """Greedy and exact resamples of one budget of a run."""
    directory = RunDirectory(path)
    run = ScoredRun.read(RunState.open(directory))
    problem, options = run.problem, SolveOptions(bits=bits)
    formats = search(problem, run.scores, options).formats
    plan_G = problem.menus.columns_of(formats)
    knapsack = unscored_knapsack(problem, run.scores, options, formats)
    sums_SGF = bucket_sums(directory.read_table(RESAMPLING_FILE), problem)
    seed = (0, len(sums_SGF))
    exact = assess(knapsack, sums_SGF, seed, plan_G=plan_G)
    assert exact is not None
    greedy_B, greedy_regret = greedy_resamples(knapsack, sums_SGF, seed, exact.num_resamples)
    kept_G = (np.array(greedy_B) == plan_G).mean(axis=0)
    exact_G = exact.share_of(plan_G)
    wrongly = np.flatnonzero((kept_G < COIN_TOSS) & (exact_G >= CERTAIN))
    row = {
        "run": path,
        "bits": bits,
        "shards": len(sums_SGF),
        "groups": len(plan_G),
        "greedy_certain": int((kept_G >= CERTAIN).sum()),
        "exact_certain": int((exact_G >= CERTAIN).sum()),
        "greedy_tosses": int((kept_G < COIN_TOSS).sum()),
        "exact_tosses": int((exact_G < COIN_TOSS).sum()),
        "wrong_tosses": [problem.menus.names[number] for number in wrongly.tolist()],
        "greedy_regret": greedy_regret,
        "exact_regret": exact.expected_regret,
    }
    print(
        f"{path}, {bits:g} bits, {row['shards']} shards, {row['groups']} groups: certain "
        f"{row['greedy_certain']} greedy, {row['exact_certain']} exact; coin tosses "
        f"{row['greedy_tosses']} ({len(wrongly)} of them certain), {row['exact_tosses']}; "
        f"regret {greedy_regret:.3%}, {exact.expected_regret:.3%}",
        flush=True,
    )
    return row


def greedy_resamples(
    knapsack: Knapsack, sums_SGF: Floats, seed: tuple[int, int], count: int
) -> tuple[list[Indices], float]:
    """The greedy allocation of every resample, and its mean regret against the greedy plan's."""
    total_GF = sums_SGF.sum(axis=0)
    truth = replace(knapsack, scores_GF=knapsack.scores_GF + total_GF)
    plan_G = greedy(truth)
    columns_BG, losses = [], []
    for counts_S in drawn_counts(len(sums_SGF), seed, count):
        scores_GF = np.tensordot(counts_S.astype(np.float64), sums_SGF, axes=1)
        columns_BG.append(greedy(replace(knapsack, scores_GF=knapsack.scores_GF + scores_GF)))
        losses.append(max(0.0, truth.score(columns_BG[-1]) - truth.score(plan_G)))
    return columns_BG, float(np.mean(losses)) / truth.score(plan_G)


def greedy(knapsack: Knapsack) -> Indices:
    """The sweep along the hulls, then every later step that fits."""
    relaxed = relax(knapsack)
    assert relaxed is not None
    return relaxed.answer.columns_G


def regrets(num_shards: int, shape: float, num_models: int) -> dict[str, Any]:
    """Mean stated and true regret over made-up models of 40 groups."""
    generator = np.random.default_rng(num_shards)
    true, stated, sweeping = [], [], []
    for number in range(num_models):
        truth, knapsack = made_up_model(generator)
        noise_SGF = generator.gamma(shape, 1 / shape, (num_shards, *truth.scores_GF.shape))
        hardness_S11 = generator.gamma(4.0, 0.25, (num_shards, 1, 1))
        sums_SGF = hardness_S11 * noise_SGF * truth.scores_GF
        seed = (number, num_shards)
        exact: Stability | None = assess(knapsack, sums_SGF, seed, num_resamples=40)
        best = solve_knapsack(truth)
        assert exact is not None
        assert best is not None
        true.append(truth.score(exact.columns_G) / best.score - 1)
        stated.append(exact.expected_regret)
        sweeping.append(greedy_resamples(knapsack, sums_SGF, seed, 40)[1])
    row = {
        "shards": num_shards,
        "noise": shape**-0.5,
        "true": float(np.mean(true)),
        "stated": float(np.mean(stated)),
        "greedy": float(np.mean(sweeping)),
    }
    print(
        f"{num_shards} shards, noise {row['noise']:.0%} of a shard's scores: true regret "
        f"{row['true']:.2%}, stated {row['stated']:.2%}, by the greedy solver {row['greedy']:.2%}",
        flush=True,
    )
    return row


def made_up_model(generator: np.random.Generator) -> tuple[Knapsack, Knapsack]:
    """True scores under costs and a limit of 6 bits, and the same without scores."""
    weights_G1 = generator.choice([1.0, 2.0, 3.0, 8.0], size=(40, 1))
    bits_F = np.array([4.125, 5.25, 6.25, 8.0, 16.0])
    scores_GF = weights_G1 * 10 ** generator.uniform(-5, -3, (40, 1)) * 4.0 ** (4 - bits_F)
    scores_GF = scores_GF * generator.lognormal(0.0, 0.3, scores_GF.shape)
    scores_GF[:, -1] = 0.0
    truth = Knapsack(
        scores_GF=scores_GF,
        costs_RGF=(weights_G1 * bits_F)[None],
        limits_R=np.array([6 * float(weights_G1.sum())]),
    )
    return truth, replace(truth, scores_GF=np.zeros_like(scores_GF))


if __name__ == "__main__":
    main()
