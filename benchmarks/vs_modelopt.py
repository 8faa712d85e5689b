"""Our scan against ``mtq.auto_quantize`` on the same work, each side in its own process.

Same model, same data, same formats, same number of threads; labels from the data, so that both
compute the same scores. The sides alternate; the ratio is taken per round. The largest relative
score difference stands beside it, with ModelOpt's clamp along its sorted formats applied to our
scores, so that speed is never bought with wrong numbers. Loading the model is not counted.

Cases: ``unpadded`` (full windows, 4 presets), ``formats`` (full windows, 12 pairs), ``captions``
(short captions, which ModelOpt's side pads to 512 tokens as its users do, 4 presets), ``fp4`` (full
windows, NVFP4 and MXFP4), ``weight-only`` (full windows, int4, int8, FP8 and NVFP4 weights).
Sides: ``modelopt``, ``core`` (our scoring core in its process), ``ray`` (the whole scan with one
worker), and ``core:0.25`` or ``ray:0.25`` with that share of the rows; ``core:auto`` or
``ray:auto`` with a share per group and format, which needs four shards at least. Graphs are kept as
``auto`` says; ``core+0`` keeps none, ``core+4`` 4 GiB of them, ``core+4:0.25`` is both;
``core@bfloat16`` multiplies for output differences in that type (``core+4@int8+bfloat16:0.25``).

    python benchmarks/vs_modelopt.py --case unpadded --sides core,core:0.25,ray
    python benchmarks/vs_modelopt.py --case formats --sides core,core:0.1 --samples 4
    python benchmarks/vs_modelopt.py --case formats --sides core,core:auto --samples 64 \\
        --shard-samples 4 --seq-len 256
    python benchmarks/vs_modelopt.py --case captions --sides core --samples 128 --batch 8 \\
        --random-model
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import numpy as np
import scipy.stats
import torch
from machine import describe_machine
from sides import CASES, side

from autoquant_ray.distributed.host_memory import ENVIRONMENT

OPTIONS = (
    "case",
    "device",
    "dtype",
    "samples",
    "batch",
    "shard_samples",
    "seq_len",
    "step_tokens",
    "threads",
    "workers",
)


def main() -> None:
    """Alternate the sides and print each round and the summary as the last line of JSON."""
    options = parse()
    if options.side:
        warnings.simplefilter("ignore")
        print(json.dumps(side(options.side, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.random_model:
            options.model = folder
            save_random_model(folder, "small")
        rounds = [run_round(number + 1, options) for number in range(options.rounds)]
    names = options.sides.split(",")
    summary = {
        **describe_machine(),
        "case": options.case,
        "model": "random Qwen3 of 2 layers"
        if options.random_model
        else options.model or "SmolLM2-135M",
        "formats": len(CASES[options.case].formats),
        "threads": options.threads,
        "samples": options.samples,
        "batch": options.batch,
        "modelopt_seconds": [round(results["modelopt"]["seconds"], 1) for results in rounds],
        "sides": {name: summarize(name, rounds) for name in names},
    }
    print(json.dumps(summary))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(CASES), default="unpadded")
    parser.add_argument("--sides", default="core", help="Ours, separated by commas.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="Samples per batch.")
    parser.add_argument(
        "--shard-samples", type=int, default=8, help="Ours: a shard is one or more batches."
    )
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=1024, help="Ours, per step.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1, help="Of the ray side.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", help="Default: the demo model, SmolLM2-135M.")
    parser.add_argument("--random-model", action="store_true", help="A random Qwen3, 2 layers.")
    parser.add_argument("--side", help="Run one side only.")
    return parser.parse_args()


SIZES = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, True),
    "small": (576, 1536, 2, 9, 3, 64, 8192, True),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "8B, 8 of 36 layers": (4096, 12288, 8, 32, 8, 128, 151936, False),
}
"""Random Qwen3 models: widths of the hidden states and of the MLP, layers, heads, heads of keys and
values, their width, tokens, whether the head is tied. ``small`` is as wide as the demo model."""


def save_random_model(folder: str, size: str, dtype: str = "float32", device: str = "cpu") -> None:
    """Write a random Qwen3 of one of ``SIZES``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, mlp, layers, heads, kv_heads, head_dim, tokens, is_tied = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=tokens,
        tie_word_embeddings=is_tied,
        dtype=dtype,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def run_round(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Every side once."""
    results = {name: run_side(name, options) for name in ("modelopt", *options.sides.split(","))}
    texts = [f"{s} {v['seconds']:.1f} s {v['peak_gib']:.2f} GiB" for s, v in results.items()]
    print(f"round {number}: {'; '.join(texts)}", flush=True)
    return results


def run_side(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a new process."""
    arguments = [sys.executable, __file__, "--side", name]
    for option in OPTIONS:
        arguments += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    if options.model:
        arguments += ["--model", options.model]
    environment = {**os.environ, **(ENVIRONMENT if name.startswith("core") else {})}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarize(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios to ModelOpt of one side, and how its scores compare."""
    ratios = [results["modelopt"]["seconds"] / results[name]["seconds"] for results in rounds]
    memory = [results[name]["peak_gib"] / results["modelopt"]["peak_gib"] for results in rounds]
    ours, theirs = pair_scores(rounds[0][name]["scores"], rounds[0]["modelopt"]["scores"])
    return {
        "seconds": [round(results[name]["seconds"], 1) for results in rounds],
        "times_faster": round(statistics.median(ratios), 2),
        "min_max": [round(min(ratios), 2), round(max(ratios), 2)],
        "memory_share": round(statistics.median(memory), 2),
        "peak_gib": round(max(results[name]["peak_gib"] for results in rounds), 2),
        "largest_relative_score_difference": float(f"{np.max(abs(ours - theirs) / theirs):.2g}"),
        "median_relative_score_difference": float(f"{np.median(abs(ours - theirs) / theirs):.2g}"),
        "spearman": round(float(scipy.stats.spearmanr(ours, theirs).statistic), 5),
    }


def pair_scores(
    ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scores of all groups and formats, after ModelOpt's running minimum along its formats."""
    pairs = []
    for group, scores in theirs.items():
        lowest = float("inf")
        for name, score in scores.items():
            if name in ours[group]:
                lowest = min(lowest, ours[group][name])
                pairs.append((lowest, score))
    return tuple(np.array(pairs).T)


if __name__ == "__main__":
    main()
