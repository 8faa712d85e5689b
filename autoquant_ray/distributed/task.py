"""A shard or a layer as it is sent to a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autoquant_ray.data.samples import Sample


class Task(Protocol):
    """What a stage consists of: shards, or layers."""

    @property
    def shard(self) -> int:
        """Its number in the stage."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayerTask:
    """The weights of some decoder layers.

    Attributes:
        layers: Their numbers; the number of layers stands for what is outside of them.
    """

    layers: tuple[int, ...]

    @property
    def shard(self) -> int:
        """The first of them."""
        return self.layers[0]


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard with all of its samples.

    Attributes:
        shard: Its number.
        first_sample: Position of its first sample in the data set.
        samples: Token ids per sample, int32, or rich samples.
    """

    shard: int
    first_sample: int
    samples: Sequence[Sample]
