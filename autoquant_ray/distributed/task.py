"""A shard as a worker takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoquant_ray.data.samples import Sample


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard, handed over whole.

    Attributes:
        shard: Its number.
        first_sample: Position of its first sample in the data set.
        samples: Token ids per sample, int32, or what else a sample holds.
    """

    shard: int
    first_sample: int
    samples: Sequence[Sample]
