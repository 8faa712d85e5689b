"""How the workers of a command's own Ray cluster start: forked, with all their modules imported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from autoquant_ray.cli.edge import is_program
from autoquant_ray.distributed.forks.workers import forked_workers
from autoquant_ray.distributed.this_machine import starts_cluster

_PLAN = ("torch", "transformers.models.auto.modeling_auto", "transformers.modeling_utils")
_WORK = ("autoquant_ray.score.scorer", "autoquant_ray.evaluate.runner")


@contextmanager
def warm_workers(
    address: str, device: str, placement: str, *, measures: bool = False
) -> Iterator[None]:
    """While open, workers that the command starts on this machine have torch and ModelOpt.

    Where the command is not a process by itself, works on a cluster or on GPUs, or has workers that
    must be small (forked ones use huge pages), they start as ever.

    Args:
        address: Of the cluster, as it was given.
        device: Where they compute, as it was given.
        placement: Where their weights are, as it was given.
        measures: Whether the command itself imports what its workers do; else it makes a plan,
            for which it needs models only.
    """
    with ExitStack() as stack:
        is_plain = device != "cuda" and placement != "offload"
        if is_program() and is_plain and starts_cluster(address):
            here, there = ((*_PLAN, *_WORK), ()) if measures else (_PLAN, _WORK)
            stack.enter_context(forked_workers(here, there))
        yield
