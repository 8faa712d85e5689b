"""Budgets in users' words -> choices and limits of the allocation.

These costs stand side by side for each (group, format): ``storage`` (stored bytes of the group),
``modelopt`` (ModelOpt's number), ``active_moe`` (the same, of routed experts only the share that a
token visits: ModelOpt's cost model of that name), ``model`` (what the choice adds to the whole
model's bytes) and, where a card is given, ``latency`` (:mod:`autoquant_ray.latency`).
``kv_bytes_per_token`` is what a token of context takes in the KV cache, where its format is chosen.
``storage`` and ``model`` differ for a head that is tied to the embedding: in 16 bits it shares the
embedding's bytes and adds nothing, quantized it is stored beside the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, SkipValidation, TypeAdapter, ValidationError

from autoquant_ray.allocation import Budget, Choice
from autoquant_ray.config import ScanConfig
from autoquant_ray.config_file import first_problem
from autoquant_ray.domain_weights import check_objective, normalised
from autoquant_ray.engine_choices import Served
from autoquant_ray.engines import check_target
from autoquant_ray.errors import ConfigError
from autoquant_ray.expert_clusters import Experts
from autoquant_ray.expert_groups import LAYER, ExpertGroups
from autoquant_ray.formats import NONE
from autoquant_ray.group_choices import ACTIVE_MOE, RESOURCES, GroupChoices
from autoquant_ray.kv_budget import cache_budget
from autoquant_ray.kv_formats import KV_BYTES, positive_problem
from autoquant_ray.latency import LATENCY, StepTime
from autoquant_ray.latency_target import Latency
from autoquant_ray.step_facts import is_routed_expert

BITS_PER_BYTE = 8
UNQUANTIZED_BITS = 16


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """Budget and constraints of one solution; all given ones hold together.

    What is least is the loss on all tokens, unless ``domains`` weighs the losses of domains (the
    weights are made to sum to 1) or ``worst_domain`` asks for the least loss of the worst one.
    Values of unknown types go through :meth:`checked`.
    With an ``engine`` only plans count that it can serve, on the ``gpu`` if one is given.
    ``expert_groups`` None: as the run was scanned.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    bits: float | None = None
    bytes: int | None = None
    kv_bytes_per_token: float | None = None
    bits_over: Literal["searched", "all"] = "searched"
    cost: Literal["storage", "modelopt", "active_moe"] = "storage"
    max_formats: int | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    allow: Mapping[str, Sequence[str]] = field(default_factory=dict)
    domains: Mapping[str, float] = field(default_factory=dict)
    worst_domain: bool = False
    latency: SkipValidation[Latency | None] = None
    engine: str | None = None
    gpu: str | None = None
    expert_groups: ExpertGroups | None = None

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> SolveOptions:
        """Options of values that may be of any type.

        Raises:
            ConfigError: An unknown name, or a value that its field cannot take.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            known = [one.name for one in fields(cls)]
            raise ConfigError(first_problem(error, lambda name, _: name, known)) from None

    def __post_init__(self) -> None:
        check_objective(self.domains, self.worst_domain)
        object.__setattr__(self, "domains", normalised(self.domains))
        if not isinstance(self.latency, Latency | None):
            raise ConfigError(f"latency {self.latency!r}: use latency_of({self.latency!r}, ...)")
        object.__setattr__(self, "gpu", check_target(self.engine, self.gpu))
        limit_ms = None if self.latency is None else self.latency.limit_ms
        if self.bits is None and self.bytes is None and limit_ms is None:
            raise ConfigError(
                "give a budget: --bits B, --bytes N, or --latency HARDWARE with "
                "--tokens-per-second X or --ms-per-token Y"
            )
        if self.bits is not None and not 0 < self.bits <= UNQUANTIZED_BITS:
            raise ConfigError(f"--bits {self.bits} must be above 0 and at most 16")
        if (problem := positive_problem(self.kv_bytes_per_token)) is not None:
            raise ConfigError(problem)


def solve_options(config: ScanConfig) -> SolveOptions:
    """The budget of a scan."""
    names = {one.name for one in fields(SolveOptions)} & ScanConfig.model_fields.keys()
    values = {name: getattr(config, name) for name in names}
    experts = None if config.expert_groups == LAYER else config.expert_groups
    return SolveOptions(**values | {"expert_groups": experts})


class Problem:
    """All groups with their costs, from the rows of a plan.

    Args:
        plan_rows: Rows of ``plan.parquet``.
        summary: The plan's summary from ``run.json``.
    """

    def __init__(self, plan_rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
        tied = set(summary["tied_groups"])
        idle = set(summary.get("idle_groups", ()))
        ratio: float | None = summary.get("step", {}).get("active_expert_ratio")
        self.other_bytes: int = summary["other_bytes"]
        self.has_active_moe = ratio is not None
        self.step: StepTime | None = None
        self.served: Served | None = None
        self.experts: Experts | None = None
        self.summary = summary
        silent = summary.get("unsearched", {})  # among them experts that turned out to see no token
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
            groups[name].rows[row["format"]] = dict(row)
        self.groups = groups

    def timed(self, latency: Latency | None) -> Problem:
        """The same problem with the time of a decode step among its costs, where a card is given.

        Raises:
            ConfigError: The run does not hold what the prediction needs.
        """
        if latency is None:
            return self
        timed = copy(self)
        timed.step = step = StepTime(latency, self.summary)
        timed.groups = {
            name: replace(
                group,
                rows={
                    f: {**row, LATENCY: step.group_ms(group, f)} for f, row in group.rows.items()
                },
            )
            for name, group in self.groups.items()
        }
        return timed

    @property
    def resources(self) -> list[str]:
        """Names of the costs that every choice has."""
        names = [*RESOURCES, "model", *([KV_BYTES] if self.caches else [])]
        names += [ACTIVE_MOE] if self.has_active_moe else []
        return names if self.step is None else [*names, LATENCY]

    @property
    def searched(self) -> list[GroupChoices]:
        """Groups for which a format is chosen."""
        return [group for group in self.groups.values() if group.is_searched]

    @property
    def unsearched(self) -> list[GroupChoices]:
        """Groups that stay in 16 bits."""
        return [group for group in self.groups.values() if not group.is_searched]

    @property
    def caches(self) -> list[GroupChoices]:
        """Groups that are KV caches, searched or not."""
        return [group for group in self.groups.values() if group.is_cache]

    def with_held_caches(self, formats: Mapping[str, str]) -> Problem:
        """The same problem in which no cache has another choice than a solution's format.

        Args:
            formats: Group -> format; groups without one stay in 16 bits.
        """
        held = copy(self)
        held.groups = dict(self.groups)
        for group in self.caches:
            name = formats.get(group.name, NONE)
            held.groups[group.name] = replace(group, rows={name: group.rows[name]})
        return held

    def choices(self, scores: Mapping[tuple[str, str], float]) -> list[Choice]:
        """Choices of the searched groups; 16 bits lose nothing by definition.

        Args:
            scores: (group, format) -> score in nats per token.
        """
        return [
            Choice(
                group=group.name,
                format=format_,
                score=0.0 if format_ == NONE else scores[group.name, format_],
                costs={name: group.cost(format_, name) for name in self.resources},
            )
            for group in self.searched
            for format_ in group.rows
        ]

    def budgets(self, options: SolveOptions) -> list[Budget]:
        """Limits on the searched groups' costs that the options ask for.

        A limit on the time of a decode step needs a problem that is :meth:`timed`.
        """
        budgets = [] if options.bits is None else [self._bits_budget(options.bits, options)]
        if options.bytes is not None:
            fixed = self.other_bytes + sum(g.cost(NONE, "model") for g in self.unsearched)
            budgets.append(
                Budget(
                    resource="model",
                    limit=options.bytes - fixed,
                    unit_per_bit=None,
                    description=f"--bytes {options.bytes}",
                    fixed=fixed,
                )
            )
        if options.latency is not None and options.latency.limit_ms is not None:
            assert self.step is not None, "the problem is not timed"
            budgets.append(self.step.budget(self.unsearched, options.latency.limit_ms))
        return budgets + cache_budget(self.caches, options.kv_bytes_per_token)

    def _bits_budget(self, bits: float, options: SolveOptions) -> Budget:
        if options.cost == ACTIVE_MOE and not self.has_active_moe:
            raise ConfigError(
                "--cost active_moe needs the share of the experts that a token visits; this run "
                "names none (no experts, imported, or made by an earlier version)"
            )
        weights = sum(group.weights(options.cost) for group in self.searched)
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
            description=f"--bits {bits:g}{note}",
        )
