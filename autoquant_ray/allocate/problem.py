"""Budgets in users' words -> choices and limits of the allocation.

These costs stand side by side for each (group, format): ``storage`` (what the choice adds to the
model's bytes), ``modelopt`` (ModelOpt's number), ``active_moe`` (the same, of routed experts only
the share that a token visits: ModelOpt's cost model of that name) and, where a card is given,
``latency`` (:mod:`autoquant_ray.allocate.latency`). ``kv_bytes_per_token`` is what a token of
context takes in the KV cache, where its format is chosen.
A head that is tied to the embedding shares its bytes in 16 bits and adds nothing; quantized it is
stored beside the embedding. So its weights do not count among those that stored bits are averaged
over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from autoquant_ray.allocate.allocation import Budget
from autoquant_ray.allocate.expert_clusters import Experts
from autoquant_ray.allocate.group_choices import (
    ACTIVE_MOE,
    RESOURCES,
    GroupChoices,
    Menus,
    Scores,
)
from autoquant_ray.allocate.knapsack.choices import Choices
from autoquant_ray.allocate.kv_caches import cache_budget
from autoquant_ray.allocate.latency import LATENCY, StepTime
from autoquant_ray.allocate.load import Latency
from autoquant_ray.allocate.options import BITS_PER_BYTE, UNQUANTIZED_BITS, SolveOptions
from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.plan.decode_step import is_routed_expert
from autoquant_ray.plan.group import nothing_stored
from autoquant_ray.serving.menus import Served


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All groups with their costs.

    Attributes:
        groups: Name -> group, in the model's order.
        summary: The plan's summary from ``run.json``.
        step: Predicts the time of a decode step; None unless the problem is :meth:`timed`.
        served: What an engine serves together; None where none is asked for.
        experts: Experts that may share a format; None where they were not scored apart.
        menus: The searched groups as arrays; variants with the same groups share them.
    """

    groups: Mapping[str, GroupChoices]
    summary: Mapping[str, Any]
    step: StepTime | None = None
    served: Served | None = None
    experts: Experts | None = None
    menus: Menus = field(default_factory=lambda: Menus({}), repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.menus.are_of(self.groups):
            object.__setattr__(self, "menus", Menus(self.groups))

    @classmethod
    def from_plan(
        cls, plan_rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
    ) -> Problem:
        """The groups of a plan.

        Args:
            plan_rows: Rows of ``plan.parquet``.
            summary: The plan's summary from ``run.json``.

        Raises:
            ConfigError: No searched group has weights that are stored on their own.
        """
        tied = set(summary["tied_groups"])
        idle = set(summary.get("idle_groups", ()))
        silent = summary.get("unsearched", {})  # among them experts that turned out to see no token
        ratio: float | None = summary.get("step", {}).get("active_expert_ratio")
        groups: dict[str, GroupChoices] = {}
        for row in plan_rows:
            name = row["group"]
            if name in silent and row["format"] != NONE:
                continue
            if name not in groups:
                groups[name] = GroupChoices(
                    name=name,
                    module_names=list(row["module_names"]),
                    num_weights=row["num_weights"],
                    is_searched=row["is_searched"] and name not in silent,
                    is_tied=name in tied,
                    is_idle=name in idle,
                    active_share=ratio if any(map(is_routed_expert, row["module_names"])) else 1.0,
                    rows={},
                )
            groups[name].rows[row["format"]] = {
                key: value for key, value in row.items() if key not in _OF_GROUP
            }
        problem = cls(groups=groups, summary=summary)
        if problem.searched and all(group.is_tied or group.is_cache for group in problem.searched):
            raise nothing_stored([group.name for group in problem.searched if group.is_tied])
        return problem

    @property
    def other_bytes(self) -> int:
        """Bytes of the weights outside all groups, tensors that are not loaded among them."""
        num_bytes: int = self.summary["other_bytes"]
        return num_bytes + sum(self.carried.values())

    @property
    def carried(self) -> Mapping[str, int]:
        """Tensor of the model's files that is not loaded -> bytes that it takes in a checkpoint."""
        carried: Mapping[str, int] = self.summary.get("carried", {})
        return carried

    @property
    def has_active_moe(self) -> bool:
        """Whether the run names the share of the experts that a token visits."""
        return self.summary.get("step", {}).get("active_expert_ratio") is not None

    def timed(self, latency: Latency | None) -> Problem:
        """The same problem with the time of a decode step among its costs, where a card is given.

        Raises:
            ConfigError: The run does not hold what the prediction needs.
        """
        if latency is None or (self.step is not None and self.step.latency == latency):
            return self
        step = StepTime(latency, self.summary)
        groups = {
            name: replace(
                group,
                rows={
                    f: {**row, LATENCY: step.group_ms(group, f)} for f, row in group.rows.items()
                },
            )
            for name, group in self.groups.items()
        }
        return replace(self, groups=groups, step=step)

    @cached_property
    def resources(self) -> list[str]:
        """Names of the costs that every choice has."""
        names = [*RESOURCES, *([KV_BYTES] if self.caches else [])]
        names += [ACTIVE_MOE] if self.has_active_moe else []
        return names if self.step is None else [*names, LATENCY]

    @cached_property
    def searched(self) -> list[GroupChoices]:
        """Groups for which a format is chosen."""
        return [group for group in self.groups.values() if group.is_searched]

    @cached_property
    def unsearched(self) -> list[GroupChoices]:
        """Groups that stay in 16 bits."""
        return [group for group in self.groups.values() if not group.is_searched]

    @cached_property
    def unsearched_bytes(self) -> list[float]:
        """Bytes that each group that stays in 16 bits adds to the model."""
        return [group.cost(NONE, "storage") for group in self.unsearched]

    @property
    def fixed_bytes(self) -> float:
        """Bytes of the model that no choice changes."""
        return self.other_bytes + math.fsum(self.unsearched_bytes)

    @cached_property
    def caches(self) -> list[GroupChoices]:
        """Groups that are KV caches, searched or not."""
        return [group for group in self.groups.values() if group.is_cache]

    def with_held_caches(self, formats: Mapping[str, str]) -> Problem:
        """The same problem in which no cache has another choice than a solution's format.

        Args:
            formats: Group -> format; groups without one stay in 16 bits.
        """
        held = {group.name: formats.get(group.name, NONE) for group in self.caches}
        if not held:
            return self
        groups = {
            name: replace(group, rows={held[name]: group.rows[held[name]]})
            if name in held
            else group
            for name, group in self.groups.items()
        }
        return replace(self, groups=groups)

    def without(self, formats: Collection[str]) -> Problem:
        """The same problem in which no group can take some formats."""
        groups = {
            name: replace(group, rows={f: r for f, r in group.rows.items() if f not in formats})
            for name, group in self.groups.items()
        }
        return replace(self, groups=groups)

    def choices(self, scores: Scores | None) -> Choices:
        """Choices of the searched groups; 16 bits lose nothing by definition.

        Args:
            scores: (group, format) -> score in nats per token; None: nothing loses anything.
        """
        return self.menus.choices(scores, self.resources)

    def budgets(self, options: SolveOptions) -> list[Budget]:
        """Limits on the searched groups' costs that the options ask for.

        A limit on the time of a decode step needs a problem that is :meth:`timed`.
        """
        budgets = [] if options.bits is None else [self._bits_budget(options.bits, options)]
        if options.bytes is not None:
            budgets.append(
                Budget(
                    resource="storage",
                    limit=options.bytes - self.fixed_bytes,
                    unit_per_bit=None,
                    description=f"`bytes` {options.bytes}",
                    fixed=self.fixed_bytes,
                )
            )
        if options.latency is not None and options.latency.limit_ms is not None:
            assert self.step is not None, "the problem is not timed"
            budgets.append(self.step.budget(self.unsearched, options.latency.limit_ms))
        return budgets + cache_budget(self.caches, options.kv_bytes_per_token)

    def _bits_budget(self, bits: float, options: SolveOptions) -> Budget:
        if options.cost == ACTIVE_MOE and not self.has_active_moe:
            raise ConfigError(
                "`cost` active_moe needs the share of the experts that a token visits; this run "
                "names none (no experts, imported, or made by an earlier version)"
            )
        weights = self.menus.weights(options.cost)
        per_bit = 1 / BITS_PER_BYTE if options.cost == "storage" else 1 / UNQUANTIZED_BITS
        limit, note = bits * weights * per_bit, ""
        if options.bits_over == "all":
            outside = sum(group.weights(options.cost) for group in self.unsearched)
            limit += (bits - UNQUANTIZED_BITS) * outside * per_bit
            note = f" over all weights, {outside:.0f} of them in 16 bits" if outside else ""
        return Budget(
            resource=options.cost,
            limit=limit,
            unit_per_bit=weights * per_bit,
            description=f"`bits` {bits:g}{note}",
            highest=UNQUANTIZED_BITS * weights * per_bit,
        )


_OF_GROUP = ("group", "format", "module_names", "is_searched")
"""Columns of ``plan.parquet`` that say nothing of a choice."""
