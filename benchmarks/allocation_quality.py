"""Is the chosen allocation good? Measured KL of ours, ModelOpt's and uniform formats, SmolLM2-135M.

Two scans of the same model and text: labels from the model (ours), and from the data, whose sums
give ModelOpt's own scores and selection. At every budget both are solved to the same stored bytes;
ours is also refined by measured KL. All are measured on text that neither scan nor search has
seen, with standard errors; differences are paired by sample. The model's linears lie on a 4-bit
grid (GGUF Q4_1), which flatters 4-bit formats in every column.

    python benchmarks/allocation_quality.py --bits 4.5 5 6 7 --samples 16 --held-out 32 --trials 100
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from machine import describe_machine

import autoquant_ray
from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.config.evaluation import EvaluationConfig
from autoquant_ray.evaluate.allocation_search import split_shards
from autoquant_ray.evaluate.measurement import measuring
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.table import evaluation_rows, mean_kl
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SOLUTIONS
from autoquant_ray.runs.state import RunState

FORMATS = ("wint4_afp16:max", "wint8_afp16", "wfp8_afp16")


def main() -> None:
    """Scan twice, solve, refine, measure; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5, 6, 7])
    parser.add_argument("--samples", type=int, default=16, help="For the scans.")
    parser.add_argument("--held-out", type=int, default=32, help="Samples to measure on.")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--trials", type=int, default=100, help="Of refine; 0 leaves it out.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {labels: scan(labels, f"{folder}/{labels}", options) for labels in ("model", "data")}
        rows = [row for bits in options.bits for row in compare(runs, bits, options)]
    print(json.dumps({**describe_machine(), "options": vars(options), "rows": rows}))


def scan(labels: str, out: str, options: argparse.Namespace) -> autoquant_ray.Run:
    """Scan with labels from the model or from the data."""
    return autoquant_ray.search(
        model=str(find_demo_model()),
        data="pydoc",
        pack=True,
        out=out,
        formats=FORMATS,
        bits=options.bits[0],
        samples=options.samples,
        seq_len=options.seq_len,
        shard_samples=2,
        labels=labels,
        cpus_per_worker=2,
        workers=1,
        address="local",
    )


def compare(
    runs: dict[str, autoquant_ray.Run], bits: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one budget: ours, refined, ModelOpt's, uniform; measured on the last quarter."""
    name = SolveOptions(bits=bits).name
    candidates: list[Candidate] = []
    for run in runs.values():
        run.solve(bits=bits)
    ours = ScoredRun.read(RunState.open(RunDirectory(runs["model"].path)))
    candidates += collect_candidates(ours, f"{SOLUTIONS}/{name}/", ["uniform"])
    theirs = ScoredRun.read(RunState.open(RunDirectory(runs["data"].path)))
    candidates += collect_candidates(theirs, f"{SOLUTIONS}/{name}/", ["modelopt"])[1:]
    fields: dict[str, Any] = {"samples": options.held_out, "solution": name}
    if options.trials:
        runs["model"].refine(options.trials, **fields)
        refined = f"{SOLUTIONS}/{name}-refined/"
        candidates.append(rename(collect_candidates(ours, refined, [])[0], "refined"))
    config = EvaluationConfig(run=runs["model"].path, **fields)
    with measuring(ours.state, config) as measurement:
        _, _, unseen = split_shards(measurement.facts["num_shards"])
        results = measurement.measure(candidates, unseen)
    rows = evaluation_rows(candidates, results, {"budget": f"{bits:g}"})
    for row, result in zip(rows, results, strict=True):
        error = row["kl_above_solution_stderr"]
        print(
            f"{bits:4g} bits {row['name']:20s} {row['effective_bits']:.3f} predicted "
            f"{row['predicted_kl']:.4f} measured {mean_kl(result):.4f} ± "
            f"{row['kl_stderr'] or 0:.4f}"
            f" above ours {row['kl_above_solution']:+.4f} ± {error or 0:.4f}",
            flush=True,
        )
    return rows


def rename(candidate: Candidate, name: str) -> Candidate:
    """The same allocation under another name."""
    return Candidate(**{**vars(candidate), "name": name})


if __name__ == "__main__":
    main()
