"""Fault drills on a cluster of several nodes: what a fault costs, and that it changes nothing.

Every drill disturbs a scan of a tiny model, lets it end or goes on with it, and compares
``sensitivity.parquet`` with the undisturbed one byte by byte. Prints a table of seconds from the
fault to the next finished shard and to the end of the shard that was hit; ends with JSON.

    python benchmarks/drills.py
    python benchmarks/drills.py "disk full" SIGTERM

The seconds hold the start of a worker process (torch, transformers and ModelOpt imported) where one
is needed, and next to no time for loading the model. Node health is checked every 0.5 s and a node
is dead after two misses; Ray's defaults take about 16 s to give a node up. Filling a disk and
making it read-only mounts a tmpfs, which needs root on Linux; without it these are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import drill_kit
import psutil
import yaml
from drill_cluster import DrillCluster, drill_cluster
from drill_disk import fill, remount, small_disk
from drill_kit import Drill, Held, Pacing, disturb, rewind, wait_until
from machine import describe_machine
from ray import cloudpickle

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.scan import run_search

DRIVER = Path(__file__).with_name("drill_driver.py")
CPU_NODE = {"num_cpus": 1}
GPU_NODE = {"num_cpus": 1, "num_gpus": 1}


@dataclass
class Setting:
    """What drills share: a cluster, inputs, and a finished scan that nothing disturbed."""

    cluster: DrillCluster
    inputs: dict[str, Any]
    finished: Path
    folder: Path
    num_drills: int = 0

    def config(self, stage: str, **changes: Any) -> tuple[ScanConfig, Path]:
        """Config of a run that is to go on with a stage, and a folder for its pacing."""
        self.num_drills += 1
        folder = self.folder / f"drill-{self.num_drills}"
        folder.mkdir()
        out = changes.pop("out", folder / "run")
        rewind(self.finished, Path(out), stage)
        fields = self.inputs | {"out": str(out), "workers": 2, "address": self.cluster.address}
        return ScanConfig.model_validate(fields | changes), folder

    def resume(self, config: ScanConfig) -> None:
        """Go on with a run in this process, undisturbed."""
        run_search(config, "resume")

    def is_unharmed(self, run: Path) -> bool:
        """Whether a finished run has the undisturbed scores, to the byte."""
        name = "sensitivity.parquet"
        return (run / name).read_bytes() == (self.finished / name).read_bytes()


@contextmanager
def setting(folder: Path) -> Iterator[Setting]:
    """A cluster and an undisturbed scan on two of its nodes."""
    cloudpickle.register_pickle_by_value(drill_kit)  # workers cannot import it
    with drill_cluster() as cluster:
        cluster.set_nodes(CPU_NODE, CPU_NODE)
        inputs = drill_kit.make_inputs(folder)
        finished = folder / "undisturbed"
        run_search(ScanConfig.model_validate(inputs | {"out": str(finished), "workers": 2}))
        yield Setting(cluster, inputs, finished, folder)
    cloudpickle.unregister_pickle_by_value(drill_kit)


def node_killed(setting: Setting, stage: str) -> Drill:
    """One of two nodes loses power in the middle of a shard."""
    setting.cluster.set_nodes(CPU_NODE, CPU_NODE)
    config, folder = setting.config(stage)
    pacing = Pacing(folder=str(folder), stage=stage, shard=2, pace_s=0.5)
    return disturb(config, pacing, lambda _, held: setting.cluster.kill_node(held.node))


def gpu_lost(setting: Setting) -> Drill:
    """The only GPU of the cluster is lost with its node; later another one joins."""
    setting.cluster.set_nodes(GPU_NODE, CPU_NODE)
    config, folder = setting.config("score", workers=1, gpus_per_worker=1)
    pacing = Pacing(folder=str(folder), stage="score", shard=2)

    def fault(drill: Drill, held: Held) -> str:
        setting.cluster.kill_node(held.node)
        wait_until(lambda: drill.events("worker_died"))
        return setting.cluster.add(**GPU_NODE)

    return disturb(config, pacing, fault)


def node_joins(setting: Setting) -> Drill:
    """A scan with ``workers: auto`` on one node, and a second node joins."""
    setting.cluster.set_nodes(CPU_NODE)
    config, folder = setting.config("score", workers="auto")
    pacing = Pacing(folder=str(folder), stage="score", shard=2)

    def fault(drill: Drill, held: Held) -> str:
        node = setting.cluster.add(**CPU_NODE)
        wait_until(lambda: any(call[2] == node for call in drill.calls("score")))
        held.release()
        return node

    return disturb(config, pacing, fault)


def out_of_memory(setting: Setting) -> Drill:
    """A worker takes memory until Ray's memory monitor kills it.

    The monitor looks at the memory of the whole machine; the threshold is set for the worker's own
    node only, a quarter of what is free now (3 GiB at most) above what is used now. The worker
    holds the machine above it, whatever other processes free, until the monitor has acted.
    """
    memory = psutil.virtual_memory()
    spare_bytes = min(3 * 2**30, memory.available // 4)
    used_bytes = memory.total - memory.available + 2 * spare_bytes
    setting.cluster.set_nodes()
    setting.cluster.add_tight(spare_bytes, **CPU_NODE)
    config, folder = setting.config("score", workers=1)
    pacing = Pacing(folder=str(folder), stage="score", shard=2, used_bytes=used_bytes)
    return disturb(config, pacing, lambda *_: None)


def push_lost(setting: Setting, half: str) -> Drill:
    """The driver's first call for a shard is lost: its ``request`` or its ``response``."""
    setting.cluster.set_nodes(CPU_NODE, CPU_NODE)
    config, folder = setting.config("score")
    failure = {"num_failures": 1, "req_failure_prob": 0, "resp_failure_prob": 0}
    failure |= {"req_failure_prob" if half == "request" else "resp_failure_prob": 100}
    rule = json.dumps({"CoreWorkerService.grpc_client.PushTask": failure})
    drill = Drill(Path(config.out), Pacing(folder=str(folder)))
    process = start_driver(config, drill.pacing, "loaded-workers", RAY_testing_rpc_failure=rule)
    _, stderr = process.communicate(timeout=240)
    if process.returncode != 0:
        raise RuntimeError(stderr)
    (died,) = drill.events("worker_died")
    drill.fault_time = died["time"]
    drill.pacing = Pacing(folder=str(folder), stage="score", shard=died["shard"])
    return drill


def driver_killed(setting: Setting) -> Drill:
    """The driver is killed after it wrote a shard's part and before it noted that; we go on."""
    setting.cluster.set_nodes(CPU_NODE, CPU_NODE)
    config, folder = setting.config("score")
    drill = Drill(Path(config.out), Pacing(folder=str(folder)))
    process = start_driver(config, drill.pacing, "die-before-noting:3")
    process.communicate(timeout=240)
    drill.fault_time = time.time()
    drill.notes = [process.returncode, part_times(drill)]
    setting.resume(config)
    return drill


def second_driver(setting: Setting) -> Drill:
    """A second driver is started on a run that a first one works on."""
    setting.cluster.set_nodes(CPU_NODE)
    config, folder = setting.config("score", workers=1)
    pacing = Pacing(folder=str(folder), stage="score", shard=2)

    def fault(_drill: Drill, held: Held) -> list[tuple[int, str]]:
        ends = []
        for flag in ("--resume", "--overwrite"):
            second = start_driver(config, Pacing(folder=str(folder)), "none", flag)
            _, stderr = second.communicate(timeout=120)
            ends.append((second.returncode, stderr))
        held.release()
        return ends

    return disturb(config, pacing, fault)


def disk_full(setting: Setting) -> Drill:
    """The disk of the run has room for a few parts more; then somebody frees space."""
    with small_disk(setting.folder / f"disk-{setting.num_drills}") as disk:
        setting.cluster.set_nodes(CPU_NODE)
        config, folder = setting.config("score", out=disk / "run", workers=1)
        drill = Drill(disk / "run", Pacing(folder=str(folder)))
        ballast = disk / "ballast"
        fill(ballast, but=32 * 1024)
        process = start_driver(config, drill.pacing, "none")
        _, stderr = process.communicate(timeout=240)
        drill.fault_time = time.time()
        drill.notes = [process.returncode, stderr, part_times(drill)]
        ballast.unlink()
        setting.resume(config)
        drill.run = Path(shutil.copytree(drill.run, folder / "run"))
        return drill


def disk_read_only(setting: Setting) -> Drill:
    """The disk of the run becomes read-only in the middle of a shard; then writable again."""
    with small_disk(setting.folder / f"disk-{setting.num_drills}") as disk:
        setting.cluster.set_nodes(CPU_NODE)
        config, folder = setting.config("score", out=disk / "run", workers=1)
        drill = Drill(disk / "run", Pacing(folder=str(folder), stage="score", shard=3))
        process = start_driver(config, drill.pacing, "none")
        held = drill.wait_for_held()
        wait_until(lambda: remount(disk, "ro"))
        held.release()
        _, stderr = process.communicate(timeout=240)
        drill.fault_time = time.time()
        drill.notes = [process.returncode, stderr, part_times(drill)]
        remount(disk, "rw")
        setting.resume(config)
        drill.run = Path(shutil.copytree(drill.run, folder / "run"))
        return drill


def driver_stopped(setting: Setting) -> Drill:
    """SIGTERM in the middle of a shard, which ends within the grace period; we go on."""
    setting.cluster.set_nodes(CPU_NODE)
    config, folder = setting.config("score", workers=1)
    drill = Drill(Path(config.out), Pacing(folder=str(folder), stage="score", shard=3))
    process = start_driver(config, drill.pacing, "none")
    held = drill.wait_for_held()
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: drill.events("stop_requested"))
    held.release()
    _, stderr = process.communicate(timeout=120)
    drill.notes = [process.returncode, stderr, part_times(drill)]
    drill.fault_time = time.time()
    setting.resume(config)
    return drill


def start_driver(
    config: ScanConfig, pacing: Pacing, disturbance: str, flag: str = "--resume", **env: str
) -> subprocess.Popen[str]:
    """The command line as a process of its own, by way of ``drill_driver.py``."""
    folder = Path(pacing.folder)
    (folder / "pacing.json").write_text(json.dumps(asdict(pacing)))
    (folder / "scan.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, str(DRIVER), str(folder / "pacing.json"), disturbance]
    command += ["scan", "--config", str(folder / "scan.yaml"), flag]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | env
    )


def part_times(drill: Drill) -> dict[str, int]:
    """Score parts -> when they were written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in (drill.run / "scores").glob("shard-*")}


DRILLS: dict[str, Callable[[Setting], Drill]] = {
    "node killed in calibration": lambda s: node_killed(s, "calibrate"),
    "node killed in scoring": lambda s: node_killed(s, "score"),
    "only GPU lost, another joins": gpu_lost,
    "node joins": node_joins,
    "worker out of memory": out_of_memory,
    "call lost": lambda s: push_lost(s, "request"),
    "result lost": lambda s: push_lost(s, "response"),
    "driver killed": driver_killed,
    "second driver": second_driver,
    "disk full": disk_full,
    "disk read-only": disk_read_only,
    "SIGTERM": driver_stopped,
}


def parse() -> list[str]:
    """Names of the drills to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"Drills to run; all by default: {'; '.join(DRILLS)}.",
    )
    names: list[str] = parser.parse_args().names
    for name in names:
        if name not in DRILLS:
            parser.error(f"there is no drill {name!r}; the drills are: {'; '.join(DRILLS)}")
    return names or list(DRILLS)


def main() -> None:
    """Run all drills, or those that are named; print seconds, and JSON at the end."""
    names = parse()
    rows = []
    with tempfile.TemporaryDirectory(prefix="drills-") as folder, setting(Path(folder)) as shared:
        for name in names:
            start = time.perf_counter()
            try:
                drill = DRILLS[name](shared)
            except PermissionError as error:
                print(f"{name}: left out, {error}", flush=True)
                continue
            if not shared.is_unharmed(drill.run):
                sys.exit(f"{name}: the scores changed")
            lost_s = drill.lost_shard_s()
            row = {"fault": name, "next_shard_s": round(drill.next_shard_s(), 1)}
            row["lost_shard_s"] = None if lost_s is None else round(lost_s, 1)
            row["whole_drill_s"] = round(time.perf_counter() - start, 1)
            rows.append(row)
            print(row, flush=True)
    print(json.dumps({"drills": rows} | describe_machine()))


if __name__ == "__main__":
    main()
