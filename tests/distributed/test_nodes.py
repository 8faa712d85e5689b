"""Which nodes workers run on, and waiting for nodes: on a real cluster that grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from local_ray import MAX_STARTS
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get
from warm_commands import warm_ray

from autoquant_ray.distributed.failure import start_in_time
from autoquant_ray.distributed.nodes import NodeChoice

STORE = {"object_store_memory": 100 * 2**20}


class GrowingCluster:
    """A head with two CPUs, to which nodes are added."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self.add(num_cpus=2, include_dashboard=False)
        self.address: str = self._cluster.address

    def add(self, **options: Any) -> str:
        """Add a node; its id."""
        nodes: list[Any] = []

        def start() -> None:
            nodes.append(self._cluster.add_node(wait=False, **STORE, **options))

        with warm_ray():
            start_in_time(start, lambda: None, max_starts=MAX_STARTS)
        self._cluster.wait_for_nodes(timeout=120)
        return str(nodes[-1].node_id)

    def close(self) -> None:
        """End all its processes."""
        self._cluster.shutdown()


@pytest.fixture
def cluster() -> Iterator[GrowingCluster]:
    """This process is a driver on it."""
    growing = GrowingCluster()
    try:
        ray.init(address=growing.address, log_to_driver=False, logging_level="ERROR")
        yield growing
    finally:
        ray.shutdown()
        growing.close()


def node_of(choice: NodeChoice) -> str:
    """Id of the node on which Ray puts a task with the options of a choice."""
    where = ray.remote(lambda: ray.get_runtime_context().get_node_id())
    return str(ray.get(where.options(num_cpus=1, **choice.options()).remote(), timeout=120))


def requested() -> Any:
    """What the autoscaler was asked for."""
    value = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    return None if value is None else json.loads(value)


def test_workers_run_on_nodes_with_the_label_and_the_accelerator(
    cluster: GrowingCluster, tmp_path: Path, run_command: Any, scan_arguments: Any
) -> None:
    labelled = cluster.add(num_cpus=1, labels={"zone": "b"})
    fast = cluster.add(num_cpus=1, num_gpus=1, resources={"accelerator_type:H100": 1})
    assert node_of(NodeChoice(labels={"zone": "b"})) == labelled
    assert node_of(NodeChoice(accelerator="H100")) == fast
    assert NodeChoice(labels={"zone": "b"}).resources()["CPU"] == 1
    assert NodeChoice().resources()["CPU"] == 4

    there = ("--address", cluster.address)
    done = run_command(
        *scan_arguments(tmp_path / "a", *there, "--workers", "auto", "--node-label", "zone=b")
    )
    assert done.returncode == 0, done.stderr
    assert "1 worker(s) on cpu" in done.stderr
    done = run_command(*scan_arguments(tmp_path / "b", *there, "--node-label", "zone=c"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: 2 worker(s) need 2 CPU, the cluster has 0 on nodes with label zone=c; lower "
    )


def test_scan_waits_for_the_nodes_that_it_asked_the_autoscaler_for(
    cluster: GrowingCluster, tmp_path: Path, start_command: Any, scan_arguments: Any, watch: Any
) -> None:
    run = tmp_path / "run"
    wanted = ("--accelerator", "H100", "--gpus-per-worker", "1", "--wait-for-workers", "10m")
    wanted += ("--device", "cpu")  # the GPUs are made up
    with start_command(*scan_arguments(run, "--address", cluster.address, *wanted)) as scan:
        watch.wait_for(requested, scan)
        bundle = {"CPU": 1, "GPU": 1.0, "accelerator_type:H100": 0.001}
        assert requested() == [bundle, bundle]
        assert not run.exists()
        cluster.add(num_cpus=2, num_gpus=2, resources={"accelerator_type:H100": 1})
        _, stderr = scan.communicate()
    assert scan.returncode == 0, stderr
    assert (
        "waiting for nodes, 600 s at most: 2 worker(s) need 2 GPU, the cluster has 0 on nodes with "
        "accelerator H100"
    ) in stderr
    assert requested() == []


def test_nodes_that_do_not_come_are_a_cluster_error(
    cluster: GrowingCluster, tmp_path: Path, run_command: Any, scan_arguments: Any
) -> None:
    wanted = ("--workers", "3", "--wait-for-workers", "2s")
    done = run_command(*scan_arguments(tmp_path / "run", "--address", cluster.address, *wanted))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: no nodes for the workers within 2 s (--wait-for-workers): 3 worker(s) need 3 CPU, "
        "the cluster has 2; "
    )
    assert len(last) <= 400
    assert requested() == []
    assert not (tmp_path / "run").exists()
