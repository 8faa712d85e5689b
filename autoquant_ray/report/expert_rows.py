"""Rows of single experts as a report shows them: merged by layer and format.

A model with 48 layers of 128 experts has 6,144 groups, too many for a page to show singly.
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
    """Group of a single expert -> number of the expert.

    Args:
        modules: The ``modules`` object of the plan's summary.
    """
    return {name: facts["expert"] for name, facts in modules.items() if "expert" in facts}


def by_format(rows: Sequence[GroupRow], experts: Mapping[str, int]) -> list[GroupRow]:
    """Merge experts of a layer that have the same format into a row named after their range.

    The score of a merged row is the sum over its experts.

    Args:
        rows: Rows of groups.
        experts: From :func:`single_experts`.
    """
    members: dict[tuple[str, ...], list[GroupRow]] = {}
    for row in rows:
        owner = row.name.rpartition(".")[0]
        key = (owner, row.chosen, row.note or "") if row.name in experts else (row.name,)
        members.setdefault(key, []).append(row)
    merged = [
        same[0]
        if same[0].name not in experts
        else _merged(same, f"{key[0]}.{{{_ranges([experts[row.name] for row in same])}}}")
        for key, same in members.items()
    ]
    return sorted(merged, key=lambda row: (row.sensitivity is None, -(row.sensitivity or 0.0)))


def by_layer(rows: Sequence[GroupRow], experts: Mapping[str, int]) -> list[GroupRow]:
    """Merge all experts of a layer into a row named after their module.

    Args:
        rows: Rows of groups.
        experts: From :func:`single_experts`.
    """
    members: dict[str, list[GroupRow]] = {}
    for row in rows:
        name = row.name.rpartition(".")[0] if row.name in experts else row.name
        members.setdefault(name, []).append(row)
    return [
        same[0] if same[0].name not in experts else _merged(same, name)
        for name, same in members.items()
    ]


def layer_order(names: Sequence[str], experts: Mapping[str, int]) -> list[str]:
    """Names of the rows of :func:`by_layer`, in the order of the groups."""
    owners = (name.rpartition(".")[0] if name in experts else name for name in names)
    return list(dict.fromkeys(owners))


def _merged(rows: Sequence[GroupRow], name: str) -> GroupRow:
    formats = dict.fromkeys(f for row in rows for f in row.scores)
    scored = [row for row in rows if row.scores]  # experts that saw no token have no scores
    scores = {f: (math.fsum(row.scores[f][0] for row in scored), None) for f in formats}
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
        rounding=rows[0].rounding if len(counts) == 1 else None,
    )


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,7`` of 0, 1, 2, 3 and 7."""
    ordered = sorted(numbers)
    runs = itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
