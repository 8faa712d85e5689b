"""``explain`` in this process, and all allocations of a run as arrays."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import fastparquet
import numpy as np
from command_line import run

from autoquant_ray.runs.directory import RunDirectory

FORMATS = ("wint4_afp16", "wint8_aint8")


def explained(directory: RunDirectory, *arguments: Any) -> dict[str, Any]:
    """What ``explain --json`` prints."""
    done = run("explain", directory.uri, *arguments, "--json")
    assert done.exit_code == 0, done.output
    explanation: dict[str, Any] = json.loads(done.stdout)
    return explanation


def by_format(explanation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["format"]: entry for entry in explanation["formats"]}


@dataclass(frozen=True)
class Everything:
    """All allocations of a run, as arrays with one row per allocation."""

    groups: list[str]
    formats_AG: Any
    bits_A: Any
    scores_A: Any

    @classmethod
    def of(cls, directory: RunDirectory, scores: Any = None) -> Everything:
        """Read plan and scores by fastparquet, combine all formats of all groups."""
        plan = fastparquet.ParquetFile(directory.path("plan.parquet")).to_pandas()
        plan = plan[plan.is_searched]
        if scores is None:
            table = fastparquet.ParquetFile(directory.path("sensitivity.parquet")).to_pandas()
            scores = table.set_index(["group", "format"]).score.to_dict()
        groups = list(dict.fromkeys(plan.group))
        weights = plan.drop_duplicates("group").num_weights.sum()
        rows = [plan[plan.group == group] for group in groups]
        combinations = list(itertools.product(*(range(len(frame)) for frame in rows)))
        index_AG = np.array(combinations)
        names = [frame.format.to_numpy() for frame in rows]
        bits = [8 * frame.weight_bytes.to_numpy() / weights for frame in rows]
        losses = [
            np.array([0.0 if f == "none" else scores[group, f] for f in frame.format])
            for group, frame in zip(groups, rows, strict=True)
        ]
        columns = range(len(groups))
        return cls(
            groups=groups,
            formats_AG=np.stack([names[g][index_AG[:, g]] for g in columns], axis=1),
            bits_A=sum(bits[g][index_AG[:, g]] for g in columns),
            scores_A=sum(losses[g][index_AG[:, g]] for g in columns),
        )

    def best(self, bits: float, **pins: str) -> tuple[dict[str, str], float] | None:
        """The best allocation within a budget that keeps the pins."""
        is_allowed = self.bits_A <= bits * (1 + 1e-12)
        for group, format_ in pins.items():
            is_allowed = is_allowed & (self.formats_AG[:, self.groups.index(group)] == format_)
        if not is_allowed.any():
            return None
        at = int(np.argmin(np.where(is_allowed, self.scores_A, math.inf)))
        return dict(zip(self.groups, self.formats_AG[at], strict=True)), float(self.scores_A[at])
