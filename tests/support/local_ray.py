"""Ray clusters of this process whose workers are forked warm, with time to start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.cluster_utils import Cluster
from warm_commands import warm_ray

from autoquant_ray.distributed.failure import start_in_time

MAX_STARTS = 20
"""Ray gives a node 30 s to start, which a busy machine may exceed."""


def start_local_ray(**options: Any) -> None:
    """``ray.init`` of a new cluster without a dashboard, its object store as small as can be."""

    def start() -> None:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=150 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            **options,
        )

    with warm_ray():
        start_in_time(start, ray.shutdown, max_starts=MAX_STARTS)


@contextmanager
def local_cluster(**resources: Any) -> Iterator[str]:
    """A cluster of one node that outlives its drivers; yields its address."""
    cluster = Cluster()

    def start() -> None:
        cluster.add_node(
            include_dashboard=False, object_store_memory=150 * 2**20, wait=False, **resources
        )

    with warm_ray():
        start_in_time(start, lambda: None, max_starts=MAX_STARTS)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()
