"""One group as a choice of formats, each with its costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.formats.method_names import same_or_plain

Scores = Mapping[tuple[str, str], float]
"""(group, format) -> score in nats per token; 16 bits have none, they lose nothing."""

RESOURCES = {"storage": "weight_bytes", "modelopt": "modelopt_cost"}
"""Cost name of the command line -> column of ``plan.parquet``."""
ACTIVE_MOE = "active_moe"


@dataclass(frozen=True, kw_only=True)
class GroupChoices:
    """One group of the plan with the rows of its choices, keyed by format.

    Attributes:
        is_tied: Its weight is the embedding's too (a tied head).
        is_idle: Not run while text is decoded (a vision tower).
        active_share: Share of its weights that a token visits: below 1 for routed experts; None
            where the run does not tell.
    """

    name: str
    module_names: list[str]
    num_weights: int
    is_searched: bool
    is_tied: bool
    is_idle: bool
    active_share: float | None
    rows: dict[str, dict[str, Any]]

    @property
    def is_cache(self) -> bool:
        """Whether it is the KV cache of an attention, not weights."""
        return any(row.get(KV_BYTES) for row in self.rows.values())

    def shares_embedding(self, format_: str) -> bool:
        """Whether its weights in that format are the embedding's, stored once for both."""
        return self.is_tied and format_ == NONE

    def uniform(self, name: str, permitted: Collection[str] | None = None) -> str:
        """What it takes where all groups are to have one format.

        16 bits where it lacks the format, by whatever method; a tied head too stays in 16 bits,
        where it costs nothing.

        Args:
            name: The format.
            permitted: Formats that it may take; None: all that it has.
        """
        if self.is_tied:
            return NONE
        return same_or_plain(name, self.rows if permitted is None else permitted) or NONE

    def cost(self, format_: str, resource: str) -> float:
        """Cost of a choice: bytes, ModelOpt's 16-bit weight equivalents, or milliseconds."""
        row = self.rows[format_]
        if resource == "storage" and self.shares_embedding(format_):
            return 0.0
        if resource == ACTIVE_MOE:
            return float(row["modelopt_cost"]) * (self.active_share or 0.0)
        if resource == KV_BYTES:
            return float(row.get(KV_BYTES) or 0.0)
        return float(row[RESOURCES.get(resource, resource)])

    def weights(self, resource: str) -> float:
        """Number of weights over which a cost is averaged.

        Stored bytes are averaged over weights that are stored on their own, a tied head's left out.
        """
        if resource == "storage" and self.is_tied:
            return 0.0
        share = (self.active_share or 0.0) if resource == ACTIVE_MOE else 1.0
        return self.num_weights * share
