"""An audit: which scores it measures, on what scale, and what it does to the allocation."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from laboratory import FORMATS, NUM_SHARDS, Laboratory

from autoquant_ray.allocate.group_choices import Scores
from autoquant_ray.allocate.knapsack.choices import restrict
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.allocate.search import search
from autoquant_ray.cli.output import print_audit
from autoquant_ray.errors import ConfigError
from autoquant_ray.evaluate.allocation_search import split_shards
from autoquant_ray.evaluate.audit import audit_json, measure_pairs
from autoquant_ray.evaluate.audit_pairs import (
    audited_scores,
    choose_pairs,
    median_ratio,
    solve_again,
    write_pairs,
)
from autoquant_ray.evaluate.chosen_on import chosen_also_on, untouched_shards
from autoquant_ray.evaluate.starting_point import StartingPoint
from autoquant_ray.evaluate.table import mean_kl
from autoquant_ray.formats.format import NONE
from autoquant_ray.report.audit import AuditedPair, audit_section, most_wrong, read_pairs
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run

OPTIONS = SolveOptions(bits=6.0)


@pytest.fixture
def solved(make_run: Any) -> StartingPoint:
    """A problem with its scores, and the allocation at 6 bits."""
    scored_run = ScoredRun.read(RunState.open(make_run()))
    return starting(scored_run.problem, scored_run.scores, OPTIONS)


def starting(problem: Problem, scores: Scores, options: SolveOptions) -> StartingPoint:
    """The best allocation by the scores."""
    formats = search(problem, scores, options).formats
    return StartingPoint(problem=problem, scores=scores, options=options, formats=formats)


def audited(scores: dict[Any, float], factors: dict[Any, float]) -> list[AuditedPair]:
    """Pairs that were measured so many times what was predicted."""
    return [
        AuditedPair(
            group=pair[0],
            format=pair[1],
            predicted=scores[pair],
            predicted_stderr=None,
            measured=factor * scores[pair],
            measured_stderr=None,
            num_samples=4,
        )
        for pair, factor in factors.items()
    ]


def test_pairs_come_from_both_lists_in_turn(solved: StartingPoint) -> None:
    """Undecided pairs with the widest error, and the allocation's own with the largest loss."""
    scores, formats = solved.scores, solved.formats
    errors = dict.fromkeys(scores, 1.0)
    names = [group.name for group in solved.problem.searched]
    undecided = [(names[1], "wfp8_afp8"), (names[2], "wint8_aint8"), (names[0], "wint4_afp16")]
    shares = dict.fromkeys(scores, 1.0) | dict(zip(undecided, (0.3, 0.5, 0.9), strict=True))
    errors[undecided[0]] = 4.0  # 1.2 at stake, then 0.5 and 0.1
    solved_pairs = [(group, format_) for group, format_ in formats.items() if format_ != NONE]
    costly = sorted(solved_pairs, key=scores.__getitem__, reverse=True)
    expected = [undecided[0], costly[0], undecided[1], costly[1], undecided[2], costly[2]]
    assert len(set(expected)) == 6

    def choose(count: int, options: SolveOptions = OPTIONS) -> list[tuple[str, str]]:
        return choose_pairs(replace(solved, options=options), errors, shares, count)

    assert choose(6) == expected
    assert choose(3) == expected[:3]
    everything = choose(1000)
    assert sorted(everything) == sorted(scores)
    assert everything[:6] == expected
    pinned = SolveOptions(bits=6.0, pins={names[1]: "wint8_aint8"})
    assert [f for g, f in choose(1000, pinned) if g == names[1]] == ["wint8_aint8"]


def test_pairs_without_errors_are_the_costly_ones(solved: StartingPoint) -> None:
    """A single shard has neither errors nor resamples."""
    errors = dict.fromkeys(solved.scores, None)
    chosen = choose_pairs(solved, errors, {}, 4)
    losses = [solved.scores[pair] for pair in chosen]
    solved_losses = [solved.scores[pair] for pair in solved.formats.items() if pair[1] != NONE]
    assert losses == sorted(solved_losses, reverse=True)[:4]


def test_common_factor_changes_no_allocation(solved: StartingPoint) -> None:
    """Everything that was measured is 3 times its prediction: the scale, not the pairs."""
    pairs = audited(solved.scores, {pair: 3.0 for pair in solved.formats.items()})
    again = solve_again(solved, pairs)
    assert again == solved.formats
    raw = solved.scores | {(pair.group, pair.format): pair.measured for pair in pairs}
    assert search(solved.problem, raw, OPTIONS).formats != solved.formats
    rescaled = audited_scores(solved.scores, pairs)
    assert rescaled == pytest.approx({pair: 3 * score for pair, score in solved.scores.items()})


def test_pair_that_loses_more_leaves_the_allocation(solved: StartingPoint) -> None:
    solved_pairs = [pair for pair in solved.formats.items() if pair[1] != NONE]
    worst = max(solved_pairs, key=solved.scores.__getitem__)
    pairs = audited(solved.scores, dict.fromkeys(solved_pairs, 1.0) | {worst: 40.0})
    again = solve_again(solved, pairs)
    assert again[worst[0]] != worst[1]
    (budget,) = solved.problem.budgets(OPTIONS)
    cost = sum(g.cost(again[g.name], budget.resource) for g in solved.problem.searched)
    assert cost <= budget.limit * (1 + 1e-12)
    assert median_ratio(pairs) == pytest.approx(1.0)
    assert most_wrong(pairs, 1.0)[0] == next(p for p in pairs if (p.group, p.format) == worst)


def test_pair_that_breaks_the_model_is_a_last_resort(solved: StartingPoint) -> None:
    group, format_ = next(pair for pair in solved.formats.items() if pair[1] == "wint4_afp16")
    pairs = audited(solved.scores, {(group, format_): math.inf})
    again = solve_again(solved, pairs)
    assert again[group] != format_
    assert median_ratio(pairs) is None
    pinned = SolveOptions(bits=6.0, pins={group: format_})
    again = solve_again(starting(solved.problem, solved.scores, pinned), pairs)
    assert again[group] == format_


def test_table_keeps_what_others_found(solved: StartingPoint, make_run: Any) -> None:
    directory = make_run(name="other")
    first = audited(solved.scores, {pair: 2.0 for pair in list(solved.scores)[:3]})
    second = audited(solved.scores, {pair: math.inf for pair in list(solved.scores)[3:5]})
    write_pairs(directory, "scan-audited", "data", first)
    write_pairs(directory, "bits-5.00-audited", "data", first)
    write_pairs(directory, "scan-audited", "data", second)
    assert read_pairs(directory, "bits-5.00-audited") == first
    assert read_pairs(directory, "scan-audited") == second
    rows = directory.read_table("audit.parquet").to_pylist()
    assert [row["ratio"] for row in rows] == [pytest.approx(2.0)] * 3 + [None] * 2


def test_section_names_the_worst(solved: StartingPoint) -> None:
    chosen = list(solved.scores)[:12]
    pairs = audited(solved.scores, dict.fromkeys(chosen, 1.5) | {chosen[7]: 6.0})
    worst = {"group": chosen[7][0], "format": chosen[7][1], "ratio": 6.0}
    summary = {"num_samples": 4, "median_ratio": 1.5, "worst": worst, "num_changed": 2}
    section = audit_section(pairs, summary)
    assert section.rows[0][:2] == chosen[7]
    assert len(section.rows) == 10
    assert section.verdict == (
        "The median ratio of measured to predicted loss is 1.50; furthest from it is "
        f"{chosen[7][0]} in {chosen[7][1]}: 6.00. 2 groups changed format."
    )


def test_what_is_printed_names_pairs_and_allocation(
    solved: StartingPoint, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = audited(solved.scores, dict.fromkeys(list(solved.scores)[:3], 2.0))
    summary = audit_json(pairs, 0)
    audit: Any = SimpleNamespace(
        pairs=pairs, folder="solutions/scan-audited/", to_json=lambda: summary
    )
    print_audit(audit)
    printed = capsys.readouterr().out
    assert all(pair.group in printed for pair in pairs)
    assert "The median ratio of measured to predicted loss is 2.00" in printed
    assert "The allocation is unchanged." in printed
    assert "audited solution: solutions/scan-audited" in printed


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_audited_allocation_is_no_worse(share: float, laboratory: Laboratory) -> None:
    """All scores of a tiny model measured; told on shards that the audit has not seen."""
    problem, scores = laboratory.problem, laboratory.scores
    head = laboratory.names[-1]
    lowest, highest = (
        laboratory.bits(dict.fromkeys(laboratory.names[:-1], name) | {head: NONE})
        for name in ("wint4_aint4:max", "wint8_aint8")
    )
    options = SolveOptions(
        bits=lowest + share * (highest - lowest),
        pins={head: NONE},
        allow={name: FORMATS for name in laboratory.names[:-1]},
    )
    start = starting(problem, scores, options)
    kept = restrict(problem.choices(scores), options.pins, options.allow)
    chosen = [(c.group, c.format) for c in kept if c.format != NONE]
    measurement: Any = SimpleNamespace(facts={"num_shards": NUM_SHARDS}, measure=laboratory.measure)
    pairs = measure_pairs(measurement, start, dict.fromkeys(chosen), chosen)
    ratios = sorted(pair.ratio or 0.0 for pair in pairs)
    assert 0.5 < ratios[0] <= ratios[-1] < 2  # the score has a unit
    again = solve_again(start, pairs)
    assert laboratory.bits(again) <= options.bits * (1 + 1e-9)
    candidates = [SimpleNamespace(formats=formats) for formats in (start.formats, again)]
    _, second, third = split_shards(NUM_SHARDS)
    before, after = (mean_kl(losses) for losses in laboratory.measure(candidates, second + third))
    assert after <= 1.02 * before


def make_measurement(directory: Any, key: str, source: str = "text") -> Any:
    facts = {"source": [source, None, None], "num_shards": 8}
    return SimpleNamespace(state=SimpleNamespace(directory=directory), data_key=key, facts=facts)


def test_what_chose_an_allocation_is_never_measured_as_unseen(make_run: Any) -> None:
    directory = make_run()
    solve_run(directory, OPTIONS, folder="")
    manifest = directory.read_json("manifest.json")
    on_text, on_chat = make_measurement(directory, "a"), make_measurement(directory, "b", "chat")

    def note(marks: list[dict[str, Any]]) -> None:
        directory.write_json("solutions/x/manifest.json", manifest | {"chosen_on": marks})

    assert untouched_shards(on_text, "") is None
    by_audit = chosen_also_on(manifest, on_text, 1)
    note(by_audit)
    assert untouched_shards(on_text, "solutions/x/") == [4, 5, 6, 7]
    assert untouched_shards(on_chat, "solutions/x/") is None
    # Refined on other data, then audited there: the list of what has chosen goes along.
    refined = chosen_also_on({"chosen_on": by_audit}, on_chat, 2)
    again = chosen_also_on({"chosen_on": refined}, on_chat, 1)
    note(again)
    assert untouched_shards(on_text, "solutions/x/") == [4, 5, 6, 7]
    assert untouched_shards(on_chat, "solutions/x/") == [6, 7]
    with pytest.raises(ConfigError, match="chosen on this data cut in another way"):
        untouched_shards(make_measurement(directory, "c"), "solutions/x/")
    # Of a version that noted refinements only.
    earlier = {"refinement": {"data_key": "a", "source": ["text", None, None]}}
    directory.write_json("solutions/x/manifest.json", manifest | earlier)
    assert untouched_shards(on_text, "solutions/x/") == [6, 7]
