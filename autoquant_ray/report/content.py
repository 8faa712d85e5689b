"""Content of a report, collected from a run's files; Markdown and HTML only lay it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autoquant_ray.allocate.group_choices import GroupChoices
from autoquant_ray.allocate.read import ScoredRun, options_of
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES
from autoquant_ray.formats.method_names import has_methods, names_methods, roundings
from autoquant_ray.models.separate_heads import describe_separate
from autoquant_ray.report.audit import AuditData, audit_section, read_pairs
from autoquant_ray.report.charts.frontier_chart import Dot
from autoquant_ray.report.charts.loss_shares import GroupLoss, LossShares, loss_shares
from autoquant_ray.report.charts.scatter import Scatter, scatter
from autoquant_ray.report.charts.sizes import Bar, size_bars
from autoquant_ray.report.concerns import Concern, find_concerns
from autoquant_ray.report.domains import DomainSection, domain_section
from autoquant_ray.report.expert_rows import by_format, by_layer, layer_order, single_experts
from autoquant_ray.report.facts import report_facts
from autoquant_ray.report.frontier_dots import curve_note, frontier_dots, loss_name
from autoquant_ray.report.groups import (
    GroupRow,
    MethodSection,
    MixRow,
    format_mix,
    group_rows,
    method_section,
    readable,
)
from autoquant_ray.report.headline import Number, headline, unquantized_bytes
from autoquant_ray.report.heat import Heat, heat_maps
from autoquant_ray.report.measured import (
    IN_RANGE,
    MeasuredData,
    measured_pairs,
    measured_sections,
)
from autoquant_ray.report.reproduce import Reproduction, reproduction
from autoquant_ray.report.result import result_sentence
from autoquant_ray.report.sources import ScoresWithErrors, Sources, gather_evidence, read_sources
from autoquant_ray.report.task_scores.section import TaskData, solution_tasks, task_section
from autoquant_ray.runs.names import AUDIT_FILE, MANIFEST_JSON, solution_folder
from autoquant_ray.runs.record import PlanSummary
from autoquant_ray.runs.state import RunState


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantizable layer of the table.

    Attributes:
        sensitivity: Largest score of its group over the menu, the predicted loss of the harshest
            format; None for an unsearched layer.
        note: Why the layer is not searched.
        method: How its weights are rounded; None where that is no question.
        saved: What that saves its group against plain rounding, as text.
        kv_bytes: For a KV cache, bytes per token of context; None for weights.
    """

    name: str
    group: str
    num_bits: float
    sensitivity: float | None
    size_bytes: float
    chosen: str
    note: str | None
    method: str | None
    saved: str
    kv_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything a report shows. A new section is a field here and a part of each layout.

    Attributes:
        result: What the solution comes to, in a sentence.
        numbers: The key numbers.
        concerns: Reasons to doubt the solution, the gravest first.
        facts: (label, value) pairs.
        mix: How much of the model is in each format.
        mix_note: What its bytes leave out, in words; empty where they are those of all weights.
        layers: Layers by sensitivity, unsearched ones last.
        groups: Groups by sensitivity, unsearched ones last.
        heat: Layers by kinds of modules; None for a model that is too large for it.
        dots: Points of the frontier.
        dots_loss: What they lose, in words.
        dots_note: Constraints that the frontier keeps to; empty where there are none.
        formats: The menu.
        scores: Group -> format -> (score, standard error or None).
        unit: Unit of the scores.
        warnings: Sentences that the reader must see.
        measured: Results of this solution's evaluations.
        reproduction: How to reproduce the solution.
        num_resamples: Resamples of the shards behind the certainty of groups; None for none.
        audit: For an audited solution, which scores were measured.
        domains: Loss by domain; None where the data has no domains.
        methods: What methods of rounding saved; None where the menu has no methods.
        bars: Bytes of the model before and after.
        shares: Which groups make the predicted loss; None where fewer than two lose anything.
        scatter: Measured against predicted losses; None where nothing was measured.
        tasks: Scores of benchmark tasks; None where none was asked.
    """

    title: str
    result: str
    numbers: list[Number]
    concerns: list[Concern]
    facts: list[tuple[str, str]]
    mix: list[MixRow]
    layers: list[Layer]
    groups: list[GroupRow]
    heat: Heat | None
    dots: list[Dot]
    dots_loss: str
    dots_note: str
    formats: list[str]
    scores: ScoresWithErrors
    unit: str
    warnings: list[str]
    measured: list[MeasuredData]
    reproduction: Reproduction
    num_resamples: int | None = None
    audit: AuditData | None = None
    domains: DomainSection | None = None
    methods: MethodSection | None = None
    bars: list[Bar] = field(default_factory=list)
    shares: LossShares | None = None
    scatter: Scatter | None = None
    tasks: TaskData | None = None
    mix_note: str = ""


def collect_content(run: ScoredRun, folder: str) -> ReportContent:
    """Read the report's content.

    Args:
        run: The run.
        folder: Folder of the solution with a trailing slash, or '' for the scan's own.

    Raises:
        StoreError: A file is missing or damaged.
    """
    sources = read_sources(run, folder)
    record, plan, problem = run.state.record, run.state.plan, run.problem
    rows = _group_rows(run, sources)
    experts = single_experts(plan.get("modules", {}))
    unit = "no unit (imported)" if record.is_imported else "nats per token"
    mix = format_mix(rows)
    return ReportContent(
        title=f"Quantization of {record.model['name'].rstrip('/').rpartition('/')[2]}",
        result=result_sentence(sources, mix),
        numbers=headline(sources),
        concerns=find_concerns(gather_evidence(sources)),
        facts=report_facts(sources),
        mix=mix,
        layers=_layers(sources.rows, rows, experts, problem.groups),
        groups=by_format(rows, experts) if experts else rows,
        heat=heat_maps(by_layer(rows, experts), layer_order(list(problem.groups), experts)),
        dots=_dots(sources),
        dots_loss=loss_name(options_of(sources.manifest)),
        dots_note=curve_note(run, options_of(sources.manifest)),
        formats=list(dict.fromkeys(run.rows.column("format"))),
        scores=sources.scores,
        unit=unit,
        warnings=_warnings(plan),
        measured=measured_sections(
            sources.evaluations, sources.name, sources.key, sources.is_by_domain
        ),
        reproduction=reproduction(
            record, sources.manifest, sources.name, partial(_manifest_of, run.state)
        ),
        num_resamples=(sources.manifest.get("stability") or {}).get("num_resamples"),
        audit=_audit(sources),
        domains=domain_section(sources.manifest),
        methods=method_section(
            rows, unit, is_per_layer=names_methods(entry["name"] for entry in plan["formats"])
        ),
        bars=size_bars(
            {row.format: row.num_bytes for row in sorted(mix, key=lambda row: row.num_bits)},
            unquantized_bytes(problem),
            sources.manifest["solution"]["weight_bytes"],
        ),
        shares=loss_shares(
            [
                GroupLoss(group=row.name, format=readable(row.chosen), share=row.share or 0.0)
                for row in rows
            ]
        ),
        scatter=scatter(
            measured_pairs(sources.evaluations, sources.name, sources.key), near=IN_RANGE
        ),
        tasks=task_section(solution_tasks(sources.answered, sources.name, sources.key)),
        mix_note=_mix_note(
            [row.name for row in rows if row.chosen == NONE and problem.groups[row.name].is_tied]
        ),
    )


def _mix_note(tied: Sequence[str]) -> str:
    """Why bytes and weights do not agree; ``tied`` heads are in 16 bits."""
    if not tied:
        return ""
    return (
        f"{', '.join(tied)} in 16 bits is the input embedding too (a tied head) and adds no bytes: "
        "the embedding is stored anyway, and counted as not searched."
    )


def _group_rows(run: ScoredRun, sources: Sources) -> list[GroupRow]:
    groups = list(run.problem.groups.values())
    plan = run.state.plan
    unsearched, menu = plan["unsearched"], plan["formats"]
    kept = (sources.manifest.get("stability") or {}).get("kept", {})
    formats = dict.fromkeys(unsearched, NONE) | sources.formats
    rounded = roundings(menu) if has_methods(menu) else {}
    return group_rows(groups, formats, sources.scores, kept, unsearched, rounded=rounded)


def _manifest_of(state: RunState, name: str) -> dict[str, Any]:
    return dict(state.directory.read_json(f"{solution_folder(name)}{MANIFEST_JSON}"))


def _audit(sources: Sources) -> AuditData | None:
    summary, directory = sources.manifest.get("audit"), sources.scored.state.directory
    if summary is None or not directory.exists(AUDIT_FILE):
        return None
    pairs = read_pairs(directory, sources.name)
    return audit_section(pairs, summary) if pairs else None


def _dots(sources: Sources) -> list[Dot]:
    solution, error = sources.manifest["solution"], sources.error
    dot = Dot(
        kind="solution",
        name="this solution",
        bits=solution["effective_bits"],
        num_bytes=solution["weight_bytes"],
        loss=solution["score"] if sources.is_by_domain else sources.predicted,
        stderr=None if error is None or sources.is_by_domain else error.stderr,
    )
    scored, options = sources.scored, options_of(sources.manifest)
    held = scored.with_problem(scored.problem.with_held_caches(sources.formats))
    return frontier_dots(held, options, sources.formats, dot, sources.evaluations)


def _layers(
    rows: Sequence[Mapping[str, Any]],
    shown: list[GroupRow],
    experts: Mapping[str, int],
    groups: Mapping[str, GroupChoices],
) -> list[Layer]:
    """A layer per row of the manifest; single experts merged as in :func:`by_format`."""
    by_name = {group.name: group for group in shown}
    layers = [
        Layer(
            name=row["group"] if groups[row["group"]].is_cache else row["module"],
            group=row["group"],
            num_bits=row["weight_bits"],
            sensitivity=by_name[row["group"]].sensitivity,
            size_bytes=row["weight_bytes"],
            chosen=row["format"],
            note=by_name[row["group"]].note,
            method=by_name[row["group"]].method,
            saved=by_name[row["group"]].saved_text,
            kv_bytes=groups[row["group"]].rows[row["format"]].get(KV_BYTES) or None,
        )
        for row in rows
        if row["group"] not in experts
    ]
    layers += [
        Layer(
            name=group.name,
            group=group.name,
            num_bits=group.num_bits,
            sensitivity=group.sensitivity,
            size_bytes=group.num_bytes,
            chosen=group.chosen,
            note=group.note,
            method=group.method,
            saved=group.saved_text,
        )
        for group in by_format([row for row in shown if row.name in experts], experts)
    ]
    return sorted(layers, key=lambda x: (x.sensitivity is None, -(x.sensitivity or 0.0)))


def format_score(entry: tuple[float, float | None] | None) -> str:
    """A score with its standard error, if it has one."""
    if entry is None:
        return "-"
    score, error = entry
    return f"{score:.4e}" if error is None else f"{score:.4e} ± {error:.1e}"


def _warnings(plan: PlanSummary) -> list[str]:
    head = plan.get("separate_head")
    warnings = [] if head is None else [f"{describe_separate(head)}."]
    others = plan["other_modules"]
    if others:
        names = ", ".join(list(others)[:3]) + (", ..." if len(others) > 3 else "")
        warnings.append(
            f"{len(others)} modules hold matrices that are not searched and stay in 16 bits: "
            f"{names}"
        )
    return warnings
