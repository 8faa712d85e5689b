"""How sure a solution is: resampled shards under their groups' names, and the null."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.certainty.solution import assess_solution, null_score
from autoquant_ray.allocate.knapsack.knapsack import Knapsack
from autoquant_ray.allocate.knapsack.resolve import Resolver
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.formats.format import NONE
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run


def test_solution_states_its_certainty(make_run: Any) -> None:
    directory = make_run()
    solution = solve_run(directory, SolveOptions(bits=6.0))
    stability = directory.read_json("solutions/bits-6.00/manifest.json")["stability"]
    assert solution.certainty is not None
    assert stability["expected_regret"] == solution.certainty.expected_regret >= 0
    assert set(stability["kept"]) == {g for g, f in solution.formats.items() if g != "lm_head"}
    assert stability["num_buckets"] == 2
    assert "Decisions" in directory.read_bytes("solutions/bits-6.00/report.md").decode()


def buckets_of(directory: Any, noise: float, count: int = 12) -> Any:
    """Buckets around the run's own sums: every shard alike, or with noise of its own."""
    table = directory.read_table("resampling.parquet").to_pandas()
    total = table.groupby(["group", "format"], sort=False)["sum"].sum().reset_index()
    rng = np.random.default_rng(0)
    rows = [
        {
            "bucket": bucket,
            "group": row.group,
            "format": row.format,
            "sum": row.sum_ * np.exp(noise * rng.normal()),
        }
        for bucket in range(count)
        for row in total.rename(columns={"sum": "sum_"}).itertuples()
    ]
    directory.write_table("resampling.parquet", rows)
    return directory.read_table("resampling.parquet")


@pytest.mark.parametrize(("noise", "is_certain"), [(0.0, True), (3.0, False)])
def test_alike_shards_decide_and_noisy_ones_do_not(
    noise: float, is_certain: bool, make_run: Any
) -> None:
    directory = make_run()
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    buckets = buckets_of(directory, noise)
    options = SolveOptions(bits=6.0)
    formats = search(problem, scores, options).formats
    certainty = assess_solution(problem, scores, options, formats, buckets)
    assert certainty is not None
    if is_certain:
        assert certainty.num_certain == len(problem.searched)
        assert certainty.expected_regret == 0
    else:
        assert certainty.num_certain < len(problem.searched)
        assert certainty.expected_regret > 0
        assert set(certainty.coin_tosses) <= set(formats)


def test_report_and_explanation_agree_on_every_group(make_run: Any) -> None:
    directory = make_run(num_shards=12)
    solve_run(directory, SolveOptions(bits=6.0))
    stability = directory.read_json("solutions/bits-6.00/manifest.json")["stability"]
    assert stability["num_resamples"] == 200
    for group, kept in stability["kept"].items():
        explanation = explain_group(directory, group, "bits-6.00")
        assert explanation.num_resamples == 200
        chosen = next(entry for entry in explanation.formats if entry.is_chosen)
        assert chosen.resampled_share == kept


def test_constraints_hold_in_the_resamples(make_run: Any) -> None:
    directory = make_run()
    scored_run = ScoredRun.read(RunState.open(directory))
    problem, scores = scored_run.problem, scored_run.scores
    buckets = buckets_of(directory, 3.0)
    group = problem.searched[0].name
    options = SolveOptions(bits=6.0, pins={group: "wint8_aint8"})
    formats = search(problem, scores, options).formats
    certainty = assess_solution(problem, scores, options, formats, buckets)
    assert certainty is not None
    assert certainty.kept[group] == 1.0


def test_null_is_worse_than_the_solution(make_run: Any) -> None:
    directory = make_run()
    solution = solve_run(directory, SolveOptions(bits=6.0))
    assert solution.certainty is not None
    assert solution.certainty.null_score is not None
    assert solution.certainty.null_score > solution.summary["score"]


def test_null_does_not_take_a_format_that_a_group_lacks_for_free() -> None:
    """Two groups, alike but for the coarsest format, which one of them lacks."""
    scores_GF = np.array([[1.0, 0.5, 0.7, 0.0], [0.0, 0.5, 0.7, 0.0]])
    has_GF = np.array([[True] * 4, [False, True, True, True]])
    costs = Knapsack(
        scores_GF=np.where(has_GF, 0.0, np.inf),
        costs_RGF=np.array([[[4.0, 8.0, 6.0, 100.0]] * 2]),
        limits_R=np.array([16.0]),
    )
    menus = SimpleNamespace(has_GF=has_GF, columns={"x": 0, "y": 1, "z": 2, NONE: 3})
    groups = [SimpleNamespace(name=n, is_cache=False) for n in "ab"]
    problem: Any = SimpleNamespace(searched=groups, menus=menus)
    assert null_score(problem, Resolver(costs), scores_GF) == pytest.approx(1.0)
