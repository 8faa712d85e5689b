"""Other tools' allocations for a run: rivals of an evaluation, or its solutions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from autoquant_ray.allocate.candidate import as_allocation, make_candidate
from autoquant_ray.allocate.kv_caches import cache_summary
from autoquant_ray.allocate.losses import average_bits, model_bytes
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun, solution_formats, solution_options
from autoquant_ray.errors import ConfigError, DataError
from autoquant_ray.export.mlx import mlx_names
from autoquant_ray.export.solution import tied_modules
from autoquant_ray.export.tool_formats import mlx_config
from autoquant_ray.formats.algorithms import MAX
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.kv_cache import KV_BYTES, is_described
from autoquant_ray.formats.smoothed import method_of
from autoquant_ray.imports.tool_files import read_allocation, read_json, sensitivities
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_JSON, SOLUTIONS, slug, solution_folder
from autoquant_ray.runs.state import RunState
from autoquant_ray.serving.menus import formats_of
from autoquant_ray.solve import Solution, write_solution, writing

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def foreign_allocation(path: str, problem: Problem, options: SolveOptions) -> dict[str, str]:
    """Searched group -> format, from a file of AutoRound, mlx-lm or llm-compressor.

    Sensitivities are no allocation yet: as in ``mlx_lm.dynamic_quant``, groups above a threshold
    take more bits, as many of them as the budget allows; of the run's formats the smallest and the
    largest that MLX has count. Such files say nothing of the KV cache: it stays in 16 bits.

    Args:
        path: The file.
        problem: Groups with their costs.
        options: The budget, which only sensitivities need.

    Raises:
        DataError: Not such a file, an unknown layer, or bits without a counterpart.
        ConfigError: An imported run, or sensitivities that no budget fits.
    """
    content = read_json(path)
    if not all(map(is_described, problem.summary["formats"])):
        raise ConfigError(
            f"{path}: the run was imported and only names its formats, to which a file of bits "
            "says nothing; scan the model"
        )
    groups = {g.name: g.module_names for g in problem.searched if not g.is_cache}
    caches = {g.name: NONE for g in problem.searched if g.is_cache}
    formats = formats_of(problem.summary)
    others = [name for group in problem.unsearched for name in group.module_names]
    in_mlx = _modules_in_mlx(problem)
    values = sensitivities(path, content, groups, others, in_mlx)
    if values is None:
        return read_allocation(path, content, groups, formats, others, in_mlx) | caches
    # Of formats of one size the plainly rounded one: MLX rounds by itself.
    plain_first = sorted(formats, key=lambda format_: method_of(format_) != MAX)
    names = [format_.name for format_ in plain_first if mlx_config(format_) is not None]
    sizes = {
        name: average_bits(problem.searched, dict.fromkeys(groups, name) | caches)
        for name in names
        if all(name in problem.groups[group].rows for group in groups)
    }
    if len(sizes) < 2:
        raise DataError(
            f"{path}: sensitivities need two weight-only formats in the run, one with more bits, "
            f"such as wint4_afp16 and wint8_afp16; it has {', '.join(sizes) or 'none'}"
        )
    low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    allocation = dict.fromkeys(groups, low) | caches
    if not _fits(problem, options, allocation):
        raise ConfigError(f"{path}: {low} everywhere does not fit the budget; give a larger one")
    for group in sorted(groups, key=lambda name: -values[name]):
        if not _fits(problem, options, allocation | {group: high}):
            break
        allocation[group] = high
    return allocation


def _modules_in_mlx(problem: Problem) -> dict[str, str]:
    """Name of a layer in MLX -> the module that it is here."""
    group_of = {name: g.name for g in problem.groups.values() for name in g.module_names}
    tied = tied_modules(problem.summary, group_of)
    names = mlx_names(group_of, tied, problem.summary.get("model_type", ""))
    return {name: module for module, in_mlx in names.items() for name in in_mlx}


def _fits(problem: Problem, options: SolveOptions, allocation: dict[str, str]) -> bool:
    return all(
        math.fsum(group.cost(allocation[group.name], budget.resource) for group in problem.searched)
        <= budget.limit * (1 + 1e-12)
        for budget in problem.budgets(options)
        if budget.resource != KV_BYTES
    )


def rival_allocations(
    state: RunState, against: Sequence[str], problem: Problem, options: SolveOptions
) -> dict[str, dict[str, str]]:
    """Name of a rival -> its formats, of rivals that are other solutions of the run, or files.

    What is named twice is a rival once. Files have the shortest end of their path that no other of
    them has: tools write files of the same name into their folders.

    Raises:
        ConfigError: One is neither.
        DataError: A file cannot be read as an allocation.
    """
    solutions = state.directory.list_folders(SOLUTIONS)
    files = [name for name in against if name not in solutions and Path(name).is_file()]
    name_of = _names_of_files(files)
    rivals = {}
    for name in against:
        if name in solutions:
            formats = solution_formats(state, solution_folder(name), problem)
            rivals[f"solution {name}"] = formats
        elif name in name_of:
            rivals[f"file {name_of[name]}"] = foreign_allocation(name, problem, options)
        else:
            raise ConfigError(
                f"`against` {name!r} is unknown; known: uniform, modelopt, modelopt-shapley, "
                f"random, a solution of the run ({', '.join(solutions) or 'none yet'}), or a file "
                "of AutoRound, mlx-lm or llm-compressor"
            )
    return rivals


def _names_of_files(files: Sequence[str]) -> dict[str, str]:
    """File -> the shortest end of its path that no other file has."""
    parts = {file: Path(file).resolve().parts for file in files}

    def end(file: str, length: int) -> tuple[str, ...]:
        return parts[file][-length:]

    names = {}
    for file in files:
        others = [other for other in files if parts[other] != parts[file]]
        lengths = range(1, len(parts[file]) + 1)
        length = next(n for n in lengths if all(end(o, n) != end(file, n) for o in others))
        names[file] = Path(*end(file, length)).as_posix()
    return names


def import_allocation(path: str, directory: RunDirectory, name: str | None = None) -> Solution:
    """Write a tool's allocation as a solution of a run.

    Args:
        path: The file.
        directory: A run whose scores are complete.
        name: Of the solution; default: the file's.

    Raises:
        DataError: As :func:`foreign_allocation`.
        ConfigError: The same, or the name could be a path, or is that of a solution that was not
            imported.
        StoreError: Not a run.
    """
    name = slug(Path(path).stem) if name is None else name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"`name` {name!r} is no name of a solution; give letters, digits, '.', '_' and '-'"
        )
    with writing(directory) as run:
        _require_imported(directory, name)
        formats = foreign_allocation(path, run.problem, solution_options(run.state, ""))
        return _write(run, formats, name, path)


def _require_imported(directory: RunDirectory, name: str) -> None:
    """Check that no solution of another kind is replaced."""
    file = f"{solution_folder(name)}{MANIFEST_JSON}"
    if directory.exists(file) and "imported_from" not in directory.read_json(file):
        raise ConfigError(
            f"{directory.path(file)} is a solution of the run itself; give another `name`"
        )


def _write(run: ScoredRun, formats: dict[str, str], name: str, path: str) -> Solution:
    problem = run.problem
    has_caches = any(group.is_cache for group in problem.searched)
    cached = cache_summary(problem.caches, dict.fromkeys(problem.groups, NONE) | formats)
    options = SolveOptions(
        bytes=math.ceil(model_bytes(problem, formats)),
        kv_bytes_per_token=cached[KV_BYTES] if has_caches else None,
    )
    candidate = make_candidate(problem, run.scores, name, formats)
    allocation = as_allocation(problem, run.scores, options, candidate)
    notes = {"imported_from": Path(path).name}
    return write_solution(run, options, allocation, name, notes)
