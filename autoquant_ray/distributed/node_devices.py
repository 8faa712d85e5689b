"""What the devices of the nodes that workers may run on have: memory, fast products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.nodes import NodeChoice
from autoquant_ray.errors import ClusterError, one_line
from autoquant_ray.formats.integer_pairs import multiplies_integers, with_integers

_PROBE_TIMEOUT_S = 120.0
_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")  # as Linux names them
_INT8_GENERATIONS = (8, 9, 12)
"""CUDA's major numbers. On 10.3, ``torch._int_mm`` was measured to be slower than float32
(https://github.com/pytorch/pytorch/issues/187094)."""


def gpus_per_worker(config: ScanConfig, device: str) -> float:
    """GPUs that each worker reserves."""
    if config.gpus_per_worker is not None:
        return config.gpus_per_worker
    return 1.0 if device == "cuda" else 0.0


def device_bytes(config: ScanConfig, device: str) -> int:
    """Memory that one worker may use on its device: the least over the nodes that could run it.

    The driver may have no GPU, so a small task on each GPU node reads the memory of its first
    GPU; a worker on a fraction of a GPU may use that fraction. On CPU it is the host's memory.

    Raises:
        ClusterError: A GPU node does not answer.
    """
    nodes = NodeChoice.of(config).nodes()
    if device == "cpu":
        return min(host_bytes(node) for node in nodes)
    share = min(1.0, gpus_per_worker(config, device))
    remedy = "give `placement` resident, offload or split"
    sizes = _ask_gpus(nodes, share, _gpu_bytes, "memory", remedy)
    return int(min(sizes) * share)


def difference_dtype(config: ScanConfig, *, has_integers: bool) -> str:
    """What ``auto`` and ``int8`` mean: ``bfloat16`` where every node that could run a worker
    multiplies it fast, else ``float32``; with ``int8+`` before it where integers are multiplied.

    Nodes that join later follow: slower ones are slow, but their numbers are of the same type.

    Args:
        config: With device and compute type resolved.
        has_integers: Whether linears multiply integers under a format of the menu.

    Raises:
        ClusterError: A node does not answer.
    """
    if config.dtype == "bfloat16":
        return "bfloat16"  # as the model computes
    nodes = NodeChoice.of(config).nodes()
    remedy = "give `difference_dtype` float32 or bfloat16"
    takes_integers = multiplies_integers(config.difference_dtype)
    if config.device == "cuda":
        share = min(1.0, gpus_per_worker(config, "cuda"))
        fast = _ask_gpus(nodes, share, _fast_types, "kind", remedy)
        is_fast = all("bfloat16" in types for types in fast)
        takes_integers |= all("int8" in types for types in fast)
    else:
        here = ray.util.get_node_ip_address()
        others = [node for node in nodes if node["NodeManagerAddress"] != here]
        is_fast = len(others) == len(nodes) or _has_bfloat16_units()
        is_fast &= all(_ask(others, 0, _has_bfloat16_units, "the CPU of a node", remedy))
    dtype = "bfloat16" if is_fast else "float32"
    return with_integers(dtype) if takes_integers and has_integers else dtype


def _ask_gpus(
    nodes: Sequence[Mapping[str, Any]],
    share: float,
    question: Callable[[], Any],
    what: str,
    remedy: str,
) -> list[Any]:
    """The answers of all nodes that have such a share of a GPU."""
    asked = [node for node in nodes if node["Resources"].get("GPU", 0) >= share]
    if not asked:
        raise ClusterError(f"no node has {share:g} GPU whose {what} could be read; {remedy}")
    return _ask(asked, share, question, f"the {what} of a GPU node", remedy)


def _ask(
    nodes: Sequence[Mapping[str, Any]],
    gpus: float,
    question: Callable[[], Any],
    what: str,
    remedy: str,
) -> list[Any]:
    """What a function gives on each node.

    Raises:
        ClusterError: A node does not answer.
    """
    tasks = [
        ray.remote(question)
        .options(
            num_cpus=0,
            num_gpus=gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote()
        for node in nodes
    ]
    try:
        answers: list[Any] = ray.get(tasks, timeout=_PROBE_TIMEOUT_S)
    except GetTimeoutError:
        raise ClusterError(
            f"{what} was not reported within {_PROBE_TIMEOUT_S:g} s; {remedy}"
        ) from None
    except RayError as error:
        reason = one_line(error.cause if isinstance(error, RayTaskError) else error)
        raise ClusterError(f"{what} cannot be read: {reason}; {remedy}") from None
    return answers


def _gpu_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def _fast_types() -> list[str]:
    """Types that the first GPU multiplies faster than float32."""
    import torch

    return fast_types(torch.cuda.get_device_capability(0), is_cuda=torch.version.hip is None)


def fast_types(capability: tuple[int, int], *, is_cuda: bool) -> list[str]:
    """Types of products that are faster than those of float32.

    Args:
        capability: Of the GPU, as torch has it.
        is_cuda: Whether it is NVIDIA's.
    """
    has_int8 = is_cuda and capability[0] in _INT8_GENERATIONS
    return ["bfloat16"] * (capability >= (8, 0)) + ["int8"] * has_int8


def _has_bfloat16_units() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return not words.isdisjoint(_BFLOAT16_UNITS)


def host_bytes(node: Mapping[str, Any]) -> int:
    """Memory of a node; of this machine, the total, which does not change from run to run.

    Args:
        node: As ``ray.nodes`` has it.
    """
    if node["NodeManagerAddress"] != ray.util.get_node_ip_address():
        return int(node["Resources"].get("memory", 0))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = int(psutil.virtual_memory().total)
    return total if text == "max" else min(total, int(text))
