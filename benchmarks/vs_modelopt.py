"""Our scoring core against ``mtq.auto_quantize`` on the same work, each in its own process.

Same model (SmolLM2-135M, float32), same unpadded batches, same four formats, same number of
threads; labels from the data, so that both compute the same scores. The two alternate; the ratio
is taken per round. The largest relative score difference stands beside it, with ModelOpt's clamp
along its sorted formats applied to our scores. Loading the model is not counted.

    python benchmarks/vs_modelopt.py --rounds 3 --batches 4 --batch 2 --seq-len 256
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from kl_prediction import read_samples
from machine import describe_machine

from autoquant_ray.calibration import merge_statistics, to_maxima
from autoquant_ray.demo import find_demo_model
from autoquant_ray.engine import Engine, EngineSpec
from autoquant_ray.formats import resolve_formats
from autoquant_ray.models import ModelRef, build_skeleton, find_model, load_model
from autoquant_ray.plan import build_plan
from autoquant_ray.sensitivity import scored_modules

FORMATS = (
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)


def main() -> None:
    """Alternate the two sides and print each round and the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", choices=["ours", "modelopt"], help="Run one side only.")
    options = parser.parse_args()
    if options.side:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        print(json.dumps((run_ours if options.side == "ours" else run_modelopt)(options)))
        return
    rounds = []
    for number in range(options.rounds):
        sides = {side: run_side(side, options) for side in ("modelopt", "ours")}
        ratio = sides["modelopt"]["seconds"] / sides["ours"]["seconds"]
        rounds.append((sides, ratio))
        texts = [f"{s} {v['seconds']:.1f} s {v['peak_gib']:.2f} GiB" for s, v in sides.items()]
        print(f"round {number + 1}: {'; '.join(texts)}; ratio {ratio:.2f}", flush=True)
    ratios = [ratio for _, ratio in rounds]
    memory = [s["ours"]["peak_gib"] / s["modelopt"]["peak_gib"] for s, _ in rounds]
    summary = {
        **describe_machine(),
        "threads": options.threads,
        "tokens": options.batches * options.batch * options.seq_len,
        "times_faster": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
        "memory_share": statistics.median(memory),
        "largest_relative_score_difference": largest_difference(rounds[0][0]),
    }
    print(json.dumps(summary))


def run_side(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a new process."""
    arguments = [sys.executable, __file__, "--side", side]
    for name in ("batches", "batch", "seq_len", "threads"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def read_batches(ref: ModelRef, options: argparse.Namespace) -> list[list[list[int]]]:
    """Batches of full windows."""
    samples = read_samples(ref, options.batches * options.batch, options.seq_len)
    return [samples[i : i + options.batch] for i in range(0, len(samples), options.batch)]


def finish(start: float, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Seconds since the start, this process' peak memory, and the scores."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    return {"seconds": time.perf_counter() - start, "peak_gib": peak, "scores": scores}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and score; scores in ModelOpt's scale."""
    ref = find_model(str(find_demo_model()))
    batches = read_batches(ref, options)
    plan = build_plan(build_skeleton(ref), resolve_formats(FORMATS, device="cpu"))
    spec = EngineSpec(
        model=ref,
        dtype="float32",
        device="cpu",
        num_threads=options.threads,
        modules=scored_modules(plan),
        formats=plan.formats,
        step_tokens=options.batch * options.seq_len,
        labels="data",
        label_draws=1,
        seed=0,
    )
    engine = Engine(spec)
    start = time.perf_counter()
    maxima = to_maxima(merge_statistics(engine.calibrate(batch) for batch in batches))
    total: Any = 0.0
    for batch in batches:
        result = engine.score(batch, 0, maxima)
        total = total + result.sums.elementwise_GF / result.num_tokens**2
    scores = {
        group.name: dict(zip(FORMATS, map(float, total[index]), strict=True))
        for index, group in enumerate(plan.searched)
    }
    return finish(start, scores)


def run_modelopt(options: argparse.Namespace) -> dict[str, Any]:
    """``mtq.auto_quantize`` with all formats in one search."""
    import modelopt.torch.quantization as mtq

    ref = find_model(str(find_demo_model()))
    batches = [torch.tensor(batch) for batch in read_batches(ref, options)]
    model = load_model(ref, dtype="float32", device="cpu")

    def loss_func(output: Any, ids: torch.Tensor) -> torch.Tensor:
        logits = output.logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    start = time.perf_counter()
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 8.0},
        quantization_formats=[getattr(mtq, name) for name in FORMATS],
        data_loader=batches,
        forward_step=lambda model, ids: model(input_ids=ids, use_cache=False),
        loss_func=loss_func,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        verbose=False,
    )
    scores = {
        name.removesuffix(".quant_recipe"): {
            str(recipe).partition("(")[0]: float(score)
            for recipe, score in zip(stats["formats"], stats["scores"], strict=True)
        }
        for name, stats in state["candidate_stats"].items()
    }
    return finish(start, scores)


def largest_difference(sides: dict[str, dict[str, Any]]) -> float:
    """Over all groups and formats, after ModelOpt's running minimum along its formats."""
    largest = 0.0
    for group, theirs in sides["modelopt"]["scores"].items():
        lowest = float("inf")
        for name, score in theirs.items():
            if name in FORMATS:
                lowest = min(lowest, sides["ours"]["scores"][group][name])
                largest = max(largest, abs(lowest - score) / score)
    return largest


if __name__ == "__main__":
    main()
