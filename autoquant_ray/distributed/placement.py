"""Connect to a Ray cluster and decide how many workers fit, before waiting for anything."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import psutil
import ray
from ray._private.utils import read_ray_address
from ray.exceptions import RuntimeEnvSetupError

from autoquant_ray.config.runtime_env import RuntimeEnv
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.failure import start_in_time
from autoquant_ray.distributed.node_devices import gpus_per_worker, host_bytes
from autoquant_ray.distributed.nodes import NodeChoice
from autoquant_ray.errors import ClusterError, one_line

logger = logging.getLogger(__name__)

_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
_MEMORY_SHARE = 0.8
_CLIENT_PORT = 10001  # of ray://, where an address names none
_LISTENER_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many workers, what each reserves, and whether it keeps freed memory.

    Attributes:
        num_workers: To start with.
        max_workers: What the pool may grow to when the cluster does; 0 never grows.
        worker_bytes: Memory of one worker; bounds their number on a CPU cluster.
        reuses_memory: The process keeps freed host memory for the next tensor
            (:func:`~autoquant_ray.distributed.host_memory.reuse_freed_memory`).
        nodes: Where they may run.
    """

    num_workers: int
    max_workers: int = 0
    cpus_per_worker: int
    gpus_per_worker: float
    device: str
    worker_bytes: int = 1
    reuses_memory: bool = False
    nodes: NodeChoice = field(default_factory=NodeChoice)

    def at_most(self, num_shards: int) -> Placement:
        """The same with no more workers than shards; more would idle."""
        return replace(
            self,
            num_workers=max(1, min(self.num_workers, num_shards)),
            max_workers=min(self.max_workers, num_shards),
        )

    def room(self, resources: Mapping[str, float]) -> int:
        """How many such workers a cluster of these total resources holds, at least 1."""
        return max(1, min(self._room_by_units(resources), self._room_by_memory(resources)))

    def _room_by_units(self, resources: Mapping[str, float]) -> int:
        room = int(resources.get("CPU", 0) // self.cpus_per_worker)
        if self.gpus_per_worker > 0:
            room = min(room, int(resources.get("GPU", 0) / self.gpus_per_worker))
        return room

    def _room_by_memory(self, resources: Mapping[str, float]) -> int:
        if self.device != "cpu":
            return sys.maxsize
        memory = resources.get("memory", psutil.virtual_memory().total) * _MEMORY_SHARE
        return int(memory // self.worker_bytes)


class Asked(Protocol):
    """What a config says of the cluster that it wants."""

    @property
    def address(self) -> str:
        """``auto``, ``local``, or an address."""
        ...

    @property
    def workers(self) -> int | str:
        """Number of workers, or ``auto``."""
        ...

    @property
    def cpus_per_worker(self) -> int:
        """CPUs of each."""
        ...


@contextmanager
def connected(config: Asked, runtime_env: RuntimeEnv | None = None) -> Iterator[None]:
    """Connect to the cluster that the config names.

    A connection that is open already is used and left open. A local cluster gets enough CPUs for
    the workers that were asked for by number, even if the machine has fewer.

    Args:
        config: The cluster.
        runtime_env: What the workers get besides; None for nothing.

    Raises:
        ClusterError: The address cannot be reached, or a node cannot set the environment up.
    """
    if ray.is_initialized():
        if runtime_env is not None:
            logger.warning("`runtime_env` is left out: the connection to Ray was open before")
        yield
        return
    try:
        with _kept_sigterm():
            _connect(config, {} if runtime_env is None else runtime_env.to_ray())
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise ClusterError(
            f"Ray cluster {config.address!r} cannot be reached: {reason}; give another `address`, "
            "or local for a Ray of this command alone"
        ) from None
    try:
        yield
    except RuntimeEnvSetupError as error:
        last = str(error).strip().splitlines()[-1]  # what failed, after all tracebacks
        reason = one_line(ValueError(last), limit=250)
        raise ClusterError(f"the runtime_env cannot be set up on a node: {reason}") from None
    finally:
        ray.shutdown()


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Keep the program's SIGTERM handler: ``ray.init`` sets one that ends the process at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _require_listener(address: str) -> None:
    """Fail fast where nobody listens; Ray itself would retry for minutes."""
    parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or (_CLIENT_PORT if parts.scheme == "ray" else None)
    if parts.scheme in ("ray", "") and parts.hostname and port:
        with socket.create_connection((parts.hostname, port), timeout=_LISTENER_TIMEOUT_S):
            pass


def _shared_address() -> str:
    """What ``auto`` means: a Ray that was started to be shared; ``local`` where there is none.

    That is the cluster of ``RAY_ADDRESS``, or the one that ``ray start`` put on this machine. Ray's
    own ``auto`` also takes what another program started for itself, and dies with that program.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named != "auto":
        return named
    started: str | None = read_ray_address()
    if not started:
        return "local"
    host, _, port = started.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_LISTENER_TIMEOUT_S):
            return started
    except (OSError, ValueError):
        return "local"  # it has ended without a word


def _connect(config: Asked, runtime_env: Mapping[str, Any]) -> None:
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
        "namespace": "autoquant_ray",
        "runtime_env": dict(runtime_env) or None,
    }
    address = _shared_address() if config.address == "auto" else config.address
    if address != "local":
        _require_listener(address)
        ray.init(address=address, **common)
        return
    if config.address == "auto":
        logger.info("Ray: no cluster runs on this machine; this command starts its own")
    asked = config.workers * config.cpus_per_worker if isinstance(config.workers, int) else 0
    if asked > (os.cpu_count() or 1):
        logger.warning("the workers ask for %d CPUs, this machine has %s", asked, os.cpu_count())
    start = partial(
        ray.init,
        address="local",
        num_cpus=max(os.cpu_count() or 1, asked, config.cpus_per_worker),
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        **common,
    )
    start_in_time(start, clean_up=ray.shutdown)


def resolve_device(config: ScanConfig, resources: Mapping[str, float]) -> str:
    """``auto`` becomes cuda where workers will have GPUs."""
    if config.device != "auto":
        return config.device
    return "cuda" if resources.get("GPU", 0) > 0 and config.gpus_per_worker != 0 else "cpu"


def worker_needs(config: ScanConfig) -> dict[str, float]:
    """Resource -> what each worker takes, before it is clear what the cluster has."""
    device = "cuda" if config.device == "cuda" or config.accelerator is not None else "cpu"
    return {"GPU": gpus_per_worker(config, device), "CPU": config.cpus_per_worker}


def require_resources(config: ScanConfig, resources: Mapping[str, float]) -> None:
    """Check that the cluster has what is asked for, before anything waits for it.

    Args:
        config: With the device resolved.
        resources: Totals of the nodes that workers may run on.

    Raises:
        ClusterError: The cluster has too little; the message says what it has.
    """
    device = config.device
    gpus = gpus_per_worker(config, device)
    if config.placement == "split" and device != "cuda":
        raise ClusterError("`placement` split needs GPUs, but the workers compute on the CPU")
    if device == "cuda" and gpus == 0:
        raise ClusterError("`device` cuda needs `gpus_per_worker` above 0")
    asked = config.workers if isinstance(config.workers, int) else 1
    needed = {"CPU": asked * config.cpus_per_worker, "GPU": asked * gpus}
    for name, amount in needed.items():
        has = resources.get(name, 0)
        if amount > has:
            remedy = f"lower `workers` or `{name.lower()}s_per_worker`"
            if name == "GPU" and has == 0:
                remedy = "scan with `device` cpu, give the `address` of a cluster that has GPUs"
                if device == "cpu":
                    remedy = "leave out `gpus_per_worker`"
            raise ClusterError(
                f"{asked} worker(s) need {amount:g} {name}, the cluster has {has:g}"
                f"{NodeChoice.of(config).describe()}; {remedy}, or wait for an autoscaler with "
                "`wait_for_workers`"
            )


def spare_bytes(config: ScanConfig, placement: Placement) -> int:
    """Memory that is left to a worker on a CPU beside its estimate, on the node that leaves least.

    Args:
        config: The nodes that workers may run on.
        placement: How many there may be, and what each needs.
    """
    most = max(placement.num_workers, placement.max_workers)
    spare = []
    for node in NodeChoice.of(config).nodes():
        memory = int(host_bytes(node) * _MEMORY_SHARE)
        fitting = int(node["Resources"].get("CPU", 0) // placement.cpus_per_worker)
        if not isinstance(config.workers, int):
            fitting = min(fitting, memory // placement.worker_bytes)
        spare.append(memory // max(1, min(most, fitting)) - placement.worker_bytes)
    return max(0, min(spare, default=0))


def place_workers(
    config: ScanConfig,
    resources: Mapping[str, float],
    *,
    device: str,
    worker_bytes: int,
) -> Placement:
    """Size the pool to the cluster; ``auto`` grows with it later.

    Args:
        config: What was asked for.
        resources: Totals of the nodes that workers may run on.
        device: ``cpu`` or ``cuda``.
        worker_bytes: Memory of one worker; bounds ``auto`` by the memory of a CPU cluster.
    """
    placement = Placement(
        num_workers=1,
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=gpus_per_worker(config, device),
        device=device,
        worker_bytes=worker_bytes,
        reuses_memory=device == "cpu" and config.placement == "resident",
        nodes=NodeChoice.of(config),
    )
    if isinstance(config.workers, int):
        return replace(placement, num_workers=config.workers, max_workers=config.workers)
    num_workers = placement.room(resources)
    by_units = replace(placement, worker_bytes=1).room(resources)
    if num_workers < by_units:
        logger.info("memory has room for %d workers of %d", num_workers, by_units)
    return replace(placement, num_workers=num_workers, max_workers=sys.maxsize)
