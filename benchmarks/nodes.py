"""Nodes of Ray clusters on this machine, with time to start: Ray gives each 30 s, fixed."""

from __future__ import annotations

from typing import Any

from ray.cluster_utils import Cluster

from autoquant_ray.distributed.failure import start_in_time

MAX_STARTS = 20
WAIT_S = 600.0


def add_node(cluster: Cluster, **resources: Any) -> Any:
    """Add a node to a cluster, the head if it has none; returns it once it is alive."""
    added: list[Any] = []

    def add() -> None:
        added.append(cluster.add_node(wait=False, **resources))

    start_in_time(add, lambda: None, max_starts=MAX_STARTS)
    cluster._wait_for_node(added[0], timeout=WAIT_S)
    return added[0]
