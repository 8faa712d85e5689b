"""Why a group got its format: what each format costs and loses, and what changing it would cost.

Beside the loss stands the price of a flip (:mod:`~autoquant_ray.allocate.certainty.flips`), how
often the resampled shards chose each format (:mod:`~autoquant_ray.allocate.certainty.solution`),
and the shards that the scores come from (:mod:`~autoquant_ray.allocate.certainty.shard_shares`).
Read from a run's files, which stay as they are; needs neither the model, torch nor Ray.
"""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Mapping

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.candidate import make_candidate
from autoquant_ray.allocate.certainty.explanation import Alternative, Explanation
from autoquant_ray.allocate.certainty.flips import Flips
from autoquant_ray.allocate.certainty.shard_shares import ShardShare, find_shards
from autoquant_ray.allocate.certainty.solution import Certainty, certainty_of
from autoquant_ray.allocate.domains import solve_for, wanted_domains
from autoquant_ray.allocate.group_choices import GroupChoices, Scores
from autoquant_ray.allocate.group_names import find_group
from autoquant_ray.allocate.options import (
    BITS_PER_BYTE,
    UNQUANTIZED_BITS,
    SolveOptions,
)
from autoquant_ray.allocate.read import (
    ScoredRun,
    is_chosen_by_measurement,
    solution_formats,
    solution_options,
)
from autoquant_ray.allocate.search import search, served_problem
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.formats.method_names import Rounding, roundings
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_JSON, solution_folder, solution_of
from autoquant_ray.runs.state import RunState

_NO_QUANTIZER = "ModelOpt has no quantizer for this module"


def explain_group(directory: RunDirectory, name: str, solution: str = "") -> Explanation:
    """Collect why a group got its format.

    Args:
        directory: A run whose scores are complete.
        name: The group's name, that of one of its modules, or a fragment that fits one group only.
        solution: Folder below ``solutions/``; '' for the scan's own.

    Raises:
        ConfigError: No group, or more than one, fits the name.
        StoreError: Not a run, no such solution, or files are damaged.
    """
    state = RunState.open(directory)
    run = ScoredRun.read(state)
    problem = run.problem
    start = solution_folder(solution)
    options = solution_options(state, start)
    others: dict[str, int] = state.plan["other_modules"]
    module_names = {group.name: group.module_names for group in problem.groups.values()}
    group_name = find_group(name, {other: [other] for other in others} | module_names)
    group = problem.groups.get(group_name)
    if group is None or not group.is_searched:
        return _unsearched(state, solution, group, group_name)
    timed = problem.timed(options.latency)
    return _Story(run.with_problem(timed), options, start).explain(timed.groups[group_name])


def _unsearched(
    state: RunState, solution: str, group: GroupChoices | None, module: str
) -> Explanation:
    """A group that stays in 16 bits; without one, a module that ModelOpt cannot quantize."""
    plan = state.plan
    weights = plan["other_modules"][module] if group is None else group.num_weights
    return Explanation(
        run=state.directory.uri,
        solution=solution,
        group=module,
        module_names=[module] if group is None else group.module_names,
        num_weights=weights,
        reason=_NO_QUANTIZER if group is None else plan["unsearched"][module],
        chosen=NONE,
        weight_bytes=_bytes_in_16_bits(group, weights),
        is_tied=group is not None and group.is_tied,
    )


def _bytes_in_16_bits(group: GroupChoices | None, weights: int) -> float:
    """Of a group that is not searched; without one, of a module's weights."""
    if group is not None:
        return group.cost(NONE, "storage")
    return weights * UNQUANTIZED_BITS / BITS_PER_BYTE


class _Story:
    """One solution of a run, about whose groups can be told."""

    def __init__(self, run: ScoredRun, options: SolveOptions, start: str) -> None:
        self._run = run
        self._state = state = run.state
        self._problem = problem = run.problem
        is_by_domain = bool(options.domains) or options.worst_domain
        self._domains = wanted_domains(state) if is_by_domain else None
        self._scores: Scores = run.scores
        if self._domains is not None and options.domains:
            self._scores = self._domains.weighted(options.domains)
        self._options = options
        self._start = start
        self._formats = solution_formats(state, start, problem)
        self._served = served_problem(problem, options, self._formats)
        self._solution_score = make_candidate(problem, self._scores, "", self._formats).predicted_kl
        if options.worst_domain:
            self._solution_score = state.directory.read_json(f"{start}{MANIFEST_JSON}")["solution"][
                "score"
            ]

    def explain(self, group: GroupChoices) -> Explanation:
        """Everything about a searched group."""
        directory = self._state.directory
        arguments = (self._served, self._scores, self._options, self._formats)
        certainty = certainty_of(self._state, *arguments)
        shards = find_shards(self._state, group.name, self._problem, self._options)
        chosen = self._formats[group.name]
        is_imported = self._state.record.is_imported
        return Explanation(
            run=directory.uri,
            solution=solution_of(self._start),
            group=group.name,
            module_names=group.module_names,
            num_weights=group.num_weights,
            reason=None,
            chosen=chosen,
            weight_bytes=group.cost(chosen, "storage"),
            budget=shlex.join(self._options.words(without=("pins", "allow"))),
            unit="no unit (imported)" if is_imported else "nats per token",
            plan_score=self._solution_score,
            pin=self._options.pins.get(group.name),
            allow={
                pattern: list(names)
                for pattern, names in self._options.allow.items()
                if fnmatch.fnmatch(group.name, pattern)
            },
            is_tied=group.is_tied,
            is_refined=is_chosen_by_measurement(
                directory.read_json(f"{self._start}{MANIFEST_JSON}")
            ),
            num_resamples=None if certainty is None else certainty.num_resamples,
            num_shards=shards.num_shards,
            no_shards=shards.reason,
            without_shard=shards.without,
            formats=self._alternatives(group, certainty, shards.largest),
        )

    def _alternatives(
        self,
        group: GroupChoices,
        certainty: Certainty | None,
        largest: Mapping[str, list[ShardShare]],
    ) -> list[Alternative]:
        flips = Flips(self._solve, self._options, self._formats, self._solution_score)
        by_domain = self._options.domains  # the errors are of all tokens alike
        errors = {} if by_domain else self._run.errors
        drawing = {} if by_domain else self._run.drawing_errors
        shares = {} if certainty is None else certainty.shares[group.name]
        rounded = roundings(self._problem.summary["formats"])
        return [
            Alternative(
                format=format_,
                is_chosen=format_ == self._formats[group.name],
                score=self._score(group.name, format_),
                score_stderr=errors.get((group.name, format_)),
                sampling_stderr=drawing.get((group.name, format_)),
                method=rounded[format_].method if format_ in rounded else None,
                saved=self._saved(group, format_, rounded),
                weight_bits=row["weight_bits"],
                weight_bytes=row["weight_bytes"],
                model_bytes=group.cost(format_, "storage"),
                kv_bytes=row.get(KV_BYTES) or None,
                resampled_share=shares.get(format_),
                flip=flips.price(group.name, format_),
                shards=largest.get(format_, []),
            )
            for format_, row in group.rows.items()
        ]

    def _score(self, group: str, format_: str) -> float:
        return 0.0 if format_ == NONE else self._scores[group, format_]

    def _saved(
        self, group: GroupChoices, format_: str, rounded: Mapping[str, Rounding]
    ) -> float | None:
        """What a method of rounding saves against the same format rounded plainly."""
        plain = rounded[format_].plain if format_ in rounded else None
        if plain not in group.rows:
            return None
        return self._score(group.name, plain) - self._score(group.name, format_)

    def _solve(self, options: SolveOptions) -> Allocation:
        if self._domains is None:
            return search(self._problem, self._scores, options)
        return solve_for(self._domains, self._problem, options)
