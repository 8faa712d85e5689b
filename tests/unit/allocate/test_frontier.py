"""The frontier of a run against single solves and brute force."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scored_run import put_scored_run

from autoquant_ray.allocate.frontier import (
    Point,
    find_knee,
    frontier_of,
    smallest_within,
    sweep_points,
    uniform_points,
)
from autoquant_ray.allocate.losses import predicted_loss
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.cli.main import main
from autoquant_ray.errors import InfeasibleBudgetError
from autoquant_ray.evaluate.rivals import collect_candidates
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run


def all_allocations(directory: Any) -> list[tuple[float, float]]:
    """(bits, loss) of every allocation there is."""
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    weights = sum(group.num_weights for group in problem.searched)
    rows = [
        [
            (8 * g.cost(f, "storage") / weights, 0.0 if f == NONE else scores[g.name, f])
            for f in g.rows
        ]
        for g in problem.searched
    ]
    return [
        (math.fsum(b for b, _ in combination), math.fsum(s for _, s in combination))
        for combination in itertools.product(*rows)
    ]


def test_points_are_the_best_at_their_size(make_run: Any) -> None:
    directory = make_run(formats=("wint4_afp16", "wint8_aint8"))
    points = frontier_of(directory)
    assert len(points) >= 20
    everything = all_allocations(directory)
    for point in points:
        best = min(s for bits, s in everything if bits <= point.effective_bits * (1 + 1e-9))
        assert point.predicted_kl == pytest.approx(best, rel=1e-9, abs=1e-15)
    sizes = [point.weight_bytes for point in points]
    assert sizes == sorted(sizes)
    assert sum(point.is_knee for point in points) == 1
    table = directory.read_table("frontier.parquet").to_pylist()
    assert table == [vars(point) for point in points]


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0, 2.0])
def test_smallest_size_within_a_loss(share: float, make_run: Any) -> None:
    directory = make_run(formats=("wint4_afp16", "wint8_aint8"))
    everything = all_allocations(directory)
    target = share * max(s for _, s in everything)
    solution = solve_run(
        directory, smallest_within(ScoredRun.read(RunState.open(directory)), target)
    )
    smallest = min(bits for bits, s in everything if s <= target)
    assert solution.summary["predicted_kl_nats"] <= target
    assert solution.summary["effective_bits"] == pytest.approx(smallest, rel=1e-9)


def test_no_size_is_within_a_negative_loss(make_run: Any) -> None:
    with pytest.raises(InfeasibleBudgetError, match="16 bits lose 0"):
        smallest_within(ScoredRun.read(RunState.open(make_run())), -1.0)


def test_knee_is_where_the_curve_bends() -> None:
    losses = [1e0, 1e-1, 1e-2, 0.9e-2, 0.8e-2, 0.7e-2]
    points = [
        Point(effective_bits=n + 4.0, weight_bytes=100.0 * n, predicted_kl=loss)
        for n, loss in enumerate(losses)
    ]
    assert find_knee(points) == 2


def test_command_prints_sizes_and_solves_targets(make_run: Any) -> None:
    directory = make_run()
    done = CliRunner().invoke(main, ["frontier", directory.uri, "--points", "9"])
    assert done.exit_code == 0
    assert "knee" in done.output
    total = solve_run(directory, SolveOptions(bits=16)).summary
    assert total["predicted_kl_nats"] == 0
    done = CliRunner().invoke(main, ["frontier", directory.uri, "--target-ppl-increase", "x"])
    assert done.exit_code == 2
    done = CliRunner().invoke(
        main, ["frontier", directory.uri, "--target-kl", "1", "--target-ppl-increase", "1%"]
    )
    assert (done.exit_code, "exclude each other" in done.output) == (2, True)


def test_more_points_than_anybody_solves_are_refused(make_run: Any) -> None:
    done = CliRunner().invoke(main, ["frontier", make_run().uri, "--points", "100000000000"])
    assert done.exit_code == 2
    assert "--points 100000000000: give a number from 2 to 10,000" in done.output


def test_sweep_stays_near_the_exact_points_and_writes_nothing(make_run: Any) -> None:
    directory = make_run(formats=("wint4_afp16", "wint8_aint8"))
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    swept = sweep_points(problem, scores)
    assert not directory.exists("frontier.parquet")
    everything = all_allocations(directory)
    assert len(swept) >= 10
    for point in swept:
        # On the hull, an allocation is the best one of its own size.
        best = min(s for bits, s in everything if bits <= point.effective_bits * (1 + 1e-9))
        assert point.predicted_kl == pytest.approx(best, rel=1e-9, abs=1e-15)
    assert sum(point.is_knee for point in swept) == 1


def test_uniform_format_loses_the_sum_of_its_scores(make_run: Any) -> None:
    scored_run = ScoredRun.read(RunState.open(make_run()))
    problem, scores = scored_run.problem, scored_run.scores
    points = uniform_points(problem, partial(predicted_loss, scores))
    assert set(points) == {format_ for _, format_ in scores}
    for name, point in points.items():
        expected = math.fsum(score for (_, format_), score in scores.items() if format_ == name)
        assert point.predicted_kl == pytest.approx(expected)
    assert points["wint8_aint8"].weight_bytes > points["wint4_afp16"].weight_bytes


@pytest.mark.parametrize(
    ("menu", "taken"),
    [
        (("wint4_afp16:weighted", "wint4_afp16:mse", "wint4_afp16", "wint8_aint8"), "wint4_afp16"),
        (("wint4_afp16:weighted", "wint4_afp16:mse", "wint8_aint8"), "wint4_afp16:mse"),
        (("wint4_afp16:weighted", "wint8_aint8"), NONE),
    ],
)
def test_group_without_a_method_is_uniform_by_another(
    menu: tuple[str, ...], taken: str, tmp_path: Path
) -> None:
    """As groups are that ``awq`` cannot fold."""
    directory = put_scored_run(tmp_path / "run", formats=menu)
    lacks = "model.layers.1.self_attn.o_proj"
    for table in ("plan.parquet", "sensitivity.parquet", "resampling.parquet"):
        rows = directory.read_table(table).to_pylist()
        kept = [row for row in rows if (row["group"], row["format"]) != (lacks, menu[0])]
        assert len(kept) < len(rows)
        directory.write_table(table, kept)
    solve_run(directory, SolveOptions(bits=12), folder="")
    run = ScoredRun.read(RunState.open(directory))
    formats = dict.fromkeys((g.name for g in run.problem.searched), menu[0]) | {lacks: taken}
    expected = math.fsum(run.scores.get(pair, 0.0) for pair in formats.items())
    point = uniform_points(run.problem, partial(predicted_loss, run.scores))[menu[0]]
    assert point.predicted_kl == pytest.approx(expected, rel=1e-12)
    rivals = {c.name: c.formats for c in collect_candidates(run, "", ("uniform",))}
    assert rivals[f"uniform {menu[0]}"] == formats
