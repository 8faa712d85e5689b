"""A solution as exports see it: the format of every module, and what the formats are.

Checkpoints and other tools hold a layer's experts in one format each. Where a solution that chose
them apart gives all of them the same, they are one module again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.errors import ConfigError, StoreError
from autoquant_ray.formats.format import Format
from autoquant_ray.formats.kv_cache import is_described
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_TABLE, SOLUTIONS, solution_folder
from autoquant_ray.runs.state import RunState
from autoquant_ray.wording import few

Facts = Mapping[str, Mapping[str, Any]]
"""Module -> ``prefixes``, ``shapes`` and, of a single expert, ``expert``: as in ``run.json``."""

_MOST_NAMES = 3
_LINEARS = {"gate_up_proj_": ("gate_proj_", "up_proj_")}
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


def fuse_experts(
    chosen: Mapping[str, str], group_of: Mapping[str, str], modules: Facts
) -> tuple[dict[str, str], dict[str, str], dict[str, Mapping[str, Any]]]:
    """Formats, groups and facts of modules, experts of one format under their module's name.

    Args:
        chosen: Module -> name of its format.
        group_of: Module -> its group.
        modules: Module -> its facts.

    Returns:
        The same three; experts of a layer with several formats stay apart.
    """
    formats = dict(chosen)
    groups, facts = dict(group_of), dict(modules)
    fused: dict[str, str] = {}
    for path, singles in _layers(chosen, modules).items():
        used = {chosen[name] for name in singles}
        if len(used) > 1:
            continue
        first = modules[singles[0]]
        facts[path] = {
            "prefixes": first["prefixes"],
            "shapes": [[len(singles), *shape] for shape in first["shapes"]],
        }
        groups[path] = path
        fused |= dict.fromkeys(singles, path)
    formats = {fused.get(name, name): format_ for name, format_ in formats.items()}
    return (
        formats,
        {name: group for name, group in groups.items() if name not in fused},
        {name: values for name, values in facts.items() if name not in fused},
    )


def unfused_names(chosen: Mapping[str, str], modules: Facts) -> dict[str, str]:
    """The same with the linears of single experts, for tools that split fused experts into them.

    Args:
        chosen: Module -> name of its format.
        modules: Module -> its facts.
    """
    names: dict[str, str] = {}
    for name, format_ in chosen.items():
        facts = modules.get(name, {})
        linears = [_LINEARS.get(p, (p,)) for p in facts["prefixes"]] if "expert" in facts else []
        single_names = [
            f"{name}.{linear.removesuffix('_')}" for several in linears for linear in several
        ]
        names |= dict.fromkeys(single_names or [name], format_)
    return names


def require_fused(chosen: Mapping[str, str], modules: Facts, what: str) -> None:
    """Check that no layer has experts of several formats.

    Args:
        chosen: Module -> name of its format, from :func:`fuse_experts`.
        modules: Module -> its facts, likewise.
        what: What cannot hold them.

    Raises:
        ConfigError: One has; names layers and remedies.
    """
    mixed = _layers(chosen, modules)
    if mixed:
        raise ConfigError(
            f"{what} holds the experts of a layer in one format, and the solution gives several in "
            f"{few(list(mixed), _MOST_NAMES)}; solve again with `engine`, or, where every expert "
            "saw a token, with `expert_groups` layer"
        )


def _layers(chosen: Mapping[str, str], modules: Facts) -> dict[str, list[str]]:
    """Fused module -> its single experts among these modules."""
    layers: dict[str, list[str]] = {}
    for name in chosen:
        if "expert" in modules.get(name, ()):
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers
