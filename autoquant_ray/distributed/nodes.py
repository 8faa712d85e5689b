"""The nodes of a cluster that workers may run on, and waiting until there are enough of them.

A cluster that scales from zero has no GPU before somebody asks for one. Ray's autoscaler looks at
tasks that wait, and at what ``request_resources`` asks for; the latter starts nodes before there is
a worker to place, so that it is known how many workers there will be. What was asked for is taken
back at the end: the autoscaler keeps such nodes for as long as they are wanted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.progress import Waiting
from autoquant_ray.errors import ClusterError, one_line

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_ACCELERATOR = "accelerator_type:"
_ACCELERATOR_AMOUNT = 0.001
"""What Ray lets each task take of the resource that stands for a kind of accelerator."""


@dataclass(frozen=True, kw_only=True)
class NodeChoice:
    """Which nodes workers may run on.

    Attributes:
        accelerator: Kind of accelerator by Ray's name, such as ``H100``; None for any.
        labels: Labels that a node must have.
    """

    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ScanConfig) -> NodeChoice:
        """What a config asks for."""
        return cls(accelerator=config.accelerator, labels=config.node_labels)

    def takes(self, node: Mapping[str, Any]) -> bool:
        """Whether a node, as ``ray.nodes()`` lists it, lives and is such."""
        labels = node.get("Labels") or {}
        return (
            bool(node["Alive"])
            and (self.accelerator is None or _ACCELERATOR + self.accelerator in node["Resources"])
            and all(labels.get(name) == value for name, value in self.labels.items())
        )

    def nodes(self) -> list[dict[str, Any]]:
        """All such nodes of the connected cluster."""
        return [node for node in ray.nodes() if self.takes(node)]

    def resources(self) -> dict[str, float]:
        """Their resources together."""
        if self.accelerator is None and not self.labels:
            return dict(ray.cluster_resources())
        total: Counter[str] = Counter()
        for node in self.nodes():
            total.update(node["Resources"])
        return dict(total)

    def options(self) -> dict[str, Any]:
        """Options of an actor that Ray is to place on such a node."""
        options: dict[str, Any] = {}
        if self.accelerator is not None:
            options["accelerator_type"] = self.accelerator
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options

    def describe(self) -> str:
        """A phrase after 'the cluster has ...'; empty where every node will do."""
        parts = [] if self.accelerator is None else [f"accelerator {self.accelerator}"]
        parts += [f"label {name}={value}" for name, value in self.labels.items()]
        return f" on nodes with {' and '.join(parts)}" if parts else ""

    def bundle(self, needed: Mapping[str, float]) -> dict[str, float]:
        """What a worker takes, as the autoscaler is asked for it."""
        bundle = {name: amount for name, amount in needed.items() if amount}
        if self.accelerator is not None:
            bundle[_ACCELERATOR + self.accelerator] = _ACCELERATOR_AMOUNT
        return bundle


@contextmanager
def enough_nodes(config: ScanConfig, needed: Mapping[str, float]) -> Iterator[dict[str, float]]:
    """Wait, where the config says so, until the nodes for its workers are there.

    Args:
        config: How many workers (``auto``: the first), on which nodes, how long to wait.
        needed: Resource -> what each worker takes.

    Yields:
        Total resources of the nodes that workers may run on.

    Raises:
        ClusterError: The nodes did not come in time.
    """
    choice = NodeChoice.of(config)
    if config.wait_for_workers is None:
        yield choice.resources()
        return
    number = config.workers if isinstance(config.workers, int) else 1
    is_asking = False
    try:
        if _lacking(choice, number, needed):
            is_asking = True
            _ask(choice, number, needed)
            _wait(choice, number, needed, config.wait_for_workers)
        yield choice.resources()
    finally:
        if is_asking:
            with suppress(RayError, RuntimeError):  # of a cluster that is gone
                request_resources(bundles=[])


def _ask(choice: NodeChoice, number: int, needed: Mapping[str, float]) -> None:
    """Tell the autoscaler what is wanted."""
    bundles = [choice.bundle(needed)] * number
    selectors = [dict(choice.labels)] * number if choice.labels else None
    try:
        request_resources(bundles=bundles, bundle_label_selectors=selectors)
    except (RayError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"the autoscaler cannot be asked for {number} worker(s): {one_line(error)}"
        ) from None


def _wait(choice: NodeChoice, number: int, needed: Mapping[str, float], wait_s: float) -> None:
    start_s, waiting = time.monotonic(), Waiting()
    logger.info("waiting for nodes, %g s at most: %s", wait_s, _lacking(choice, number, needed))
    while lacking := _lacking(choice, number, needed):
        if time.monotonic() - start_s >= wait_s:
            raise ClusterError(
                f"no nodes for the workers within {wait_s:g} s (`wait_for_workers`): {lacking}; "
                "look at the autoscaler's log and its limits, lower `workers`, or wait longer"
            )
        waiting.note(f"waiting for nodes: {lacking}")
        time.sleep(_LOOK_S)


def _lacking(choice: NodeChoice, number: int, needed: Mapping[str, float]) -> str:
    """What is too little for the workers, in words; empty where it is enough."""
    has = choice.resources()
    short = [
        f"{number} worker(s) need {number * amount:g} {name}, the cluster has {has.get(name, 0):g}"
        for name, amount in needed.items()
        if number * amount > has.get(name, 0)
    ]
    return f"{short[0]}{choice.describe()}" if short else ""
