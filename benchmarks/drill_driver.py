"""The command line in a process of its own, with slow scorers, and disturbed from within.

    python benchmarks/drill_driver.py PACING.json DISTURBANCE scan --config SCAN.yaml --resume

``none`` disturbs nothing. ``die-before-noting:N`` kills the process when N shards are scored and
the N-th part is written but not noted. ``loaded-workers`` lets workers load the model while they
are created, so that the first calls that this process makes of them are shards: with Ray's
``RAY_testing_rpc_failure`` in its environment those are the ones that fail.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import drill_kit
import ray
from ray import cloudpickle

from autoquant_ray import scan as scan_module
from autoquant_ray.cli import main as cli
from autoquant_ray.distributed import crew
from autoquant_ray.distributed.worker import ShardWorker
from autoquant_ray.runs.directory import RunDirectory

cloudpickle.register_pickle_by_value(drill_kit)  # workers cannot import it


def die_before_noting(number: int) -> Any:
    """Patch: the process ends before it notes the N-th scored shard."""
    append_event = RunDirectory.append_event
    num_scored = 0

    def append_or_die(self: RunDirectory, event: str, **details: Any) -> None:
        nonlocal num_scored
        num_scored += event == "shard_done" and details["stage"] == "score"
        if num_scored == number:
            os.kill(os.getpid(), signal.SIGKILL)
        append_event(self, event, **details)

    return mock.patch.object(RunDirectory, "append_event", append_or_die)


def loaded_workers() -> Any:
    """Patch: workers load the model while they are created, not in a call of this process."""
    specs: list[Any] = []
    make_spec = scan_module._scoring_spec

    def keep_spec(*arguments: Any) -> Any:
        specs.append(make_spec(*arguments))
        return specs[-1]

    class LoadedWorker(ShardWorker):
        def __init__(self, spec: Any) -> None:
            super().__init__(reuses_memory=False)
            self.load(spec)

    def start_loaded(placement: Any) -> Any:
        options = {"num_cpus": placement.cpus_per_worker, "max_restarts": 0}
        worker = ray.remote(LoadedWorker).options(**options).remote(specs[-1])
        worker.load = SimpleNamespace(remote=lambda _spec: ray.put(0))
        return worker

    stack = ExitStack()
    stack.enter_context(mock.patch.object(scan_module, "_scoring_spec", keep_spec))
    stack.enter_context(mock.patch.object(crew, "start_worker", start_loaded))
    return stack


def parse() -> argparse.Namespace:
    """Arguments of this driver; those of the command line stay as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pacing", type=Path, help="JSON of how scorers are slowed down.")
    parser.add_argument("disturbance", help="none, die-before-noting:N or loaded-workers.")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="Arguments of autoquant-ray, its command first."
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    options = parse()
    pacing = drill_kit.Pacing(**json.loads(options.pacing.read_text()))
    name, _, number = options.disturbance.partition(":")
    with ExitStack() as stack:
        stack.enter_context(drill_kit.paced(pacing))
        if name == "die-before-noting":
            stack.enter_context(die_before_noting(int(number)))
        elif name == "loaded-workers":
            stack.enter_context(loaded_workers())
        elif name != "none":
            sys.exit(f"unknown disturbance {options.disturbance!r}")
        cli.main(options.arguments)


if __name__ == "__main__":
    main()
