"""What the driver of a scan costs with 64 workers and thousands of shards, without any model.

A simulated cluster (8 nodes of 8 fake GPUs, one actor process each, on this machine) runs the real
score stage: pool, run directory, one Parquet part of 1,000 rows per shard. Only the computation is
replaced, by a wait; one worker waits 5 times as long. Prints one fact a line and ends with JSON.

    python benchmarks/driver_scale.py --shards 10000 --wait 2.5

Efficiency is the least wall time that 64 workers could need, over the wall time from the first
shard submitted to the last one written: ``shards x wait / (63.2 x wall)``, where the slow worker
counts as a fifth. With many shards a second on few cores, the 64 worker processes compete with the
driver for them, so a long wait measures the driver and a short one the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import ray
from machine import describe_machine
from nodes import add_node
from ray.cluster_utils import Cluster

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.placement import Placement, place_workers
from autoquant_ray.distributed.pool import WorkerPool
from autoquant_ray.distributed.task import ShardTask
from autoquant_ray.formats.format import Format
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.group import PlannedGroup
from autoquant_ray.plan.plan import Plan
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, part_name
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages import score as stages

SLOWDOWN = 5.0
NUM_GROUPS, NUM_FORMATS = 250, 4


@dataclass(frozen=True, kw_only=True)
class WaitingSpec:
    """Spec of a scorer that waits.

    Attributes:
        wait_s: Seconds per shard, spread by +-20% over shards.
        slow_flag: File that the first worker creates; that one is slow.
        slowdown: How many times longer the slow worker waits.
    """

    wait_s: float
    slow_flag: str
    slowdown: float = SLOWDOWN

    def build(self) -> WaitingScorer:
        """The first of all workers becomes the slow one."""
        try:
            open(self.slow_flag, "x").close()
        except FileExistsError:
            return WaitingScorer(self.wait_s)
        return WaitingScorer(self.wait_s * self.slowdown)


@dataclass(frozen=True)
class WaitingScorer:
    """Returns sums that depend on the samples alone, after a wait."""

    wait_s: float

    def score(
        self,
        samples: Any,
        first_sample: int,
        calibration: Any,
        shard: int,
        row_shares: Any = None,
    ) -> Any:
        """Shaped like :class:`~autoquant_ray.score.scorer.ShardScores`."""
        generator = np.random.default_rng(first_sample)
        seconds = self.wait_s * generator.uniform(0.8, 1.2)
        time.sleep(seconds)
        sums = SimpleNamespace(
            num_rows_G=np.full(NUM_GROUPS, 100),
            elementwise_GF=generator.random((NUM_GROUPS, NUM_FORMATS)),
            token_GF=generator.random((NUM_GROUPS, NUM_FORMATS)),
            elementwise_variance_GF=np.zeros((NUM_GROUPS, NUM_FORMATS)),
            token_variance_GF=np.zeros((NUM_GROUPS, NUM_FORMATS)),
            expert_tokens={},
            sequence_GF=None,
        )
        num_tokens = sum(len(sample) - 1 for sample in samples)
        return SimpleNamespace(
            sums=sums,
            num_tokens=num_tokens,
            num_samples=len(samples),
            seconds=seconds,
            row_shares_GF=np.ones((NUM_GROUPS, NUM_FORMATS)),
            trial=None,
        )


def main() -> None:
    """Run one score stage and print what it cost."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="driver-scale-") as folder:
        config = ScanConfig(
            model="none", data="none", out=f"{folder}/run", bits=8, device="cuda", dtype="float32"
        )
        state = make_run(config, arguments.shards, arguments.samples)
        with cluster(arguments.nodes, arguments.gpus) as resources:
            placement = place_workers(config, resources, device="cuda", worker_bytes=1)
            spec = WaitingSpec(wait_s=arguments.wait, slow_flag=f"{folder}/slow")
            facts = measure(state, spec, placement, arguments)
        lines = Path(folder, "run", "events.jsonl").read_text().splitlines()
        facts["copies"] = sum(json.loads(line)["event"] == "shard_copied" for line in lines)
        facts["parts"] = len(state.directory.list_parts("scores"))
        for name, value in facts.items():
            print(f"{name}: {value}")
        print(json.dumps(facts | describe_machine()), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Options; the defaults are a quick run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8, help="fake GPUs, and workers, per node")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=16, help="samples of 512 tokens per shard")
    parser.add_argument("--wait", type=float, default=2.5, help="seconds per shard")
    return parser.parse_args()


def make_run(config: ScanConfig, num_shards: int, num_samples: int) -> RunState:
    """A run directory that is ready to be scored. All shards hold the same tokens."""
    directory = RunDirectory(config.out)
    dataset = {"num_shards": num_shards}
    model = {"name": config.model, "fingerprint": None}
    identity = {"model": model, "dataset": dataset, "fingerprints": {}}
    state = RunState.start(directory, config, "new", identity)
    state.begin()
    for shard in range(num_shards):
        tokens = list(range(512))
        rows = [{"sample": shard * num_samples + i, "tokens": tokens} for i in range(num_samples)]
        directory.write_table(part_name(SAMPLES, shard), rows)
    return state


def make_plan() -> Plan:
    """As many groups and formats as a model of 32 layers has, without a model."""
    names = [f"layers.{g}.mlp.gate_proj" for g in range(NUM_GROUPS)]
    linear: dict[str, Any] = {"kind": "linear", "parameters": ("weight",), "shapes": ((128, 128),)}
    weight = {"num_bits": 8, "axis": 0}
    return Plan(
        groups=tuple(
            PlannedGroup(
                name=name,
                modules=(PlannedModule(name=name, **linear),),
                reason=None,
                is_tied=False,
            )
            for name in names
        ),
        formats=tuple(
            Format(name=f"wfp{f}_afp16", weight=weight, input=None, modelopt_compression=0.5)
            for f in range(NUM_FORMATS)
        ),
        other_bytes=0,
        other_modules={},
        flops_per_token=0,
        layer_weights=(),
        hidden_size=128,
        step={},
    )


@contextmanager
def cluster(num_nodes: int, num_gpus: int) -> Iterator[dict[str, float]]:
    """Connect to a simulated cluster; yields its resources."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    node = {"num_cpus": num_gpus, "num_gpus": num_gpus, "object_store_memory": 100 * 2**20}
    simulated = Cluster()
    try:
        add_node(simulated, **node, include_dashboard=False)
        for _ in range(num_nodes - 1):
            add_node(simulated, **node)
        ray.init(address=simulated.address, log_to_driver=False, logging_level="ERROR")
        yield dict(ray.cluster_resources())
    finally:
        ray.shutdown()
        simulated.shutdown()


def measure(
    state: RunState, spec: WaitingSpec, placement: Placement, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Score with all workers loaded; the start of the workers is not counted."""
    num_ready = 0

    def on_event(event: str, **details: Any) -> None:
        nonlocal num_ready
        num_ready += event == "worker_ready"
        state.directory.append_event(event, **details)

    with WorkerPool(spec, placement, on_event) as pool:
        for _ in pool.run(endless_tasks(), submit_nap):
            if num_ready == placement.num_workers:
                break
        process = psutil.Process()
        before, waited_s = process.memory_full_info(), count_waiting()
        cpu_s, start = time.process_time(), time.perf_counter()
        stages.score(state, pool, make_plan(), Calibration(), "benchmark")
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
        after = process.memory_full_info()
    num_equal_workers = placement.num_workers - 1 + 1 / SLOWDOWN
    return {
        "shards": arguments.shards,
        "workers": placement.num_workers,
        "wait_s": arguments.wait,
        "wall_s": round(wall_s, 2),
        "efficiency": round(arguments.shards * arguments.wait / (num_equal_workers * wall_s), 4),
        "driver_cpu_ms_per_shard": round(1e3 * cpu_s / arguments.shards, 3),
        "driver_wall_ms_per_shard": round(1e3 * (wall_s - sum(waited_s)) / arguments.shards, 3),
        "driver_rss_start_mib": round(before.rss / 2**20, 1),
        "driver_rss_growth_mib": round((after.rss - before.rss) / 2**20, 1),
        "driver_uss_start_mib": round(before.uss / 2**20, 1),
        "driver_uss_growth_mib": round((after.uss - before.uss) / 2**20, 1),
    }


def count_waiting() -> list[float]:
    """From now on, note the seconds of every ``ray.wait``: time in which the driver is idle."""
    waited_s: list[float] = []
    wait = ray.wait

    def timed_wait(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(*arguments, **options)
        finally:
            waited_s.append(time.perf_counter() - start)

    ray.wait = timed_wait
    return waited_s


def endless_tasks() -> Iterator[ShardTask]:
    """Tasks without samples, for workers that are ready before the others."""
    for shard in itertools.count():
        yield ShardTask(shard=shard, first_sample=0, samples=[])


def submit_nap(worker: Any, task: ShardTask) -> Any:
    """Let a worker sleep for a second."""
    return worker.__ray_call__.remote(lambda _worker: time.sleep(1.0))


if __name__ == "__main__":
    main()
