"""Time and memory of a scan's worker on a given card, from the plan alone.

The time is a lower bound: the matrix products at the card's highest rate for 16 bits. Loading,
data, quantization itself and the fits of GPTQ come on top.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autoquant_ray.allocate.cards import SIXTEEN, Hardware
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.plan.memory import GIB, footprint, kept_graphs
from autoquant_ray.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class WorkerEstimate:
    """What one worker takes.

    Attributes:
        card: Its name.
        num_tokens: Of the calibration data.
        seconds: Lower bound for all tokens on one worker.
        resident_bytes: Memory with all weights on the card, estimated as a scan does.
        offloaded_bytes: Memory with the weights in the host's memory.
        graph_bytes: More, where the graphs of all layers are kept while a shard is scored.
    """

    card: str
    num_tokens: int
    seconds: float
    resident_bytes: int
    offloaded_bytes: int
    graph_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What people are told, and how sure it is."""
        return [
            f"time: at least {_duration(self.seconds)} for {self.num_tokens:,} tokens on one "
            f"{self.card} (a bound, no measurement: matrix products at the card's rate)",
            f"memory of a worker: {self.resident_bytes / GIB:.1f} GiB, "
            f"{self.offloaded_bytes / GIB:.1f} GiB with --placement offload (an estimate)",
            f"graphs of all layers: {self.graph_bytes / GIB:.1f} GiB more; "
            "--keep-graphs auto keeps as many as the card has free",
        ]


def estimate_worker(
    plan: Plan, card: Hardware, samples: int | None, seq_len: int | None
) -> WorkerEstimate:
    """Estimate a worker in bfloat16.

    Args:
        plan: The plan.
        card: Its figures.
        samples: Of the calibration data; None: as a scan takes by default.
        seq_len: Longest sample, in tokens; None: the same.
    """
    given = {"dtype": "bfloat16", "device": "cuda", "samples": samples, "seq_len": seq_len}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = ScanConfig.model_construct(**values)
    num_tokens = config.samples * config.seq_len
    memory = footprint(plan, config)
    return WorkerEstimate(
        card=card.name,
        num_tokens=num_tokens,
        seconds=num_tokens * plan.flops_per_token / card.rate(SIXTEEN, SIXTEEN),
        resident_bytes=memory.worker_bytes("resident"),
        offloaded_bytes=memory.worker_bytes("offload"),
        graph_bytes=kept_graphs(plan, config, memory).visit_bytes,
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
