"""One group as a choice of formats, each with its costs; and all groups as arrays.

Shapes: G groups, F formats, K (group, format).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from autoquant_ray.allocate.knapsack.choices import Choices
from autoquant_ray.arrays import Floats, Indices, Mask
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


class Menus:
    """Names, formats and costs of searched groups as arrays, made when first asked for.

    All searches of a problem share them.

    Args:
        groups: Name -> group, in the order of the rows; those that are not searched are left out.
    """

    def __init__(self, groups: Mapping[str, GroupChoices]) -> None:
        self._all = groups
        self._groups = [group for group in groups.values() if group.is_searched]
        self._costs: dict[str, Floats] = {}
        self._weights: dict[str, float] = {}
        self._last_scores: tuple[Scores | None, Floats] | None = None

    def are_of(self, groups: Mapping[str, GroupChoices]) -> bool:
        """Whether these very groups were laid out."""
        return self._all is groups

    @cached_property
    def names(self) -> list[str]:
        """Names of the groups."""
        return [group.name for group in self._groups]

    @cached_property
    def formats(self) -> list[str]:
        """Formats of all groups, in the order in which groups name them."""
        return list(dict.fromkeys(format_ for group in self._groups for format_ in group.rows))

    @cached_property
    def columns(self) -> dict[str, int]:
        """Format -> column."""
        return {name: column for column, name in enumerate(self.formats)}

    @cached_property
    def has_GF(self) -> Mask:
        """Which group has which format."""
        has_GF = np.zeros((len(self._groups), len(self.formats)), dtype=np.bool_)
        has_GF[self._at] = True
        return has_GF

    @cached_property
    def _at(self) -> tuple[Indices, Indices]:
        """Rows and columns of all (group, format)."""
        counts = [len(group.rows) for group in self._groups]
        columns_K = [self.columns[format_] for group in self._groups for format_ in group.rows]
        return np.repeat(np.arange(len(counts)), counts), np.array(columns_K, dtype=np.intp)

    @cached_property
    def _scored_keys(self) -> list[tuple[str, str]]:
        """All (group, format) that have a score: all but 16 bits."""
        return [(g.name, format_) for g in self._groups for format_ in g.rows if format_ != NONE]

    def cost(self, resource: str) -> Floats:
        """Costs (G, F) of a resource in its own unit; 0 where a group lacks a format."""
        if resource not in self._costs:
            cost_GF = np.zeros(self.has_GF.shape)
            cost_GF[self._at] = [
                group.cost(format_, resource) for group in self._groups for format_ in group.rows
            ]
            self._costs[resource] = cost_GF
        return self._costs[resource]

    def weights(self, resource: str) -> float:
        """Number of weights over which a cost is averaged, all groups together."""
        if resource not in self._weights:
            self._weights[resource] = float(sum(g.weights(resource) for g in self._groups))
        return self._weights[resource]

    def scores(self, scores: Scores | None) -> Floats:
        """Scores (G, F): 0 for 16 bits, inf where a group lacks a format.

        Args:
            scores: (group, format) -> nats per token, which must not change afterwards; None:
                everything loses nothing.
        """
        if self._last_scores is not None and self._last_scores[0] is scores:
            return self._last_scores[1]
        scores_GF = np.where(self.has_GF, 0.0, np.inf)
        if scores is not None:
            rows_K, columns_K = self._at
            is_scored_K = columns_K != self.columns.get(NONE, -1)
            values_K = [scores[key] for key in self._scored_keys]
            scores_GF[rows_K[is_scored_K], columns_K[is_scored_K]] = values_K
        self._last_scores = scores, scores_GF
        return scores_GF

    def choices(self, scores: Scores | None, resources: Sequence[str]) -> Choices:
        """Everything that may be chosen.

        Args:
            scores: As in :meth:`scores`.
            resources: Costs that every choice has.
        """
        return Choices(
            groups=self.names,
            formats=self.formats,
            has_GF=self.has_GF,
            scores_GF=self.scores(scores),
            costs={resource: self.cost(resource) for resource in resources},
        )

    def columns_of(self, formats: Mapping[str, str]) -> Indices:
        """The column (G,) of each group's format.

        Args:
            formats: Group -> format.
        """
        return np.array([self.columns[formats[name]] for name in self.names], dtype=np.intp)

    def chosen_costs(self, resource: str, formats: Mapping[str, str]) -> list[float]:
        """The cost of each group's format.

        Args:
            resource: In whose unit.
            formats: Group -> format.
        """
        columns_G = self.columns_of(formats)
        costs: list[float] = self.cost(resource)[np.arange(len(columns_G)), columns_G].tolist()
        return costs
