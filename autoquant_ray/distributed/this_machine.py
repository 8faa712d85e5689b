"""What this machine is for a command: whether it will be the cluster, and can have a GPU.

Looked at before Ray is imported, which takes seconds; where this knows nothing, it refuses nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ClusterError

_DEVICES = Path("/dev")
_GPUS = ("nvidia[0-9]*", "nvhost*", "kfd", "dxg")


def starts_cluster(address: str) -> bool:
    """Whether a command with this address will start a Ray cluster for itself.

    Ray may know better: of a cluster that has ended without a word it is not certain.
    """
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    started = Path(folder, "ray", "ray_current_cluster")
    is_shared = bool(os.environ.get("RAY_ADDRESS")) or started.exists()
    return address == "local" or (address == "auto" and not is_shared)


def may_have_gpu() -> bool:
    """Whether torch could find a GPU here; True where that cannot be ruled out."""
    return sys.platform != "linux" or any(True for kind in _GPUS for _ in _DEVICES.glob(kind))


def require_gpu(config: ScanConfig) -> None:
    """Check that a GPU is here, where the workers need one and will run here.

    Args:
        config: Of a scan.

    Raises:
        ClusterError: There is none.
    """
    asked = {
        "`device` cuda": config.device == "cuda",
        f"`accelerator` {config.accelerator}": config.accelerator is not None,
        f"`gpus_per_worker` {config.gpus_per_worker}": bool(config.gpus_per_worker),
    }
    needs = [option for option, is_asked in asked.items() if is_asked]
    ray = sys.modules.get("ray")
    is_connected = ray is not None and ray.is_initialized()
    if needs and not is_connected and starts_cluster(config.address) and not may_have_gpu():
        remedy = "give `device` cpu" if config.device == "cuda" else "leave it out"
        raise ClusterError(
            f"{needs[0]} needs a GPU, and this machine has none; {remedy}, or with `address` a "
            "Ray cluster that has GPUs"
        )
