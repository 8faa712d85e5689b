"""Runs whose fitted weights were dropped: what is still measured, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.errors import StoreError
from autoquant_ray.evaluate.audit_pairs import choose_pairs
from autoquant_ray.evaluate.measurable import measurable
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.evaluate.starting_point import starting_point
from autoquant_ray.runs.rounding import drop_rounding, dropped_formats
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run

FORMATS = ("wint4_afp16:max", "wint4_afp16:weighted", "wint4_afp16:awq", "wint8_afp16:gptq")
FORMATS += ("wint8_afp16",)
FITTED = {FORMATS[1], FORMATS[3]}


@pytest.fixture
def dropped(make_run: Any) -> RunState:
    """A run with one solution without fitted formats, and one with."""
    state = RunState.open(make_run(formats=FORMATS))
    with state.stage("fit", "mark"):
        state.directory.write_table("rounding.parquet", [])
    pins = {g: FORMATS[0] for g in groups_of(state) if ".mlp." not in g}
    options = SolveOptions(bits=4.25, allow={"*.mlp.*": [FORMATS[0], FORMATS[3]]}, pins=pins)
    solve_run(state.directory, options, "plain")
    solve_run(state.directory, SolveOptions(bits=9, pins=dict.fromkeys(pins, FORMATS[1])), "fitted")
    drop_rounding(state)
    assert set(dropped_formats(state)) == FITTED
    return state


def groups_of(state: RunState) -> list[str]:
    return [group.name for group in ScoredRun.read(state).problem.searched]


AGAINST = ("uniform", "modelopt", "random")


def test_rivals_take_the_formats_that_are_left(dropped: RunState) -> None:
    run = ScoredRun.read(dropped)
    candidates = collect_candidates(run, "solutions/plain/", AGAINST, num_random=2)
    names = [candidate.name for candidate in candidates]
    assert names[0] == "solution"
    assert f"uniform {FORMATS[2]}" in names
    assert {"modelopt", "random 1", "random 2"} <= set(names)
    used = {f for candidate in candidates for f in candidate.formats.values()}
    assert not used & FITTED
    assert {FORMATS[0], FORMATS[2]} <= used


@pytest.mark.parametrize("against", [(), ("fitted",)])
def test_allocation_with_a_dropped_format_is_refused(
    against: tuple[str, ...], dropped: RunState
) -> None:
    run = ScoredRun.read(dropped)
    solution = "plain" if against else "fitted"
    with pytest.raises(StoreError, match=r"`keep_rounded` no.*wint4_afp16:weighted.*`resume`"):
        collect_candidates(run, f"solutions/{solution}/", against)
    if not against:
        with pytest.raises(StoreError, match=r"`keep_rounded` no.*wint4_afp16:weighted"):
            measurable(dropped, starting_point(run, "solutions/fitted/"))


def test_audit_and_refinement_start_from_what_is_left(dropped: RunState) -> None:
    run = ScoredRun.read(dropped)
    origin = starting_point(run, "solutions/plain/")
    start = measurable(dropped, origin)
    assert start.formats == origin.formats
    pairs = choose_pairs(start, run.errors, {}, 10_000)
    assert pairs
    assert not {format_ for _, format_ in pairs} & FITTED
    assert {f for _, f in choose_pairs(origin, run.errors, {}, 10_000)} & FITTED
    best = search(start.problem, start.scores, start.options)
    assert best.is_satisfied


def test_kept_fits_leave_everything_measurable(dropped: RunState) -> None:
    dropped.directory.write_table("rounding.parquet", [])
    origin = starting_point(ScoredRun.read(dropped), "solutions/fitted/")
    assert measurable(dropped, origin) == origin
