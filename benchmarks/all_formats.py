"""All 16 pairs in one scan of our core, against ``mtq.auto_quantize`` run once per format.

Same model, data, labels and threads, on CPU; every run alone in its own process; loading the
model is not counted. ModelOpt can run 12 of the 16 on CPU. ``--with-backend`` adds the four fp4
pairs, for which its quantizers use our code; they do not count in the total. Per format, a ratio
is ModelOpt's seconds for that format over our seconds for all 16, divided by 16; the total is
ModelOpt's seconds for its 12 formats over our seconds for all 16. Beside it: the largest relative
difference of scores.

    python benchmarks/all_formats.py
    python benchmarks/all_formats.py --samples 8 --rounds 3 --with-backend
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from typing import Any

import torch
from machine import describe_machine
from sides import CASES, Case, side

from autoquant_ray.distributed.host_memory import ENVIRONMENT
from autoquant_ray.formats.menu import PAIRS, WEIGHTED_BY_DEFAULT

OPTIONS = ("samples", "batch", "shard_samples", "seq_len", "step_tokens", "threads")
NAMES = tuple(f"{name}:max" if name in WEIGHTED_BY_DEFAULT else name for name in PAIRS)
"""All rounded by the maximum, as ModelOpt's search does it."""
NEEDS_BACKEND = tuple(name for name in NAMES if name.startswith("wfp4"))


def main() -> None:
    """Run every side, print a line for each, and the summary as the last line of JSON."""
    options = parse()
    if options.side:
        warnings.simplefilter("ignore")
        options.case = "chosen"
        CASES["chosen"] = Case(tuple(options.formats.split(",")))
        print(json.dumps(side(options.side, options)))
        return
    rounds = [run_round(number + 1, options) for number in range(options.rounds)]
    print(json.dumps(describe_machine() | summarize(rounds, options)))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="Samples per batch.")
    parser.add_argument("--shard-samples", type=int, default=8, help="Ours: one or more batches.")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--step-tokens", type=int, default=1024, help="Ours, per step.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--with-backend", action="store_true", help="ModelOpt's side of fp4 too.")
    parser.add_argument("--model", help="Default: the demo model, SmolLM2-135M.")
    parser.add_argument("--side", choices=("core", "modelopt"), help="Run one side only.")
    parser.add_argument("--formats", default=",".join(NAMES), help="Of one side.")
    return parser.parse_args()


def run_round(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Our scan of all formats, then ModelOpt's runs; side or format -> result."""
    results = {"core": run_side("core", NAMES, options)}
    print(f"round {number}: all {len(NAMES)} here {results['core']['seconds']:.1f} s", flush=True)
    for name in NAMES:
        if name not in NEEDS_BACKEND or options.with_backend:
            results[name] = run_side("modelopt", (name,), options)
            seconds, difference = results[name]["seconds"], score_difference(name, results)
            print(
                f"round {number}: {name} by ModelOpt {seconds:.1f} s, {ratio(results, name):.2f} "
                f"times a format here, scores differ by {difference:.1g}",
                flush=True,
            )
    return results


def run_side(name: str, formats: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a new process."""
    arguments = [sys.executable, __file__, "--side", name, "--formats", ",".join(formats)]
    for option in OPTIONS:
        arguments += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    if options.model:
        arguments += ["--model", options.model]
    environment = {**os.environ, **(ENVIRONMENT if name == "core" else {})}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} {formats} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ratio(results: dict[str, Any], name: str) -> float:
    """ModelOpt's seconds for a format over ours per format."""
    ours: float = results["core"]["seconds"] / len(NAMES)
    theirs: float = results[name]["seconds"]
    return theirs / ours


def score_difference(name: str, results: dict[str, Any]) -> float:
    """Largest relative difference of a format's scores; alone, none is clamped by ModelOpt."""
    ours, theirs = results["core"]["scores"], results[name]["scores"]
    return max(
        abs(ours[group][name] - scores[name]) / scores[name] for group, scores in theirs.items()
    )


def summarize(rounds: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds."""
    names = [name for name in rounds[0] if name != "core"]
    counted = [name for name in names if name not in NEEDS_BACKEND]
    totals = [
        sum(results[name]["seconds"] for name in counted) / results["core"]["seconds"]
        for results in rounds
    ]
    return {
        "model": options.model or "SmolLM2-135M",
        "threads": options.threads,
        "samples": options.samples,
        "seq_len": options.seq_len,
        "rounds": options.rounds,
        "formats_here": len(NAMES),
        "formats_modelopt": len(counted),
        "seconds_here": [round(results["core"]["seconds"], 1) for results in rounds],
        "seconds_modelopt": {
            name: round(statistics.median(results[name]["seconds"] for results in rounds), 1)
            for name in names
        },
        "times_faster_per_format": {
            name: round(statistics.median(ratio(results, name) for results in rounds), 2)
            for name in names
        },
        "times_faster_in_total": round(statistics.median(totals), 2),
        "peak_gib": {
            "here": round(max(results["core"]["peak_gib"] for results in rounds), 2),
            "modelopt": round(max(results[n]["peak_gib"] for results in rounds for n in names), 2),
        },
        "largest_relative_score_difference": float(
            f"{max(score_difference(name, results) for results in rounds for name in names):.2g}"
        ),
    }


if __name__ == "__main__":
    main()
