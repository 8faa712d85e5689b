"""What row sampling costs in exactness: sampled scores against exact ones, real or random model.

Same tokens, same labels, the same shards. Printed per share of the rows, or for ``auto``: rows
multiplied under all formats (a product of a row with a weight counts as many times as it has
elements) against the exact scan's, CPU seconds against the exact scan's, rank correlation with the
exact scores, relative error of a score (median, largest) beside the stated one, the error of the
draw over the standard error over the shards (median, 99%, largest: ``auto`` promises a tenth), and
for each budget the exact score of the allocation that the sampled scores choose over that of the
exact optimum, minus 1.

    python benchmarks/row_sampling.py --shares 0.1 0.25 auto
    python benchmarks/row_sampling.py --shares 0.25 auto --model random-moe --case unpadded
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import scipy.stats
import torch
from kl_prediction import make_spec, read_samples
from machine import describe_machine
from sides import CASES, score_shards

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import search
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.config.values import parse_row_share
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef, find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.quantize.calibration import merge_calibrations
from autoquant_ray.score.scorer import Scorer

Scores = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of a scan in nats per token, ``(G, F)``.

    Attributes:
        scores: The scores.
        drawing_errors: Standard errors of the draw.
        errors: Standard errors over the shards.
        shares: Share of the rows that was scored.
        seconds: CPU seconds.
    """

    scores: Scores
    drawing_errors: Scores
    errors: Scores
    shares: Scores
    seconds: float


def main() -> None:
    """Score exactly, then with each share; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=parse_row_share, nargs="+", default=[0.25, 0.1, "auto"])
    parser.add_argument("--case", choices=sorted(CASES), default="formats")
    parser.add_argument("--model", choices=("smollm2", "random-moe"), default="smollm2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--shard-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5, 6, 8])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(describe_machine() | measure(options, folder)))


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """All shares against the exact scan."""
    demo = find_model(str(find_demo_model()))
    ref = demo if options.model == "smollm2" else save_random_moe(folder)
    formats = resolve_formats(CASES[options.case].formats, device="cpu")
    plan = build_plan(build_skeleton(ref), formats)
    samples = read_samples(demo, options.samples, options.seq_len)
    size = build_skeleton(ref).config.vocab_size
    samples = [[token % size for token in sample] for sample in samples]
    shards = [
        samples[i : i + options.shard_samples]
        for i in range(0, len(samples), options.shard_samples)
    ]
    spec = dataclasses.replace(make_spec(ref, plan, "model"), step_tokens=2048)
    scorer = Scorer(spec)
    calibration = merge_calibrations([scorer.calibrate(shard) for shard in shards])
    exact = score(scorer, shards, calibration)
    results = []
    for share in options.shares:
        shared = Scorer(dataclasses.replace(spec, row_share=share), model=scorer.model)
        results.append({"share": share} | compared(score(shared, shards, calibration), exact, plan))
        results[-1]["allocation_over_optimum"] = {
            f"{bits:g} bits": round(excess(plan, results[-1]["scores"], exact.scores, bits) - 1, 6)
            for bits in options.bits
        }
        del results[-1]["scores"]
        print(results[-1], flush=True)
    return {
        "model": options.model,
        "tokens": options.samples * options.seq_len,
        "shards": len(shards),
        "formats": len(formats),
        "groups": len(plan.searched),
        "exact_cpu_seconds": round(exact.seconds, 1),
        "error_over_shards_median": float(f"{np.median(exact.errors / exact.scores):.2g}"),
        "sampled": results,
    }


def save_random_moe(folder: str) -> ModelRef:
    """A random Qwen3-MoE whose embeddings and routers are as uneven as trained ones are."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=4096,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.mul_(torch.randn(len(embedding), 1).mul_(0.7).exp_())
        model.get_output_embeddings().weight.mul_(8.0)
    model.save_pretrained(folder)
    return find_model(folder)


def score(scorer: Scorer, shards: list[list[Any]], calibration: Any) -> Scored:
    """Score all shards."""
    start = time.process_time()
    results = list(score_shards(scorer, shards, len(shards[0]), calibration))
    seconds = time.process_time() - start
    tokens_S = np.array([result.num_tokens for result in results], dtype=np.float64)
    sums_SGF = np.stack([0.5 * result.sums.elementwise_GF for result in results])
    variances_GF = sum(0.25 * result.sums.elementwise_variance_GF for result in results)
    scores_GF = sums_SGF.sum(axis=0) / tokens_S.sum()
    squares_GF = np.square(sums_SGF - scores_GF * tokens_S[:, None, None]).sum(axis=0)
    return Scored(
        scores=scores_GF,
        drawing_errors=np.sqrt(variances_GF) / tokens_S.sum(),
        errors=np.sqrt(len(shards) / (len(shards) - 1) * squares_GF) / tokens_S.sum(),
        shares=np.average([result.row_shares_GF for result in results], axis=0, weights=tokens_S),
        seconds=seconds,
    )


def compared(sampled: Scored, exact: Scored, plan: Plan) -> dict[str, Any]:
    """How sampled scores are beside exact ones."""
    weights_G = np.array([group.num_weights for group in plan.searched], dtype=np.float64)
    errors = abs(sampled.scores - exact.scores) / exact.scores
    ratios = sampled.drawing_errors / exact.errors
    rank = scipy.stats.spearmanr(sampled.scores, exact.scores, axis=None)[0]
    return {
        "row_products": round(float(np.average(sampled.shares.mean(axis=1), weights=weights_G)), 3),
        "cpu_seconds": round(sampled.seconds, 1),
        "times_faster": round(exact.seconds / sampled.seconds, 2),
        "spearman": round(float(rank), 6),
        "error_median_max": [float(f"{f(errors):.2g}") for f in (np.median, np.max)],
        "stated_error_median": float(f"{np.median(sampled.drawing_errors / exact.scores):.2g}"),
        "of_error_over_shards": [float(f"{np.quantile(ratios, q):.2g}") for q in (0.5, 0.99, 1)],
        "scores": sampled.scores,
    }


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
