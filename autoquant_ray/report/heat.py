"""The heat map of a report: a row per layer, a column per kind of module, coloured by sensitivity.

A module's name is parsed as ``STACK.LAYER.KIND``: ``model.layers.4.mlp.gate_proj`` is of the kind
``mlp.gate_proj`` in layer 4 of the stack ``model.layers``. Names without a number are outside the
layers. The page shows the map as a table, which screen readers can read and people can copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoquant_ray.report.groups import GroupRow, readable

NUM_LEVELS = 7
_MAX_CELLS = 6_000
_NAME = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)")
OUTSIDE = "outside the layers"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A group in a layer.

    Attributes:
        level: 0 (least sensitive) to 6 on a log scale; None for an unsearched group.
    """

    group: str
    format: str
    level: int | None
    sensitivity: float | None


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Layers x kinds of a stack of layers.

    Attributes:
        stack: The part of the names before the layer's number.
        kinds: Columns: (parent module, names of the modules in it).
        rows: (layer, a cell or None per column).
    """

    stack: str
    kinds: list[tuple[str, list[str]]]
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The same with layers across, for a look at a whole model.

    Attributes:
        layers: Names of the columns.
        rows: (kind of modules, a cell or None per layer).
    """

    stack: str
    layers: list[str]
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True, kw_only=True)
class Heat:
    """All heat maps of a model.

    Attributes:
        maps: A map per stack of layers, then the groups outside the layers.
        steps: Sensitivities, in the scores' unit, at which the levels begin.
    """

    maps: list[HeatMap]
    steps: list[float]


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Levels of equal width on a log scale.

    Attributes:
        low: Logarithm of the smallest sensitivity.
        width: Width of a level.
    """

    low: float
    width: float

    def level_of(self, sensitivity: float | None) -> int | None:
        """Level of a sensitivity; None for an unsearched group."""
        if sensitivity is None:
            return None
        if sensitivity <= 0 or self.width == 0:
            return 0
        return max(0, min(NUM_LEVELS - 1, int((math.log(sensitivity) - self.low) / self.width)))

    def steps(self) -> list[float]:
        """Sensitivities at which the levels begin."""
        return [math.exp(self.low + self.width * level) for level in range(NUM_LEVELS)]


def heat_maps(rows: Sequence[GroupRow], order: Sequence[str]) -> Heat | None:
    """Lay groups out by layer and kind.

    Args:
        rows: All groups.
        order: Names of the groups in the order of the model.

    Returns:
        None where no group was searched, and for a model with more than 6,000 groups.
    """
    scale = _scale(rows)
    if scale is None or len(rows) > _MAX_CELLS:
        return None
    by_name = {row.name: row for row in rows}
    stacks: dict[str, dict[tuple[str, str], Cell]] = {}
    modules: dict[tuple[str, str], list[str]] = {}
    for name in order:
        row = by_name[name]
        stack, layer, kind = _place(name)
        cell = Cell(
            group=name,
            format=readable(row.chosen),
            level=scale.level_of(row.sensitivity),
            sensitivity=row.sensitivity,
        )
        stacks.setdefault(stack, {})[layer, kind] = cell
        of_kind = modules.setdefault((stack, kind), [])
        of_kind += [m for m in map(_last_part, row.modules) if m not in of_kind]
    order_of_maps = sorted(stacks, key=lambda stack: stack == OUTSIDE)  # outside last
    return Heat(
        maps=[_heat_map(stack, stacks[stack], modules) for stack in order_of_maps],
        steps=scale.steps(),
    )


def strips(heat: Heat) -> list[Strip]:
    """All maps turned on their sides, without those in which nothing was searched."""
    return [
        _strip(map_)
        for map_ in heat.maps
        if any(cell and cell.level is not None for _, cells in map_.rows for cell in cells)
    ]


def _strip(map_: HeatMap) -> Strip:
    names = [
        f"{where}.{', '.join(modules)}" if where else ", ".join(modules)
        for where, modules in map_.kinds
    ]
    cells = [[row[number] for _, row in map_.rows] for number in range(len(names))]
    return Strip(
        stack=map_.stack,
        layers=[layer for layer, _ in map_.rows],
        rows=list(zip(names, cells, strict=True)),
    )


def _scale(rows: Sequence[GroupRow]) -> _Scale | None:
    """Scale from the smallest to the largest positive sensitivity; None if there is none."""
    logs = [math.log(row.sensitivity) for row in rows if row.sensitivity and row.sensitivity > 0]
    if not logs:
        return None
    return _Scale(low=min(logs), width=(max(logs) - min(logs)) / NUM_LEVELS)


def _heat_map(
    stack: str,
    cells: Mapping[tuple[str, str], Cell],
    modules: Mapping[tuple[str, str], list[str]],
) -> HeatMap:
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    return HeatMap(
        stack=stack,
        kinds=[("", ["format"])]
        if stack == OUTSIDE
        else [(kind.rpartition(".")[0], modules[stack, kind]) for kind in kinds],
        rows=[(layer, [cells.get((layer, kind)) for kind in kinds]) for layer in layers],
    )


def _place(name: str) -> tuple[str, str, str]:
    """(stack, layer, kind) of a group's name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return OUTSIDE, name, ""
    return match["stack"], match["layer"], match["kind"]


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]
