"""What row sampling costs in exactness: SmolLM2-135M, sampled scores against exact ones.

Same tokens, same labels. Printed per share of the rows: seconds against the exact scan's, rank
correlation with the exact scores, relative error of a score (median, largest) beside the stated
one, and for each budget the exact score of the allocation that the sampled scores choose over that
of the exact optimum.

    python benchmarks/row_sampling.py --shares 0.25 0.1
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from typing import Any

import numpy as np
import scipy.stats
from kl_prediction import make_spec, read_samples
from machine import describe_machine
from sides import CASES

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import search
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.score.scorer import Scorer

Scores = np.ndarray[Any, np.dtype[np.float64]]


def main() -> None:
    """Score exactly, then with each share; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--case", choices=sorted(CASES), default="formats")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5, 6, 8])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ref = find_model(str(find_demo_model()))
    formats = resolve_formats(CASES[options.case].formats, device="cpu")
    plan = build_plan(build_skeleton(ref), formats)
    samples = read_samples(ref, options.samples, options.seq_len)
    scorer = Scorer(dataclasses.replace(make_spec(ref, plan, "model"), step_tokens=2048))
    calibration = scorer.calibrate(samples)
    exact, _, exact_seconds = score(scorer, samples, calibration)
    results = []
    for share in options.shares:
        spec = dataclasses.replace(scorer.spec, row_share=share)
        sampled, stated, seconds = score(Scorer(spec, model=scorer.model), samples, calibration)
        errors = abs(sampled - exact) / exact
        results.append(
            {
                "share": share,
                "seconds": round(seconds, 1),
                "times_faster": round(exact_seconds / seconds, 2),
                "spearman": round(float(scipy.stats.spearmanr(sampled, exact, axis=None)[0]), 5),
                "error_median_max": [float(f"{f(errors):.2g}") for f in (np.median, np.max)],
                "stated_error_median": float(f"{np.median(stated / exact):.2g}"),
                "allocation_over_optimum": {
                    f"{bits:g} bits": round(excess(plan, sampled, exact, bits), 5)
                    for bits in options.bits
                },
            }
        )
        print(results[-1], flush=True)
    print(
        json.dumps(
            {
                **describe_machine(),
                "tokens": options.samples * options.seq_len,
                "formats": len(formats),
                "groups": len(plan.searched),
                "exact_seconds": round(exact_seconds, 1),
                "sampled": results,
            }
        )
    )


def score(
    scorer: Scorer, samples: list[list[int]], calibration: Any
) -> tuple[Scores, Scores, float]:
    """Scores (G, F) in nats per token, their sampling error, and the seconds."""
    start = time.perf_counter()
    result = scorer.score(samples, 0, calibration)
    seconds = time.perf_counter() - start
    scores = 0.5 * result.sums.elementwise_GF / result.num_tokens
    errors = 0.5 * np.sqrt(result.sums.elementwise_variance_GF) / result.num_tokens
    return scores, errors, seconds


def excess(plan: Plan, sampled: Scores, exact: Scores, bits: float) -> float:
    """Exact score of the allocation chosen from sampled scores, over the exact optimum."""
    problem = Problem.from_plan(plan.rows(), plan.summary())
    totals = []
    for scores in (sampled, exact):
        chosen = search(problem, named(plan, scores), SolveOptions(bits=bits)).formats
        values = named(plan, exact)
        totals.append(sum(values[g, f] for g, f in chosen.items() if f != NONE))
    return totals[0] / totals[1]


def named(plan: Plan, scores: Scores) -> dict[tuple[str, str], float]:
    """(group, format) -> score."""
    return {
        (group.name, format_.name): float(scores[g, f])
        for g, group in enumerate(plan.searched)
        for f, format_ in enumerate(plan.formats)
    }


if __name__ == "__main__":
    main()
