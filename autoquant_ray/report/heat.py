"""The heat map of a report: layers down, kinds of modules across, coloured by sensitivity.

A module's name is read as ``STACK.LAYER.KIND``: ``model.layers.4.mlp.gate_proj`` is of the kind
``mlp.gate_proj`` in layer 4 of the stack ``model.layers``. A name without a number stands alone.
The page draws it as a table, so that it is read out, copied and scrolled as one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoquant_ray.formats.format import NONE
from autoquant_ray.report.groups import GroupRow

NUM_LEVELS = 7
_MAX_CELLS = 6_000
_NAME = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)")
_ALONE = "outside the layers"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One group in one layer.

    Attributes:
        level: 0 (least sensitive) to 6 on a log scale; None for an unsearched group.
    """

    group: str
    format: str
    level: int | None
    sensitivity: float | None


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Layers x kinds of one stack of layers.

    Attributes:
        stack: What stands before the layer's number.
        kinds: Columns: (where, names of the modules there).
        rows: (layer, one cell or None per column).
    """

    stack: str
    kinds: list[tuple[str, list[str]]]
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True, kw_only=True)
class Heat:
    """All heat maps of a model.

    Attributes:
        maps: One per stack of layers, then the groups outside the layers.
        steps: Sensitivities, in the scores' unit, at which the levels begin.
    """

    maps: list[HeatMap]
    steps: list[float]


def heat_maps(rows: Sequence[GroupRow], order: Sequence[str]) -> Heat | None:
    """Lay groups out by layer and kind.

    Args:
        rows: All groups.
        order: Names of the groups in the model's order.

    Returns:
        None where no group was searched, and for a model with more than 6,000 groups.
    """
    known = [row.sensitivity for row in rows if row.sensitivity is not None and row.sensitivity > 0]
    if not known or len(rows) > _MAX_CELLS:
        return None
    low, high = math.log(min(known)), math.log(max(known))
    width = (high - low) / NUM_LEVELS

    def level_of(sensitivity: float | None) -> int | None:
        if sensitivity is None:
            return None
        if sensitivity <= 0 or width == 0:
            return 0
        return max(0, min(NUM_LEVELS - 1, int((math.log(sensitivity) - low) / width)))

    by_name = {row.name: row for row in rows}
    stacks: dict[str, dict[tuple[str, str], Cell]] = {}
    modules: dict[tuple[str, str], list[str]] = {}
    for name in order:
        row = by_name[name]
        stack, layer, kind = _place(name)
        cell = Cell(
            group=name,
            format="16 bits" if row.chosen == NONE else row.chosen,
            level=level_of(row.sensitivity),
            sensitivity=row.sensitivity,
        )
        stacks.setdefault(stack, {})[layer, kind] = cell
        of_kind = modules.setdefault((stack, kind), [])
        of_kind += [m for m in map(_last_part, row.modules) if m not in of_kind]
    alone = stacks.pop(_ALONE, None)
    if alone is not None:
        stacks[_ALONE] = alone
    return Heat(
        maps=[_heat_map(stack, cells, modules) for stack, cells in stacks.items()],
        steps=[math.exp(low + width * level) for level in range(NUM_LEVELS)],
    )


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
        if stack == _ALONE
        else [(kind.rpartition(".")[0], modules[stack, kind]) for kind in kinds],
        rows=[(layer, [cells.get((layer, kind)) for kind in kinds]) for layer in layers],
    )


def _place(name: str) -> tuple[str, str, str]:
    """(stack, layer, kind) of a group's name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return _ALONE, name, ""
    return found["stack"], found["layer"], found["kind"]


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]
