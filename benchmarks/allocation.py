"""How long the commands after a scan take: ``solve``, ``explain``, ``frontier`` and ``report``.

Writes synthetic runs and starts each command as a user does, on one core: seconds of the whole
process, those beyond the start of Python and its imports, and the peak of its memory. Runs with
experts apart have layers of four groups and 96 experts. Prints a row per command and size, then by
which power of the number of groups the seconds grow; the last line is JSON.

    python benchmarks/allocation.py
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from machine import describe_machine
from synthetic_run import BITS, write_run

CASES = ((500, 13, 0), (1_000, 12, 96), (20_000, 12, 96))
"""Groups, choices of each, experts of a layer."""
_IMPORTS = (
    "import autoquant_ray.cli.main, autoquant_ray.solve, autoquant_ray.cli.output, "
    "autoquant_ray.allocate.certainty.explain, autoquant_ray.allocate.frontier"
)


def main() -> None:
    """Run the commands on every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=16, help="Shards of the runs.")
    parser.add_argument("--only", nargs="+", default=[], help="Commands to run; all by default.")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    start = min(timed([sys.executable, "-c", _IMPORTS])["seconds"] for _ in range(3))
    print(f"start and imports: {start:.2f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for num_groups, num_choices, experts in CASES:
        with tempfile.TemporaryDirectory() as folder:
            run = f"{folder}/run"
            make_run(run, num_groups, num_choices, options.shards, experts)
            for name, words in commands(run).items():
                if options.only and name not in options.only:
                    continue
                row = timed([sys.executable, "-m", "autoquant_ray", *words])
                row |= {"command": name, "groups": num_groups, "choices": num_choices}
                row["seconds_beyond_start"] = row["seconds"] - start
                rows.append(row)
                print(described(row), flush=True)
    for name, power in growth(rows).items():
        print(f"{name}: seconds beyond the start grow with groups to the power of {power:.2f}")
    facts = {"start_seconds": start, "growth": growth(rows), "rows": rows}
    print(json.dumps({**describe_machine(), **facts}))


def commands(run: str) -> dict[str, list[str]]:
    """Name -> words of a command, in the order in which a user runs them."""
    middle = "model.layers.2.mlp.down_proj"
    return {
        "solve": ["solve", run, "--bits", str(BITS)],
        "explain": ["explain", run, middle, "--solution", f"bits-{BITS:.2f}"],
        "report": ["report", run],
        "frontier": ["frontier", run, "--points", "64"],
        "report with frontier": ["report", run],
    }


def make_run(
    run: str, num_groups: int, num_choices: int, num_shards: int, experts_per_layer: int
) -> None:
    """Write a run in a process of its own: what this one holds would count as its children's."""
    sizes = {"num_shards": num_shards, "experts_per_layer": experts_per_layer}
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_run, args=(run, num_groups, num_choices), kwargs=sizes)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the run could not be written")


def timed(words: list[str]) -> dict[str, float]:
    """Run a process on one core: seconds of its CPU and of the clock, peak memory in GiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise SystemExit(f"{words} failed:\n{output.read().decode()}")
    return {
        "seconds": usage.ru_utime + usage.ru_stime,
        "clock_seconds": time.perf_counter() - start,
        "peak_gib": usage.ru_maxrss / 2**20,
    }


def described(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['groups']:6d} x {row['choices']}, {row['command']:20s} {row['seconds']:7.2f} s, "
        f"{row['seconds_beyond_start']:7.2f} s beyond the start, {row['peak_gib']:.2f} GiB"
    )


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Command -> power of the number of groups, between the runs with experts apart."""
    seconds = {
        (row["command"], row["groups"]): max(row["seconds_beyond_start"], 0.01)
        for row in rows
        if row["choices"] == CASES[-1][1]
    }
    few, many = CASES[1][0], CASES[2][0]
    return {
        name: math.log(seconds[name, many] / seconds[name, few]) / math.log(many / few)
        for name, groups in seconds
        if groups == many
    }


if __name__ == "__main__":
    main()
