"""Re-solve a finished run for a budget: needs neither the model, torch nor Ray.

Reads ``plan.parquet``, ``sensitivity.parquet`` and ``run.json``; writes two manifests and the
reports into a solution's folder (the run's own folder for the budget of the scan itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.certainty.solution import Certainty, certainty_of
from autoquant_ray.allocate.certainty.stopping import describe_stopping
from autoquant_ray.allocate.domains import domain_summary, solve_domains
from autoquant_ray.allocate.frontier import smallest_within
from autoquant_ray.allocate.losses import chosen_formats, uniform_format
from autoquant_ray.allocate.manifest import build_manifest, manifest_rows, solution_summary
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.quant_cfg import quantization_config
from autoquant_ray.allocate.read import ScoredRun, is_chosen_by_measurement
from autoquant_ray.allocate.search import served_problem
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError, StoreError
from autoquant_ray.formats.format import NONE
from autoquant_ray.notebook import facts_html
from autoquant_ray.report import write_reports
from autoquant_ray.report.concerns import low_uniform
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import brief_lease
from autoquant_ray.runs.names import MANIFEST_JSON, MANIFEST_TABLE, SOLUTIONS, solution_folder
from autoquant_ray.runs.state import RunState
from autoquant_ray.serving.menus import why_unheld
from autoquant_ray.serving.table import ENGINES


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution:
    """An allocation that has been written.

    Attributes:
        name: Folder name under ``solutions/``; empty for the scan's own budget.
        summary: The ``solution`` object of ``manifest.json``.
        formats: Group -> chosen format, unsearched groups included.
        paths: File kind -> full path.
        shards_used: How many shards were used and why, for a scan that was asked to stop early.
        certainty: How sure it is; None where there are no shards to resample.
        sensitivities: Searched groups with the largest score over the menu, most sensitive first.
        caution: Why the predicted KL is too low, if it is known to be.
        grave: Reasons why it should not be used as it is, one line each, as in its reports.
        unheld: Why no checkpoint holds it, as far as the scan could say.
        separate_head: The head, where the model's config ties it to the embedding and its files
            hold another weight for it.
    """

    name: str
    summary: dict[str, Any]
    formats: dict[str, str]
    paths: dict[str, str]
    shards_used: str | None
    certainty: Certainty | None
    sensitivities: list[tuple[str, float]]
    caution: str | None
    grave: list[str]
    unheld: str | None
    separate_head: str | None

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            **self.summary,
            "name": self.name,
            "formats": self.formats,
            "paths": self.paths,
        }

    def __repr__(self) -> str:
        """Name, bits, size and loss; ``formats`` of hundreds of groups would hide them."""
        kl = self.summary["predicted_kl_nats"]
        return (
            f"Solution({self.name or 'of the scan'!r}, {self.summary['effective_bits']:.4f} bits, "
            f"{self.summary['weight_bytes'] / 2**20:,.1f} MiB, "
            f"predicted KL {'unknown' if kl is None else format(kl, '.4g')})"
        )

    def _repr_html_(self) -> str:
        kl = self.summary["predicted_kl_nats"]
        facts = [
            ("Effective bits", f"{self.summary['effective_bits']:.4f}"),
            ("Weights of the whole model", f"{self.summary['weight_bytes'] / 2**20:,.1f} MiB"),
            ("Predicted KL", "unknown" if kl is None else f"{kl:.4g} nats per token"),
            *([] if self.caution is None else [("Note", self.caution)]),
            *(("Grave concern", text) for text in self.grave),
            *((kind, path) for kind, path in self.paths.items()),
        ]
        return facts_html(f"Solution {self.name}" if self.name else "The scan's solution", facts)


def solve_run(
    directory: RunDirectory, options: SolveOptions, folder: str | None = None
) -> Solution:
    """Solve a budget and write manifests and reports.

    Args:
        directory: A run whose scores are complete.
        options: Budget and constraints.
        folder: Folder to write to, relative to the run; default ``solutions/<name>``.

    Raises:
        InfeasibleBudgetError: With the reachable range.
        ConfigError: A constraint names something that does not exist.
        StoreError: Not a run, or its files are damaged.
        HeldError: Another process writes into the run.
    """
    with writing(directory) as run:
        return _solve(run, options, options.name if folder is None else folder.rstrip("/"))


def solve_within(directory: RunDirectory, largest_kl: float) -> Solution:
    """Solve the fewest bits that are predicted to lose at most so much, and write it.

    Args:
        directory: A run whose scores are complete.
        largest_kl: Nats per token.

    Raises:
        InfeasibleBudgetError: Even 16 bits are not enough.
        ConfigError: An imported run, whose scores have no unit.
        StoreError: As :func:`solve_run`.
    """
    with writing(directory) as run:
        if run.state.record.is_imported:
            raise ConfigError(
                f"{directory.uri} was imported, and its scores have no unit, so that no loss in "
                "nats can be asked for; solve it with `bits`"
            )
        options = smallest_within(run, largest_kl)
        return _solve(run, options, options.name)


@contextmanager
def writing(directory: RunDirectory) -> Iterator[ScoredRun]:
    """A run as it is while nobody else writes into it.

    Raises:
        StoreError: Not a run, or its files are damaged.
        HeldError: Another process writes into it.
    """
    directory.require_run()  # no lease in a folder of others
    with brief_lease(directory):
        yield ScoredRun.read(RunState.open(directory))


def _solve(run: ScoredRun, options: SolveOptions, name: str) -> Solution:
    problem, options, allocation = _search(run, options)
    return write_solution(run.with_problem(problem), options, allocation, name)


def _search(run: ScoredRun, options: SolveOptions) -> tuple[Problem, SolveOptions, Allocation]:
    """The problem that was solved, with all options said, and its best allocation."""
    problem = run.problem.timed(options.latency)
    if problem.experts is not None and options.expert_groups is None:
        options = options.replaced(expert_groups=problem.experts.scanned_as)
    return problem, options, solve_domains(run.state, problem, run.scores, options)


def served_options(state: RunState, options: SolveOptions) -> SolveOptions | None:
    """The same budget for an engine that serves a solution of it, in fewer than 16 bits; or None.

    Constraints on groups are left out where no engine serves what meets them.

    Args:
        state: A run whose scores are complete.
        options: Budget and constraints.
    """
    run = ScoredRun.read(state)
    without: dict[str, Any] = {"pins": {}, "allow": {}}
    for changes in ({}, without):
        for engine in ENGINES:
            served = options.replaced(engine=engine, gpu=None, **changes)
            try:
                _, _, allocation = _search(run, served)
            except (ConfigError, InfeasibleBudgetError):
                continue
            if set(allocation.formats.values()) != {NONE}:
                return served
    return None


def write_solution(
    run: ScoredRun,
    options: SolveOptions,
    allocation: Allocation,
    name: str,
    notes: Mapping[str, Any] | None = None,
) -> Solution:
    """Write an allocation's manifests and reports.

    Args:
        run: The run, with the problem that was solved.
        options: Budget and constraints that the allocation meets.
        allocation: What to write.
        name: Folder below ``solutions/``; '' for the run's own folder.
        notes: More keys of ``manifest.json``: how the allocation was chosen.
    """
    formats = chosen_formats(run.problem, allocation)
    run = run.with_problem(served_problem(run.problem, options, formats))
    is_foreign = "imported_from" in (notes or {})
    certainty = None
    if not is_foreign:
        certainty = certainty_of(run.state, run.problem, run.scores, options, formats)
    manifest = _manifest(run, options, allocation, formats, certainty) | dict(notes or {})
    start = solution_folder(name)
    with run.state.directory.together():
        paths = _write_manifests(run, start, manifest, formats)
        reports = write_reports(run, start)
    return Solution(
        name=name,
        summary=manifest["solution"],
        formats=formats,
        paths=paths | reports.paths,
        shards_used=describe_stopping(run.state.record),
        certainty=certainty,
        sensitivities=run.sensitivities,
        caution=_caution(run, manifest, formats),
        grave=reports.grave,
        unheld=why_unheld(formats, run.state.plan.get("checkpoint_limits", {})),
        separate_head=run.state.plan.get("separate_head"),
    )


def _caution(run: ScoredRun, manifest: Mapping[str, Any], formats: Mapping[str, str]) -> str | None:
    """Why the predicted KL is too low; None where there is none, or where it was measured."""
    if run.state.record.is_imported or is_chosen_by_measurement(manifest):
        return None
    bits = manifest["solution"]["effective_bits"]
    return low_uniform(bits, uniform_format(run.problem, formats))


def _manifest(
    run: ScoredRun,
    options: SolveOptions,
    allocation: Allocation,
    formats: dict[str, str],
    certainty: Certainty | None,
) -> dict[str, Any]:
    """Content of ``manifest.json`` without the notes."""
    record, problem = run.state.record, run.problem
    summary = solution_summary(problem, allocation, scores_are_nats=not record.is_imported)
    summary |= domain_summary(run.state, problem, run.scores, options, formats)
    config = quantization_config(problem, formats, run.state.plan)
    stability = None if certainty is None else certainty.to_json()
    return build_manifest(record, options, summary, config, stability)


def _write_manifests(
    run: ScoredRun, start: str, manifest: Mapping[str, Any], formats: Mapping[str, str]
) -> dict[str, str]:
    """Write both manifests; returns file name -> full path."""
    directory = run.state.directory
    rows = manifest_rows(run.problem, formats, run.scores, run.state.plan)
    return {
        MANIFEST_TABLE: directory.write_table(f"{start}{MANIFEST_TABLE}", rows),
        MANIFEST_JSON: directory.write_json(f"{start}{MANIFEST_JSON}", manifest),
    }


def rewrite_reports(directory: RunDirectory) -> list[str]:
    """Write the reports of the run and of all its solutions again; returns their paths.

    Raises:
        StoreError: Not a run, or its files are damaged.
    """
    paths: list[str] = []
    with writing(directory) as run:
        starts = [solution_folder(name) for name in directory.list_folders(SOLUTIONS)]
        for start in ["", *starts]:
            if directory.exists(f"{start}{MANIFEST_JSON}"):
                paths.extend(write_reports(run, start).paths.values())
    if not paths:
        raise StoreError(f"{directory.uri} has no solution yet; finish the scan first")
    return paths
