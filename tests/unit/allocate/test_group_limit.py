"""The limit on what a single group may lose: against allowed formats chosen by hand."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest
from command_line import refusal, run

from autoquant_ray.api import Run
from autoquant_ray.errors import ConfigError, InfeasibleBudgetError


def scores_of(directory: Any) -> dict[str, dict[str, float]]:
    """Group -> format -> score, from the file."""
    scores: dict[str, dict[str, float]] = {}
    for row in pq.read_table(directory.path("sensitivity.parquet")).to_pylist():
        scores.setdefault(row["group"], {})[row["format"]] = row["score"]
    return scores


@pytest.mark.parametrize("quantile", [0.3, 0.6, 0.9])
def test_no_group_loses_more_and_the_rest_is_as_good_as_it_can_be(
    make_run: Any, quantile: float
) -> None:
    directory = make_run()
    scores = scores_of(directory)
    everything = sorted(score for of in scores.values() for score in of.values())
    limit = everything[int(quantile * len(everything))]
    limited = Run.open(directory.uri).solve(bits=12, max_group_kl=limit)
    allow = {
        group: ["none", *(name for name, score in of.items() if score <= limit)]
        for group, of in scores.items()
    }
    by_hand = Run.open(directory.uri).solve(bits=12, allow=allow)
    assert limited.formats == by_hand.formats
    chosen = [scores[g][f] for g, f in limited.formats.items() if f != "none" and g in scores]
    assert chosen
    assert max(chosen) <= limit


def test_limit_changes_the_solution_its_name_and_its_report(make_run: Any) -> None:
    directory = make_run()
    free = Run.open(directory.uri).solve(bits=12)
    scores = scores_of(directory)
    worst = max(scores[g][f] for g, f in free.formats.items() if f != "none" and g in scores)
    done = run("solve", directory.uri, "--bits", "12", "--max-group-kl", worst * 0.999)
    assert done.exit_code == 0, done.output
    names = set(directory.list_folders("solutions"))
    assert len(names) == 2
    assert free.name in names
    (name,) = names - {free.name}
    manifest = directory.read_json(f"solutions/{name}/manifest.json")
    assert manifest["budget"]["max_group_kl"] == worst * 0.999
    assert manifest["solution"]["score"] >= free.summary["score"]
    report = directory.read_bytes(f"solutions/{name}/report.md").decode()
    assert f"max group kl {worst * 0.999}" in report
    assert f"--max-group-kl {worst * 0.999}" in report


def test_limit_that_a_pin_exceeds_is_refused(make_run: Any) -> None:
    directory = make_run()
    group, of = next(iter(scores_of(directory).items()))
    format_, score = max(of.items(), key=lambda item: item[1])
    with pytest.raises(InfeasibleBudgetError, match="`max_group_kl`") as caught:
        Run.open(directory.uri).solve(bits=8, max_group_kl=score / 2, pins={group: format_})
    assert repr(group) in str(caught.value)
    words = ("--bits", "8", "--max-group-kl", score / 2, "--pin", f"{group}={format_}")
    assert "--max-group-kl" in refusal(run("solve", directory.uri, *words), 4)


@pytest.mark.parametrize("limit", [-1.0, float("nan"), float("inf")])
def test_limit_that_is_no_loss_is_refused(make_run: Any, limit: float) -> None:
    with pytest.raises(ConfigError, match=r"^max_group_kl: "):
        Run.open(make_run().uri).solve(bits=8, max_group_kl=limit)
