"""A head that is tied to the embedding costs what it stores, under every budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.frontier import (
    frontier_of,
    reachable_bits,
    smallest_within,
    sweep_points,
    uniform_points,
)
from autoquant_ray.allocate.losses import average_bits, model_bytes, predicted_loss
from autoquant_ray.allocate.manifest import solution_summary
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.cli.main import main
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.report.content import collect_content
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run

FORMATS = ("wint4_afp16:max", "wint8_aint8")
HEAD = "lm_head"


@pytest.fixture
def run(make_run: Any) -> RunDirectory:
    """Two layers and a tied head, all searched."""
    directory: RunDirectory = make_run("qwen3", formats=FORMATS, disable=())
    assert RunState.open(directory).plan["tied_groups"] == [HEAD]
    return directory


def read(directory: RunDirectory) -> ScoredRun:
    return ScoredRun.read(RunState.open(directory))


def bytes_and_losses(directory: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that the groups take beside the embedding, and the loss, of every allocation."""
    scored = read(directory)
    sizes, losses = np.zeros(1), np.zeros(1)
    for group in scored.problem.searched:
        options = [
            (row["weight_bytes"], scored.scores.get((group.name, f), 0.0))
            for f, row in group.rows.items()
        ]
        if group.name == HEAD:
            options[-1] = (0.0, 0.0)
        sizes = (sizes[:, None] + [size for size, _ in options]).ravel()
        losses = (losses[:, None] + [loss for _, loss in options]).ravel()
    return sizes, losses


def stored_weights(directory: RunDirectory) -> int:
    """Searched weights without the head's."""
    return sum(g.num_weights for g in read(directory).problem.searched if g.name != HEAD)


@pytest.mark.parametrize("bits", [4.3, 5.0, 6.0, 7.5, 9.0, 12.0, 15.9, 16.0])
def test_bits_are_bytes_per_weight_that_is_stored_on_its_own(
    bits: float, run: RunDirectory
) -> None:
    sizes, losses = bytes_and_losses(run)
    limit = bits * stored_weights(run) / 8
    summary = solve_run(run, SolveOptions(bits=bits)).summary
    problem = read(run).problem
    assert summary["predicted_kl_nats"] == pytest.approx(
        losses[sizes <= limit * (1 + 1e-12)].min(), rel=1e-12
    )
    taken = summary["weight_bytes"] - problem.other_bytes
    assert taken <= limit * (1 + 1e-12)
    assert summary["effective_bits"] == pytest.approx(8 * taken / stored_weights(run), rel=1e-12)
    # No allocation of at most its size loses less, which is what a head counted as a saving did.
    assert losses[sizes <= taken * (1 + 1e-12)].min() == pytest.approx(
        summary["predicted_kl_nats"], rel=1e-12
    )


def test_bits_and_bytes_of_one_size_give_one_allocation(run: RunDirectory) -> None:
    by_bits = solve_run(run, SolveOptions(bits=6))
    by_bytes = solve_run(run, SolveOptions(bytes=int(by_bits.summary["weight_bytes"])))
    assert by_bytes.formats == by_bits.formats
    assert by_bits.formats[HEAD] == NONE


def test_frontier_and_sweep_grow_in_bytes_as_in_bits(run: RunDirectory) -> None:
    scored = read(run)
    for points in (frontier_of(run), sweep_points(scored.problem, scored.scores)):
        sizes = [(point.effective_bits, point.weight_bytes) for point in points]
        assert len(sizes) > 10
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(sizes)), (
            "sizes rise together"
        )
        assert [point.is_knee for point in points].count(True) == 1
        assert (points[-1].effective_bits, points[-1].predicted_kl) == (16.0, 0.0)
    low, high = reachable_bits(scored.problem)
    assert (points[0].effective_bits, high) == (pytest.approx(low), 16.0)
    sizes, losses = bytes_and_losses(run)
    target = losses.max() / 20
    smallest = solve_run(run, smallest_within(scored, target)).summary["weight_bytes"]
    assert smallest - scored.problem.other_bytes == pytest.approx(sizes[losses <= target].min())


def test_pinned_head_costs_its_own_bytes(run: RunDirectory) -> None:
    problem = read(run).problem
    head = problem.groups[HEAD].rows["wint8_aint8"]["weight_bytes"]
    free = solve_run(run, SolveOptions(bits=9))
    pinned = solve_run(run, SolveOptions(bits=9, pins={HEAD: "wint8_aint8"}))
    for solution in (free, pinned):
        assert solution.summary["weight_bytes"] == model_bytes(problem, solution.formats)
    others = [g for g in problem.searched if g.name != HEAD]
    rest = sum(g.cost(pinned.formats[g.name], "storage") for g in others)
    assert pinned.summary["weight_bytes"] == problem.other_bytes + rest + head
    assert (rest + head) * 8 / stored_weights(run) <= 9
    low = reachable_bits(problem)[0] + head * 8 / stored_weights(run)
    shown = math.ceil(100 * low) / 100
    with pytest.raises(InfeasibleBudgetError, match=f"is {shown:.2f} to 16.00 average bits"):
        solve_run(run, SolveOptions(bits=low - 0.05, pins={HEAD: "wint8_aint8"}))
    solve_run(run, SolveOptions(bits=low - 0.05))


def test_head_beside_16_bits_needs_a_budget_in_bytes(run: RunDirectory) -> None:
    pins = dict.fromkeys((g.name for g in read(run).problem.searched), NONE) | {HEAD: FORMATS[1]}
    with pytest.raises(InfeasibleBudgetError, match="more than can be asked for: give `bytes`"):
        solve_run(run, SolveOptions(bits=16, pins=pins))
    solution = solve_run(run, SolveOptions(bytes=10**9, pins=pins))
    assert solution.summary["effective_bits"] > 16
    content = collect_content(read(run), f"solutions/{solution.name}/")
    assert [dot.bits for dot in content.dots if dot.kind == "curve"] == [
        solution.summary["effective_bits"]
    ]


def test_bits_over_all_leave_out_a_head_that_is_not_searched(make_run: Any) -> None:
    directory = make_run("qwen3", formats=FORMATS, disable=(HEAD, "*layers.0.mlp.down_proj"))
    problem = read(directory).problem
    every = [g for g in problem.groups.values() if g.name != HEAD]
    summary = solve_run(directory, SolveOptions(bits=8, bits_over="all")).summary
    taken = summary["weight_bytes"] - problem.other_bytes
    average = 8 * taken / sum(g.num_weights for g in every)
    assert summary["effective_bits_all"] == pytest.approx(average, rel=1e-12)
    assert 7.5 < average <= 8


def test_modelopt_costs_count_the_head_as_modelopt_does(run: RunDirectory) -> None:
    problem = read(run).problem
    solution = solve_run(run, SolveOptions(bits=6, cost="modelopt"))
    costs = sum(g.rows[solution.formats[g.name]]["modelopt_cost"] for g in problem.searched)
    weights = sum(g.num_weights for g in problem.searched)
    assert solution.summary["modelopt_effective_bits"] == pytest.approx(16 * costs / weights)
    assert 16 * costs / weights <= 6
    assert solution.formats[HEAD] != NONE, "a saving by ModelOpt's cost"


def test_manifest_rows_sum_to_the_bytes_of_the_groups(run: RunDirectory) -> None:
    for options in (SolveOptions(bits=16), SolveOptions(bits=10, pins={HEAD: "wint8_aint8"})):
        solution = solve_run(run, options)
        rows = run.read_table(f"solutions/{solution.name}/manifest.parquet").to_pylist()
        total = sum(row["weight_bytes"] for row in rows)
        other_bytes = read(run).problem.other_bytes
        assert total + other_bytes == pytest.approx(solution.summary["weight_bytes"], rel=1e-12)


def test_uniform_allocations_leave_the_head_with_the_embedding(run: RunDirectory) -> None:
    scored = read(run)
    solve_run(run, SolveOptions(bits=6), folder="")
    expected = dict.fromkeys((g.name for g in scored.problem.searched), FORMATS[0]) | {HEAD: NONE}
    rivals = {c.name: c for c in collect_candidates(scored, "", ("uniform",))}
    assert rivals[f"uniform {FORMATS[0]}"].formats == expected
    point = uniform_points(scored.problem, partial(predicted_loss, scored.scores))[FORMATS[0]]
    assert point.predicted_kl == pytest.approx(predicted_loss(scored.scores, expected))
    assert point.effective_bits == pytest.approx(
        average_bits([g for g in scored.problem.searched if g.name != HEAD], expected)
    )


def test_outputs_speak_of_bytes_that_are_stored(run: RunDirectory) -> None:
    solve_run(run, SolveOptions(bits=16), folder="")
    (row,) = [
        line
        for line in run.read_bytes("report.md").decode().splitlines()
        if line.startswith(f"| {HEAD} ") and "MiB" in line
    ]
    assert row.split("|")[4:6] == [" 0.000 MiB ", f" {NONE} "]
    done = CliRunner().invoke(main, ["explain", run.uri, HEAD, "--json"])
    alternatives = {a["format"]: a for a in json.loads(done.stdout)["formats"]}
    assert alternatives[NONE]["model_bytes"] == 0
    done = CliRunner().invoke(main, ["explain", run.uri, HEAD])
    (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith(f"{NONE} *")]
    assert line.split()[2:4] == ["16.000", "0.00"]
    pinned = CliRunner().invoke(
        main, ["solve", run.uri, "--bits", "12", "--pin", f"{HEAD}={FORMATS[1]}"]
    )
    assert pinned.exit_code == 0
    assert "tied" not in pinned.output


def test_only_a_tied_head_to_search_is_refused(run: RunDirectory, make_model: Any) -> None:
    formats = resolve_formats(FORMATS, device="cpu")
    words = r"only lm_head is left to search, which is tied"
    with pytest.raises(ConfigError, match=words):
        build_plan(make_model("qwen3"), formats, ["model.layers*"])
    problem = read(run).problem
    silent = {g.name: "no token" for g in problem.searched if g.name != HEAD}
    rows = run.read_table("plan.parquet").to_pylist()
    with pytest.raises(ConfigError, match=words):
        Problem.from_plan(rows, {**problem.summary, "unsearched": silent})


def everywhere(problem: Problem, formats: Mapping[str, str]) -> dict[str, Any]:
    allocation = Allocation(
        formats=dict(formats), score=0.0, costs={}, optimality_gap=0.0, is_satisfied=True
    )
    return solution_summary(problem, allocation, scores_are_nats=True)


def test_groups_that_are_stored_on_their_own_are_counted_as_before(run: RunDirectory) -> None:
    problem = read(run).problem
    groups = {
        name: dataclasses.replace(group, is_tied=False) for name, group in problem.groups.items()
    }
    untied = dataclasses.replace(problem, groups=groups)
    formats = dict.fromkeys(groups, FORMATS[1])
    size = sum(group.rows[FORMATS[1]]["weight_bytes"] for group in groups.values())
    weights = sum(group.num_weights for group in groups.values())
    assert everywhere(untied, formats)["effective_bits"] == 8 * size / weights
    assert everywhere(problem, formats)["effective_bits"] == 8 * size / stored_weights(run)
    scores = read(run).scores
    assert search(untied, scores, SolveOptions(bits=6)).formats[HEAD] != NONE
