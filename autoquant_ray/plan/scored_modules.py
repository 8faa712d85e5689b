"""The modules of a plan as workers score them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoquant_ray.formats.format import Format
from autoquant_ray.models.quantizable import PlannedModule
from autoquant_ray.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ScoredModule:
    """A module to score.

    Attributes:
        group: Index of the group that its sums are added to.
        planned: Its entry in the plan.
        formats: Indices of the formats to score; None: all.
    """

    group: int
    planned: PlannedModule
    formats: tuple[int, ...] | None = None

    def menu(self, formats: Sequence[Format]) -> list[Format]:
        """The formats to score, of a plan's."""
        if self.formats is None:
            return list(formats)
        return [formats[index] for index in self.formats] if formats else []


def scored_modules(plan: Plan) -> tuple[ScoredModule, ...]:
    """All modules of a plan's searched groups, with the groups' positions."""
    number = {format_.name: index for index, format_ in enumerate(plan.formats)}
    return tuple(
        ScoredModule(
            group=index,
            planned=module,
            formats=tuple(number[format_.name] for format_ in plan.menu(group)),
        )
        for index, group in enumerate(plan.searched)
        for module in group.modules
    )
