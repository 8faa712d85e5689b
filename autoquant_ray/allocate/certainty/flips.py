"""The price of giving one group another format: the same budget solved again with that pin."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.options import OPTION_NAMES, SolveOptions
from autoquant_ray.errors import InfeasibleBudgetError
from autoquant_ray.serving.menus import NotServedError
from autoquant_ray.wording import as_flags


@dataclass(frozen=True, kw_only=True)
class Flip:
    """What the whole allocation becomes when one group gets a given format.

    Attributes:
        score: Predicted loss of the best allocation with it, in the scores' unit; None where no
            allocation meets the budget and the constraints.
        change: The same minus that of the solution.
        others: Other groups that change with it -> (format in the solution, format then).
        optimality_gap: How far the allocation may be from the best one, relative; 0 where proven.
        reason: Why it is not possible; None where it is.
    """

    score: float | None = None
    change: float | None = None
    others: dict[str, tuple[str, str]]
    optimality_gap: float = 0.0
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The ``flip`` object of ``explain --json``."""
        return {
            "is_possible": self.reason is None,
            "reason": self.reason,
            "plan_score": self.score,
            "change": self.change,
            "optimality_gap": self.optimality_gap,
            "other_groups": [
                {"group": group, "from": before, "to": after}
                for group, (before, after) in self.others.items()
            ],
        }


class Flips:
    """Flips of groups of one solution.

    Args:
        solve: Finds the best allocation for given options.
        options: Budget and constraints of the solution.
        formats: The solution: searched group -> format.
        score: Its summed score.
    """

    def __init__(
        self,
        solve: Callable[[SolveOptions], Allocation],
        options: SolveOptions,
        formats: Mapping[str, str],
        score: float,
    ) -> None:
        self._solve = solve
        self._options = options
        self._formats = formats
        self._score = score

    def price(self, group: str, format_: str) -> Flip:
        """Solve the budget with a group's format given; a pin of the group itself gives way."""
        for pattern, names in self._options.allow.items():
            if fnmatch.fnmatch(group, pattern) and format_ not in names:
                return Flip(others={}, reason=f"--allow {pattern}={','.join(names)} leaves it out")
        options = self._options.replaced(pins={**self._options.pins, group: format_})
        try:
            allocation = self._solve(options)
        except (InfeasibleBudgetError, NotServedError) as error:
            return Flip(others={}, reason=as_flags(str(error), OPTION_NAMES))
        is_same = format_ == self._formats[group] and allocation.score >= self._score
        formats = self._formats if is_same else allocation.formats
        return Flip(
            score=self._score if is_same else allocation.score,
            change=0.0 if is_same else allocation.score - self._score,
            others=self._changes(formats, group),
            optimality_gap=allocation.optimality_gap,
        )

    def _changes(self, formats: Mapping[str, str], group: str) -> dict[str, tuple[str, str]]:
        """Groups beside one whose format is another than in the solution."""
        pairs: Iterable[tuple[str, str]] = self._formats.items()
        return {
            name: (before, formats[name])
            for name, before in pairs
            if name != group and formats[name] != before
        }
