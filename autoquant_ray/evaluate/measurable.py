"""What can be measured of a run whose fitted weights were dropped: allocations without them.

Such a run still measures a solution that takes plain formats. Its rivals, the pairs of an audit and
the changes of a refinement then come from the formats that are left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autoquant_ray.allocate.candidate import Candidate
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.runs.rounding import dropped_formats, require_rounding
from autoquant_ray.runs.state import RunState


def require_measurable(state: RunState, candidates: Iterable[Candidate]) -> None:
    """Check that nothing that allocations need was dropped.

    Raises:
        StoreError: The fitted weights of a format were; names it and the remedy.
    """
    require_rounding(state, (f for c in candidates for f in c.formats.values()))


def measurable_problem(
    state: RunState, problem: Problem, options: SolveOptions
) -> tuple[Problem, SolveOptions]:
    """The formats of a problem that can be measured, and the options without the others."""
    dropped = dropped_formats(state)
    if not dropped:
        return problem, options
    allow = {p: [f for f in names if f not in dropped] for p, names in options.allow.items()}
    return problem.without(dropped), options.replaced(allow=allow)


def measurable(state: RunState, origin: StartingPoint) -> StartingPoint:
    """The same start, from which only changes can be made that can be measured.

    Raises:
        StoreError: It cannot be measured itself.
    """
    require_rounding(state, origin.formats.values())
    problem, options = measurable_problem(state, origin.problem, origin.options)
    return replace(origin, problem=problem, options=options)
