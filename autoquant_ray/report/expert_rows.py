"""Rows of single experts as a report shows them: those of a layer with one format together.

A model with 48 layers of 128 experts has 6,144 groups; by layer and format a page can show them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autoquant_ray.formats.format import NONE
from autoquant_ray.report.groups import GroupRow


def single_experts(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Single expert -> its number.

    Args:
        modules: Of the plan's summary.
    """
    return {name: facts["expert"] for name, facts in modules.items() if "expert" in facts}


def by_format(rows: Sequence[GroupRow], experts: Mapping[str, int]) -> list[GroupRow]:
    """The rows, in their order, with experts of a layer and a format as one named after its range.

    A score is that of all its experts together.

    Args:
        rows: Of groups.
        experts: From :func:`single_experts`.
    """
    members: dict[tuple[str, ...], list[GroupRow]] = {}
    for row in rows:
        owner = row.name.rpartition(".")[0]
        key = (owner, row.chosen, row.note or "") if row.name in experts else (row.name,)
        members.setdefault(key, []).append(row)
    folded = [
        own[0]
        if own[0].name not in experts
        else _together(own, f"{key[0]}.{{{_ranges([experts[row.name] for row in own])}}}")
        for key, own in members.items()
    ]
    return sorted(folded, key=lambda row: (row.sensitivity is None, -(row.sensitivity or 0.0)))


def by_layer(rows: Sequence[GroupRow], experts: Mapping[str, int]) -> list[GroupRow]:
    """The rows with all experts of a layer as one, named after their module.

    Args:
        rows: Of groups.
        experts: From :func:`single_experts`.
    """
    members: dict[str, list[GroupRow]] = {}
    for row in rows:
        name = row.name.rpartition(".")[0] if row.name in experts else row.name
        members.setdefault(name, []).append(row)
    return [
        own[0] if own[0].name not in experts else _together(own, name)
        for name, own in members.items()
    ]


def layer_order(names: Sequence[str], experts: Mapping[str, int]) -> list[str]:
    """Names of groups as :func:`by_layer` has them, in the same order."""
    owners = (name.rpartition(".")[0] if name in experts else name for name in names)
    return list(dict.fromkeys(owners))


def _together(rows: Sequence[GroupRow], name: str) -> GroupRow:
    formats = dict.fromkeys(f for row in rows for f in row.scores)
    known = [row for row in rows if row.scores]  # one that saw no token has none
    scores = {f: (math.fsum(row.scores[f][0] for row in known), None) for f in formats}
    counts = Counter(row.chosen for row in rows)
    mixed = (f"{'16 bits' if f == NONE else f} x {count}" for f, count in counts.items())
    num_weights = sum(row.num_weights for row in rows)
    num_bytes = math.fsum(row.num_bytes for row in rows)
    shares = [row.share for row in rows if row.share is not None]
    return replace(
        rows[0],
        name=name,
        modules=[name],
        num_weights=num_weights,
        chosen=rows[0].chosen if len(counts) == 1 else ", ".join(mixed),
        num_bytes=num_bytes,
        num_bits=num_bytes * 8 / num_weights,
        share=math.fsum(shares) if shares else None,
        sensitivity=max((score for score, _ in scores.values()), default=None),
        scores=scores,
        kept=None,
        note=rows[0].note if len({row.note for row in rows}) == 1 else None,
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,7`` of 0, 1, 2, 3 and 7."""
    ordered = sorted(numbers)
    runs = itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    ends = [(own[0][1], own[-1][1]) for own in (list(run) for _, run in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
