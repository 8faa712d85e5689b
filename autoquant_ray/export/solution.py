"""A solution as exports see it: the format of every module, and what the formats are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.errors import StoreError
from autoquant_ray.export.fused_experts import fuse_experts
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.kv_cache import is_described
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_TABLE, SOLUTIONS, solution_folder
from autoquant_ray.runs.state import RunState

_WRAPPER = "model.language_model."


@dataclass(frozen=True, kw_only=True)
class ExportedSolution:
    """What a solution says.

    Attributes:
        state: Its run.
        chosen: Module -> name of its format, ``none`` in 16 bits; in the model's order. Experts of
            a layer are one module again, unless their formats differ.
        caches: Attention -> name of its cache's format, where it was to choose.
        group_of: Module -> its group.
        modules: Every quantizable module -> its facts, as in ``run.json``.
        formats: The run's menu, without those of the KV cache.
    """

    state: RunState
    chosen: dict[str, str]
    group_of: dict[str, str]
    modules: dict[str, Mapping[str, Any]]
    formats: list[Format]
    caches: dict[str, str]
    tied: dict[str, str]


def read_solution(directory: RunDirectory, solution: str) -> ExportedSolution:
    """Read a solution of a run.

    Args:
        directory: Of the run.
        solution: Folder below ``solutions/``; '' for the scan's own.

    Raises:
        StoreError: Not a run, no such solution, or an imported run, which only names its formats.
    """
    state = RunState.open(directory)
    name = f"{solution_folder(solution)}{MANIFEST_TABLE}"
    if not directory.exists(name):
        names = ", ".join(directory.list_folders(SOLUTIONS)) or "none"
        raise StoreError(f"{directory.path(name)} does not exist; solutions of the run: {names}")
    entries = state.plan["formats"]
    if not all(map(is_described, entries)):
        raise StoreError(
            f"{directory.uri} was imported and only names its formats; scan the model to "
            "export a solution"
        )
    rows = directory.read_table(name).to_pylist()
    facts = state.plan["modules"]
    caches = {r["module"]: r["format"] for r in rows if not facts[r["module"]]["prefixes"]}
    rows = [row for row in rows if row["module"] not in caches]
    chosen, group_of, modules = fuse_experts(
        {row["module"]: row["format"] for row in rows},
        {row["module"]: row["group"] for row in rows},
        facts,
    )
    return ExportedSolution(
        state=state,
        chosen=chosen,
        group_of=group_of,
        modules=modules,
        formats=[Format.from_json(entry) for entry in entries if entry.get("weight")],
        caches=caches,
        tied=tied_modules(state.plan, group_of),
    )


def tied_modules(summary: Mapping[str, Any], group_of: Mapping[str, str]) -> dict[str, str]:
    """Module that shares its weight with the embedding -> name of the embedding.

    Args:
        summary: The plan's, as ``run.json`` keeps it.
        group_of: Module -> its group.
    """
    is_wrapped = any(name.startswith(_WRAPPER) for name in summary["modules"])
    embedding = summary.get("embedding", f"{_WRAPPER if is_wrapped else 'model.'}embed_tokens")
    tied = set(summary["tied_groups"])
    return {name: embedding for name, group in group_of.items() if group in tied}
