"""What ``measure-latency`` needs: the model's shapes, the menu, loads, and a cluster."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.config.values import checked_places


class LatencyMeasurement(SearchSpace):
    """Fields of ``measure-latency``."""

    batch: tuple[int, ...] = Field(
        default=(1, 16, 256),
        description="Tokens at once in a product, separated by commas: the least gives the rate at "
        "which weights are read, the most that of the operations.",
    )
    rounds: int = Field(
        default=10, ge=3, le=10_000, description="Times that each product is measured."
    )
    out: str = Field(
        default="hardware",
        description="Folder or store for a YAML file per kind of accelerator, as --latency takes.",
    )
    address: str = Field(
        default="auto",
        description="Ray cluster, see scan --address: all its kinds of accelerators are measured.",
    )
    cpus_per_worker: int = Field(
        default=1, ge=1, le=4096, description="CPUs, and threads of CPU kernels."
    )

    @property
    def workers(self) -> Literal["auto"]:
        """A task per kind of accelerator; a started cluster needs no more than the machine."""
        return "auto"

    @field_validator("out", "address", mode="before")
    @classmethod
    def _check_place(cls, value: Any) -> Any:
        return checked_places(value)

    @field_validator("batch", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("batch")
    @classmethod
    def _check_batches(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [batch for batch in value if not 1 <= batch <= 2**20]
        if wrong or len(set(value)) < 2:
            raise ValueError("needs two different numbers of tokens, from 1 to 1048576")
        return tuple(sorted(set(value)))
