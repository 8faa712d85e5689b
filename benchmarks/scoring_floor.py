"""How near scoring is to its floor: the matrix products that must happen, at this machine's rate.

The floor counts, for every linear: calibration forward, recomputation, gradient at the input, and
one product per format on the scored rows; for the head one forward, one gradient and the formats;
and the products inside attention. Each is timed here on the shapes that it has in the model
(best of several repetitions, before and after the scan, mean of both); attention's operations are
counted at the best rate seen. With ``--profile`` the scan runs once more under torch's profiler and
the time is listed by kind of operation.

    python benchmarks/scoring_floor.py --threads 1
    python benchmarks/scoring_floor.py --threads 1 --profile
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections import Counter
from typing import Any

import torch
from kl_prediction import make_spec, read_samples
from machine import describe_machine
from sides import CASES

from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.score.scorer import Scorer

KINDS = {
    "matrix products": ("mm", "addmm", "bmm"),
    "attention": ("_scaled_dot_product",),
    "quantizers": ("clamp", "round", "amin", "amax", "FakeTensorQuant", "quantize_op", "fake_"),
    "element-wise": ("mul", "add", "sub", "div", "silu", "pow", "neg", "exp", "rsqrt"),
    "reductions": ("linalg_vector_norm", "sum", "mean", "softmax", "cumsum"),
    "copies": ("copy_", "cat", "index", "fill_", "zero", "gather", "scatter"),
}


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    ref = find_model(str(find_demo_model()))
    formats = resolve_formats(CASES["unpadded"].formats, device="cpu")
    plan = build_plan(build_skeleton(ref), formats)
    samples = read_samples(ref, options.samples, options.seq_len)
    scorer = Scorer(dataclasses.replace(make_spec(ref, plan, "model"), step_tokens=2048))
    shares = []
    for number in range(options.rounds):
        before = floor_seconds(scorer, plan, options)
        start = time.perf_counter()
        scan(scorer, samples)
        seconds = time.perf_counter() - start
        floor = (before + floor_seconds(scorer, plan, options)) / 2
        shares.append(floor / seconds)
        print(f"round {number + 1}: floor {floor:.1f} s, scan {seconds:.1f} s, {shares[-1]:.3f}")
    if options.profile:
        profile(scorer, samples)
    summary = {
        **describe_machine(),
        "threads": options.threads,
        "tokens": options.samples * options.seq_len,
        "formats": len(formats),
        "floor_over_time": round(statistics.median(shares), 3),
        "min_max": [round(min(shares), 3), round(max(shares), 3)],
    }
    print(json.dumps(summary))


def scan(scorer: Scorer, samples: list[list[int]]) -> None:
    """Calibrate and score one shard."""
    calibration = scorer.calibrate(samples, 0)
    scorer.score(samples, 0, calibration, 0)


def floor_seconds(scorer: Scorer, plan: Plan, options: argparse.Namespace) -> float:
    """Seconds of the matrix products of one scan, measured now."""
    num_tokens = options.samples * options.seq_len
    config = scorer.model.config
    seconds, rate = 0.0, 0.0
    per_row: dict[tuple[int, ...], float] = {}
    for scored in scored_modules(plan):
        (shape,) = scored.planned.shapes
        is_head = shape[0] == config.vocab_size
        if shape not in per_row:
            per_row[shape] = row_seconds(shape, 341 if is_head else 2048)
            rate = max(rate, 2 * shape[0] * shape[1] / per_row[shape])
        others = 2 if is_head else 3
        seconds += per_row[shape] * num_tokens * (others + len(plan.formats))
    # Half of QK^T and PV (causal), forward twice, backward five products for the forward's two.
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 2 * options.seq_len * width * num_tokens * config.num_hidden_layers * (2 + 2.5)
    return seconds + attention / rate


def row_seconds(shape: tuple[int, ...], num_rows: int) -> float:
    """Best time of one product per row."""
    out, width = shape
    states, weight = torch.randn(num_rows, width), torch.randn(out, width).T
    result = torch.empty(num_rows, out)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(states, weight, out=result)
        best = min(best, time.perf_counter() - start)
    return best / num_rows


def profile(scorer: Scorer, samples: list[list[int]]) -> None:
    """Print the share of each kind of operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        scan(scorer, samples)
    shares: Counter[str] = Counter()
    events: Any = profiler.key_averages()
    for event in events:
        name = event.key.removeprefix("aten::")
        kinds = (kind for kind, starts in KINDS.items() if name.startswith(starts))
        shares[next(kinds, "other (hooks, graph, Python)")] += event.self_cpu_time_total
    for kind, microseconds in shares.most_common():
        print(f"  {kind:30s} {100 * microseconds / shares.total():5.1f}%")


if __name__ == "__main__":
    main()
