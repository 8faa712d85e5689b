"""A cluster of several nodes on this machine that notices faults quickly, for the fault drills."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import psutil
import ray
from nodes import WAIT_S, add_node
from ray.cluster_utils import Cluster

FAST_CHECKS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "10000",  # the port of a dead process refuses at once
    "RAY_health_check_failure_threshold": "2",
}


class DrillCluster:
    """A head without CPUs, and nodes that come and go."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        self._cluster = Cluster()
        add_node(self._cluster, **head)
        self._nodes: dict[Any, dict[str, Any]] = {}
        self.address: str = self._cluster.address

    def close(self) -> None:
        """End all its processes."""
        self._cluster.shutdown()

    def set_nodes(self, *wanted: dict[str, Any]) -> None:
        """Have exactly nodes of these resources; those that fit are kept."""
        missing = list(wanted)
        for node, resources in list(self._nodes.items()):
            if resources in missing:
                missing.remove(resources)
            else:
                self.kill(node)
        for resources in missing:
            self.add(**resources)
        self._cluster.wait_for_nodes(timeout=WAIT_S)

    def add(self, **resources: Any) -> str:
        """Add a node; its id."""
        node = add_node(self._cluster, object_store_memory=100 * 2**20, **resources)
        self._nodes[node] = resources
        return str(node.node_id)

    def add_tight(self, spare_bytes: int, **resources: Any) -> str:
        """Add a node that kills workers once the machine uses so much more memory than now."""
        memory = psutil.virtual_memory()
        threshold = (memory.total - memory.available + spare_bytes) / memory.total
        tight = {
            "RAY_memory_usage_threshold": f"{threshold:.4f}",
            "RAY_memory_monitor_refresh_ms": "100",
        }
        with mock.patch.dict(os.environ, tight):
            node = self.add(**resources)
        self._nodes[self._find(node)] = {"tight": True}  # of no use to another drill
        return node

    def kill_node(self, node_id: str) -> None:
        """Kill a node's processes, as a power failure would."""
        self.kill(self._find(node_id))

    def kill(self, node: Any) -> None:
        """Kill a node's processes."""
        del self._nodes[node]
        self._cluster.remove_node(node, allow_graceful=False)

    def _find(self, node_id: str) -> Any:
        return next(node for node in self._nodes if node.node_id == node_id)


@contextmanager
def drill_cluster() -> Iterator[DrillCluster]:
    """A cluster that notices a dead node in about two seconds; this process is connected."""
    with mock.patch.dict(os.environ, FAST_CHECKS):
        cluster = DrillCluster()
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.close()
