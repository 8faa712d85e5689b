"""Two workers of one thread against one: the time from ready workers to the last shard.

The whole scan through Ray on this machine, alternating; loading the model is not counted. The
scores of both must be the same bytes.

    python benchmarks/workers.py --rounds 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine
from sides import scoring_seconds

from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.runs.directory import RunDirectory


def main() -> None:
    """Alternate one and two workers; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--shard-samples", type=int, default=2)
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    digests = set()
    for number in range(options.rounds):
        for workers in (1, 2):
            taken, digest = scan(workers, options)
            seconds[workers].append(taken)
            digests.add(digest)
        print(f"round {number + 1}: {seconds[1][-1]:.1f} s, {seconds[2][-1]:.1f} s", flush=True)
    if len(digests) > 1:
        sys.exit("the scores differ between one and two workers")
    ratios = [single / double for single, double in zip(seconds[1], seconds[2], strict=True)]
    summary: dict[str, Any] = {
        **describe_machine(),
        "tokens": options.samples * options.seq_len,
        "shards": options.samples // options.shard_samples,
        "one_worker_seconds": [round(value, 1) for value in seconds[1]],
        "two_workers_seconds": [round(value, 1) for value in seconds[2]],
        "times_faster": round(statistics.median(ratios), 2),
        "min_max": [round(min(ratios), 2), round(max(ratios), 2)],
    }
    print(json.dumps(summary))


def scan(workers: int, options: argparse.Namespace) -> tuple[float, str]:
    """Seconds of calibration and scoring, and a hash of the scores."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "autoquant_ray", "scan", str(find_demo_model())]
        command += ["--data", "pydoc", "--pack", "--out", f"{folder}/run", "--bits", "6"]
        command += ["--formats", "wint4_afp16:max,wfp8_afp8,wint8_aint8,wint8_afp16"]
        command += ["--workers", str(workers), "--cpus-per-worker", "1", "--address", "local"]
        for name in ("samples", "seq_len", "shard_samples"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        subprocess.run(command, check=True, capture_output=True)
        content = Path(folder, "run", "sensitivity.parquet").read_bytes()
        return scoring_seconds(RunDirectory(f"{folder}/run")), hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
