"""The Ray actor around a :class:`~autoquant_ray.score.scorer.Scorer`: no arithmetic lives here.

The spec that the driver sends builds the scorer (for an evaluation, an allocation runner), so
nothing here imports torch; a benchmark of the driver sends a spec whose scorer only waits.

Constructing the actor is cheap; ``load`` reads the model, so that its errors arrive as results
and not as a dead actor.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from autoquant_ray.distributed.host_memory import reuse_freed_memory
from autoquant_ray.distributed.placement import Placement
from autoquant_ray.distributed.task import LayerTask, RequestTask, ShardTask
from autoquant_ray.errors import AutoQuantError, WorkerError, one_line


class ShardWorker:
    """Computes shards, one at a time."""

    def __init__(self, reuses_memory: bool) -> None:
        if reuses_memory:
            reuse_freed_memory()  # the spec, and with it torch, arrives with ``load``
        self._runner: Any = None

    def load(self, spec: Any) -> int:
        """Load the model with the spec's ``build()``; returns the process id."""
        with _named_errors("loading the model"):
            self._runner = spec.build()
        return os.getpid()

    def calibrate(self, task: ShardTask) -> Any:
        """Calibration of a shard."""
        with _named_errors(f"calibrating shard {task.shard}"):
            return self._runner.calibrate(task.samples, task.shard)

    def search(self, task: ShardTask, calibration: Any) -> Any:
        """Losses of AWQ's candidates on a shard."""
        with _named_errors(f"searching scales on shard {task.shard}"):
            return self._runner.search(task.samples, calibration)

    def fit(self, task: LayerTask, calibration: Any, shards: Sequence[ShardTask]) -> Any:
        """Scales and roundings of the weights of some layers, by the number of the layer."""
        with _named_errors(f"fitting layers {', '.join(map(str, task.layers))}"):
            return self._runner.fit(task.layers, calibration, shards)

    def score(self, task: ShardTask, calibration: Any, row_shares: Any = None) -> Any:
        """Sensitivity sums of a shard; with shares of its rows where the spec says ``auto``."""
        with _named_errors(f"scoring shard {task.shard}"):
            return self._runner.score(
                task.samples, task.first_sample, calibration, task.shard, row_shares
            )

    def evaluate(self, task: ShardTask, choices: list[tuple[int, ...]]) -> Any:
        """Divergences of a shard under allocations."""
        with _named_errors(f"evaluating shard {task.shard}"):
            return self._runner.evaluate(task.samples, choices)

    def estimate(self, task: ShardTask, choice: tuple[int, ...]) -> Any:
        """What single changes of an allocation would do to its loss on a shard."""
        with _named_errors(f"estimating changes on shard {task.shard}"):
            return self._runner.estimate(task.samples, task.first_sample, choice)

    def score_paths(self, task: ShardTask) -> Any:
        """ModelOpt's scores by path integrals, of all samples together."""
        with _named_errors("scoring by ModelOpt"):
            return self._runner.score_paths(task.samples)

    def answer(self, task: RequestTask, choice: tuple[int, ...]) -> Any:
        """Answers to requests of benchmark tasks under an allocation."""
        with _named_errors(f"answering requests {task.shard}"):
            return self._runner.answer(task.kind, task.requests, choice)


@contextmanager
def _named_errors(doing: str) -> Iterator[None]:
    """Let only this package's errors leave the process, each naming what was being done."""
    try:
        yield
    except AutoQuantError as error:
        raise type(error)(f"{doing}: {error}") from None
    except Exception as error:  # noqa: BLE001 - the actor boundary
        if _is_device_lost(error):
            os._exit(1)
        kind = type(error).__name__
        raise WorkerError(f"{doing}: {kind}: {one_line(error, limit=500)}") from None


def _is_device_lost(error: Exception) -> bool:
    """A CUDA context does not recover from most errors; a new process does."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.AcceleratorError)


def start_worker(placement: Placement) -> Any:
    """Start one actor; Ray itself never restarts it or repeats a call: the pool decides."""
    remote: Callable[..., Any] = (
        ray.remote(ShardWorker)
        .options(
            num_cpus=placement.cpus_per_worker,
            num_gpus=placement.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            **placement.nodes.options(),
        )
        .remote
    )
    return remote(placement.reuses_memory)
