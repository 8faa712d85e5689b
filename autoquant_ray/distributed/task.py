"""A shard, a layer or some requests as they are sent to a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from autoquant_ray.data.samples import Sample


class Task(Protocol):
    """What a stage consists of: shards, layers, or requests."""

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


@dataclass(frozen=True, kw_only=True)
class RequestTask:
    """Requests of benchmark tasks that are answered together.

    Attributes:
        shard: Their number.
        kind: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``, as lm-eval says.
        requests: Arguments of each: texts, and how to generate.
    """

    shard: int
    kind: str
    requests: Sequence[tuple[Any, ...]]
