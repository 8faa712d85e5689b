"""What a checkpoint is made of: a solution of a run, and the reasons why it cannot be exported."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from autoquant_ray.config.values import place_problem
from autoquant_ray.errors import ConfigError, FormatError, one_line
from autoquant_ray.export.folder import require_outside_runs
from autoquant_ray.export.kv_caches import holds_caches, require_caches
from autoquant_ray.export.layouts import (
    COMPRESSED_TENSORS,
    LAYOUTS,
    MODELOPT,
    block_size,
    experts_problem,
    fitting_format,
    grids,
    shape_problem,
    stored_as,
)
from autoquant_ray.export.solution import read_solution, require_fused
from autoquant_ray.formats.format import NONE, Format
from autoquant_ray.formats.numbers import has_tensor_scale
from autoquant_ray.formats.smoothed import is_smoothed, method_of
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import MANIFEST_JSON, solution_folder
from autoquant_ray.runs.state import RunState
from autoquant_ray.serving.fused_names import engine_modules
from autoquant_ray.serving.kv_cache import cache_problem
from autoquant_ray.serving.menus import formats_of, is_held, require_served
from autoquant_ray.serving.table import ENGINES, layouts_of
from autoquant_ray.wording import few

_MOST_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Layers with the formats that they are to have.

    Attributes:
        formats: Quantized module -> its format.
        groups: Every quantizable module -> its group.
        modules: Every quantizable module -> ``shapes`` and ``prefixes``, as in ``run.json``.
        caches: Attention -> name of its KV cache's format, where it was to choose.
    """

    formats: Mapping[str, Format]
    groups: Mapping[str, str]
    modules: Mapping[str, Mapping[str, Any]]
    caches: Mapping[str, str]

    def is_experts(self, module: str) -> bool:
        """Whether a module holds fused experts."""
        return list(self.modules[module]["prefixes"]) != [""]

    def renamed(self, names_of: Callable[[str], Sequence[str]]) -> Self:
        """The same with other names of modules.

        Args:
            names_of: Gives those of a module; several where files hold it in parts.
        """
        return replace(
            self,
            formats={new: f for name, f in self.formats.items() for new in names_of(name)},
            groups={new: g for name, g in self.groups.items() for new in names_of(name)},
            modules={
                new: _part(module, len(names_of(name)))
                for name, module in self.modules.items()
                for new in names_of(name)
            },
        )

    def within(self, holds: Callable[[str], bool]) -> Self:
        """The same for a part of the model.

        Args:
            holds: Whether the part holds a module, by its name.
        """
        return replace(
            self,
            formats={name: format_ for name, format_ in self.formats.items() if holds(name)},
            modules={name: module for name, module in self.modules.items() if holds(name)},
            caches={name: format_ for name, format_ in self.caches.items() if holds(name)},
        )

    def owner(self, tensor: str) -> str | None:
        """The quantized module that a stored tensor belongs to; None where there is none."""
        name = tensor
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self.formats:
                return name
        return None


@dataclass(frozen=True, kw_only=True)
class Source(Layers):
    """A solution whose layers are to be packed.

    Attributes:
        state: The run.
        manifest: Content of the solution's ``manifest.json``.
        uncounted_bytes: Of tensors that are carried and that an earlier version did not count.
    """

    state: RunState
    manifest: Mapping[str, Any]
    uncounted_bytes: int = 0

    @property
    def weight_bytes(self) -> float:
        """Bytes of the whole model's weights, as the manifest counts them."""
        return float(self.manifest["solution"]["weight_bytes"]) + self.uncounted_bytes

    @property
    def used(self) -> set[str]:
        """Names of the formats of its weights."""
        return {format_.name for format_ in self.formats.values()}


def _part(module: Mapping[str, Any], num_parts: int) -> Mapping[str, Any]:
    """Facts of the parts of a module, which have its rows in equal numbers."""
    if num_parts == 1:
        return module
    shapes = [[rows // num_parts, *columns] for rows, *columns in module["shapes"]]
    return {**module, "shapes": shapes}


def read_source(directory: RunDirectory, solution: str = "") -> Source:
    """Read a solution.

    Args:
        directory: A finished run.
        solution: Name of a folder below ``solutions/``; '' for the scan's own.

    Raises:
        StoreError: It is no run, or has no such solution, or was imported without a model.
        ConfigError: The solution quantizes nothing.
    """
    exported = read_solution(directory, solution)
    menu = {format_.name: format_ for format_ in exported.formats}
    formats = {module: menu[name] for module, name in exported.chosen.items() if name != NONE}
    require_fused(exported.chosen, exported.modules, "a checkpoint")
    start = solution_folder(solution)
    if not formats:
        raise ConfigError(
            f"{directory.path(start)} leaves every layer in 16 bits; there is nothing to export"
        )
    return Source(
        state=exported.state,
        manifest=directory.read_json(f"{start}{MANIFEST_JSON}"),
        formats=formats,
        groups=exported.group_of,
        modules={n: m for n, m in exported.modules.items() if n not in exported.caches},
        caches=exported.caches,
    )


def needs_whole(source: Source) -> bool:
    """Whether ModelOpt must give weights their common scales, for which it runs the whole model.

    It finds the linears that read one input, which are more than those that engines fuse, and sets
    their scales to the largest. Only in runs of earlier versions weights have scales of their own.
    """
    with_tensor_scale = [f for f in source.formats.values() if has_tensor_scale(f.weight)]
    return not all(format_.shares_scale for format_ in with_tensor_scale)


def require_new_folder(path: str) -> Path:
    """The folder to write, without links, which must be new or empty.

    Raises:
        ConfigError: It holds something, is a file, is inside a run, is no local path, or cannot be
            replaced by another folder.
    """
    if (problem := place_problem(path)) is not None:
        raise ConfigError(f"`out`: {problem}")
    if "://" in path:
        raise ConfigError(f"`out` {path}: a checkpoint is written to a local folder; copy it then")
    try:
        folder = Path(path).expanduser().resolve()
        is_folder = folder.is_dir()
        is_filled = is_folder and any(folder.iterdir())
    except (OSError, RuntimeError) as error:  # a link to itself, a user who is not there
        raise ConfigError(f"`out` {path}: {one_line(error)}; give a new folder") from None
    if is_filled:
        raise ConfigError(f"`out` {path} is not empty; give a new folder")
    if folder.exists() and not is_folder:
        raise ConfigError(f"`out` {path} is a file; give a new folder")
    if is_folder and (folder.is_mount() or folder.samefile(os.curdir)):
        raise ConfigError(
            f"`out` {path} is the working directory, or a disk is mounted there, so that no other "
            "folder can take its place; give a new folder, in it or elsewhere"
        )
    require_outside_runs(folder, path)
    return folder


def require_packable(source: Source, layout: str) -> None:
    """Check that a checkpoint of this layout can hold every layer.

    Args:
        source: What is exported.
        layout: Of ``LAYOUTS``.

    Raises:
        FormatError: It cannot; names the groups, their formats and the remedy.
    """
    require_caches(source.caches, layout)
    problems = problems_of(source, layout)
    if not problems:
        return
    listed = "; ".join(
        f"{problem} ({few(groups, _MOST_NAMES)})" for problem, groups in problems.items()
    )
    others = [other for other in LAYOUTS if other != layout and _is_packable(source, other)]
    or_else = f", or give `format` {others[0]}" if others else ""
    raise FormatError(
        f"`format` {layout} cannot hold this solution: {listed}. Solve again with other formats "
        f"for these groups (solve `allow` 'PATTERN=FORMATS'){or_else}"
    )


def require_engine(source: Source, layout: str, engine: str | None, gpu: str | None) -> None:
    """Check that an engine serves the checkpoint as planned.

    Args:
        source: What is exported.
        layout: Of ``LAYOUTS``. What vLLM does is known for both, what others do for ``modelopt``.
        engine: One of ``ENGINES``; None: any.
        gpu: A generation or a card; None: any.

    Raises:
        ConfigError: It does not; names groups, reasons and remedies.
    """
    if engine is None:
        return
    chosen = {source.groups[module]: format_.name for module, format_ in source.formats.items()}
    problem = cache_problem(source.caches, {**chosen, **source.caches}, engine, gpu)
    if problem is not None:
        raise ConfigError(problem)
    if layout not in layouts_of(engine):
        _require_formats_apart(source, engine)
        return
    groups: dict[str, list[str]] = {}
    for module, group in source.groups.items():
        groups.setdefault(group, []).append(module)
    require_served(groups, chosen, formats_of(source.state.plan), engine, gpu, layout)


def target_of(source: Source, engine: str | None, gpu: str | None) -> tuple[str | None, str | None]:
    """The engine and the GPU of an export: those that are given, else those of the solution."""
    if engine is not None:
        return engine, gpu
    budget = source.manifest.get("budget") or {}
    return budget.get("engine"), budget.get("gpu")


def pick_layout(source: Source, engine: str | None, gpu: str | None) -> str:
    """The layout to write: the first in which the engine serves the solution.

    Args:
        source: What is exported.
        engine: One of ``ENGINES``; None: the one that the solution was solved for.
        gpu: A generation or a card; None: likewise, else any.

    Returns:
        ModelOpt's where no engine is named, or it serves the solution in none.
    """
    engine, gpu = target_of(source, engine, gpu)
    if engine is None:
        return MODELOPT
    limits = source.state.plan.get("checkpoint_limits", {})
    quantized = {source.groups[module] for module in source.formats}
    layouts = (
        layout
        for layout in LAYOUTS
        if is_held(layout, limits, quantized) and _is_packable(source, layout)
    )
    served = (layout for layout in layouts if _is_served(source, layout, engine, gpu))
    return next(served, MODELOPT)


def served_layouts(source: Source) -> list[str]:
    """Layouts that hold the solution, and in which an engine serves it on some GPU."""
    return [
        layout for layout in LAYOUTS if _is_packable(source, layout) and _is_served(source, layout)
    ]


def serving_engine(source: Source, layout: str, engine: str | None, gpu: str | None) -> str | None:
    """The engine to serve a checkpoint with: the given one, else the first that can; None: none.

    Args:
        source: What is exported.
        layout: Of ``LAYOUTS``.
        engine: One of ``ENGINES``.
        gpu: A generation or a card.
    """
    engines = ENGINES if engine is None else (engine,)
    return next((name for name in engines if _is_served(source, layout, name, gpu)), None)


def problems_of(source: Layers, layout: str) -> dict[str, list[str]]:
    """What a layout cannot hold of layers -> the groups that this concerns.

    Args:
        source: The layers.
        layout: Of ``LAYOUTS``.
    """
    problems: dict[str, list[str]] = {}
    for module, format_ in source.formats.items():
        problem = _problem(source, module, format_, layout)
        if problem is not None:
            groups = problems.setdefault(problem, [])
            if source.groups[module] not in groups:
                groups.append(source.groups[module])
    return problems


def _is_packable(source: Source, layout: str) -> bool:
    return holds_caches(source.caches, layout) and not problems_of(source, layout)


def _is_served(
    source: Source, layout: str, engine: str | None = None, gpu: str | None = None
) -> bool:
    for name in ENGINES if engine is None else [engine]:
        try:
            require_engine(source, layout, name, gpu)
        except ConfigError:
            continue
        return True
    return False


def _require_formats_apart(source: Source, engine: str) -> None:
    """Check that a checkpoint of compressed-tensors has one format, as an engine reads it.

    Formats that differ by their method of rounding alone are the same in a checkpoint. Experts are
    looked for by names that few models' files have.
    """
    if experts := [name for name in source.formats if source.is_experts(name)]:
        raise ConfigError(
            f"no source says that {engine} serves quantized experts of {COMPRESSED_TENSORS} "
            f"({few(experts, _MOST_NAMES)}); give `format` {MODELOPT}, or leave them in 16 bits"
        )
    stored = {
        source.groups[module]: (*grids(format_), block_size(format_))
        for module, format_ in source.formats.items()
    }
    if len(set(stored.values())) > 1:
        names = sorted({format_.name for format_ in source.formats.values()})
        raise ConfigError(
            f"{engine} reads {COMPRESSED_TENSORS} with one format only, and this solution has "
            f"{', '.join(names)}; give `format` {MODELOPT}, or solve with `max_formats` 1"
        )
    for fused in engine_modules(source.modules, engine):
        fused_groups = {source.groups[member]: None for member in fused.members}
        if len({stored.get(group) for group in fused_groups}) > 1:
            raise ConfigError(
                f"{engine} fuses {few(list(fused_groups), _MOST_NAMES)} into one module, which has "
                "one format; give them the same (solve `pins`)"
            )


def _problem(source: Layers, module: str, format_: Format, layout: str) -> str | None:
    if "shared_with" in source.modules[module]:
        return "weights that several layers share are not packed; leave them in 16 bits"
    if is_smoothed(format_):
        return (
            f"{format_.name} ({method_of(format_)}) has a factor per input channel, which cannot "
            "be exported yet"
        )
    if stored_as(format_, layout) is None:
        return f"{format_.name} has no packed form"
    is_blocks = layout == MODELOPT and format_.weight.get("num_bits") == 4
    if is_blocks and source.is_experts(module):
        return f"{format_.name}: ModelOpt packs no 4-bit integers of fused experts"
    shapes = source.modules[module]["shapes"]
    if layout == COMPRESSED_TENSORS and (problem := experts_problem(shapes)) is not None:
        return f"{format_.name}: {problem}"
    reasons = (shape_problem(format_, shape) for shape in shapes)
    reason = next((text for text in reasons if text is not None), None)
    if reason is None:
        return None
    fitting = fitting_format(format_, shapes)
    return f"{format_.name}: {reason}" + ("" if fitting is None else f"; {fitting} fits")
