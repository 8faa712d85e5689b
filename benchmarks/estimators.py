"""Which sum behind the score predicts better, and chooses better? Measured KL of a real model.

A model off its grid (:mod:`rounding`) is scanned once per estimator, with the same formats and the
same tokens. Every budget is solved from the scores of each, and the allocations are measured on
text that no scan has seen. Printed are predicted over measured KL, and the difference of the
measured KL to that of the first estimator, paired by sample.

    python benchmarks/estimators.py --bits 4.5 5 6 --samples 8 --held-out 4
    python benchmarks/estimators.py --model gemma.gguf --disable lm_head --bits 4.5 5 6
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine
from rounding import MENUS, evaluation_of, move_model, scan, solved

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.evaluate.measurement import measuring
from autoquant_ray.evaluate.table import Measured, paired_difference
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState

WIDTHS = ("wint4_g64_afp16", "wint5_g64_afp16", "wint6_g64_afp16", "wint8_afp16")
MENU = tuple(f"{name}:weighted" for name in WIDTHS)


def main() -> None:
    """Scan once per estimator, solve and measure; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="GGUF file or folder; default: the demo's.")
    parser.add_argument("--disable", nargs="*", default=[], help="Layers that keep 16 bits.")
    parser.add_argument("--estimators", nargs="+", default=["elementwise", "sequence"])
    parser.add_argument("--label-draws", type=int, default=1)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5, 6])
    parser.add_argument("--methods", action="store_true", help="Weighted and GPTQ, all widths.")
    parser.add_argument("--samples", type=int, default=8, help="For the scans.")
    parser.add_argument("--held-out", type=int, default=4, help="Samples to measure on.")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--folder", help="Keep model and runs here; what is there is not repeated.")
    options = parser.parse_args()
    menu = MENUS["methods, wider"] if options.methods else MENU
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        source, options.model = options.model or str(find_demo_model()), f"{folder}/model"
        if not Path(options.model).exists():
            move_model(source, options.model)
        runs, seconds = {}, {}
        for estimator in options.estimators:
            start = time.perf_counter()
            out = f"{folder}/{estimator}"
            path = scan(
                menu, out, options, estimator=estimator, label_draws=options.label_draws
            ).path
            seconds[estimator] = round(time.perf_counter() - start, 1)
            runs[estimator] = ScoredRun.read(RunState.open(RunDirectory(path)))
            print(f"scan, {estimator}: {seconds[estimator]} s", flush=True)
        rows = compare(runs, options)
    facts = describe_machine()
    print(json.dumps({**facts, "options": vars(options), "seconds": seconds, "rows": rows}))


def compare(runs: dict[str, ScoredRun], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all budgets and estimators."""
    results: dict[tuple[float, str], tuple[Candidate, Measured]] = {}
    for estimator, run in runs.items():
        chosen = {bits: solved(run, SolveOptions(bits=bits), estimator) for bits in options.bits}
        with measuring(run.state, evaluation_of(run, options)) as measurement:
            measured = measurement.measure(list(chosen.values()))
        pairs = zip(chosen.values(), measured, strict=True)
        results |= {(b, estimator): pair for b, pair in zip(chosen, pairs, strict=True)}
    first = options.estimators[0]
    return [
        row_of(bits, *results[bits, estimator], results[bits, first][1])
        for bits in options.bits
        for estimator in options.estimators
    ]


def row_of(bits: float, candidate: Candidate, result: Measured, first: Measured) -> dict[str, Any]:
    """What is printed of an allocation."""
    kl, error = paired_difference(result, None)
    change, change_error = paired_difference(result, first)
    print(
        f"{bits:4g} bits {candidate.name:12s} {candidate.weight_bytes / 2**20:.2f} MiB measured "
        f"{kl:.4f} ± {error or 0:.4f} ({change:+.4f} ± {change_error or 0:.4f}), "
        f"predicted/measured {candidate.predicted_kl / kl:.2f}",
        flush=True,
    )
    return {
        "bits": bits,
        "estimator": candidate.name,
        "mib": round(candidate.weight_bytes / 2**20, 3),
        "predicted_kl": round(candidate.predicted_kl, 5),
        "measured_kl": round(kl, 5),
        "stderr": error,
        "change": round(change, 6),
        "change_stderr": change_error,
    }


if __name__ == "__main__":
    main()
