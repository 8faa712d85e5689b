"""``explain``: shares of shards and resamples against sums of files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastparquet
import pandas
import pytest
from command_line import run
from explanations import FORMATS, Everything, by_format, explained

from autoquant_ray.allocate.certainty.explain import explain_group
from autoquant_ray.allocate.certainty.explanation import head_lines
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SCORES, part_name
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run
from autoquant_ray.stages.aggregate import aggregate_parts

NUM_SHARDS = 6
ODD_SHARD = 3


@pytest.fixture
def odd_run(make_run: Any) -> tuple[RunDirectory, str]:
    """Six shards of different sizes, one of which is very odd for one group; solved at 7 bits."""
    directory = make_run(formats=FORMATS, num_shards=NUM_SHARDS)
    group = ScoredRun.read(RunState.open(directory)).problem.searched[2].name
    for shard in range(NUM_SHARDS):
        table = directory.read_table(part_name(SCORES, shard)).to_pandas()
        table["num_tokens"] = 40 + 10 * shard
        if shard == ODD_SHARD:
            table.loc[table.group == group, "elementwise_sum"] *= 1000
        rows = table.to_dict("records")
        directory.write_table(part_name(SCORES, shard), rows)
    plan_rows = directory.read_table("plan.parquet").to_pylist()
    parts = Parts(directory, SCORES, range(NUM_SHARDS))
    aggregate = aggregate_parts(parts, plan_rows, "elementwise")
    directory.write_table("sensitivity.parquet", aggregate.rows)
    directory.write_table("resampling.parquet", aggregate.buckets)
    solve_run(directory, SolveOptions(bits=7.0), folder="")
    return directory, group


def score_parts(directory: RunDirectory) -> pandas.DataFrame:
    """All parts, read by fastparquet."""
    paths = sorted(Path(directory.path(SCORES)).glob("shard-*.parquet"))
    return pandas.concat(fastparquet.ParquetFile(str(path)).to_pandas() for path in paths)


def test_shares_of_the_shards_are_those_of_the_files(odd_run: tuple[RunDirectory, str]) -> None:
    directory, _ = odd_run
    parts = score_parts(directory)
    tokens = parts.drop_duplicates("shard").set_index("shard").num_tokens
    for group in dict.fromkeys(parts.group):
        explanation = explained(directory, group)
        assert explanation["num_shards"] == NUM_SHARDS
        for format_ in FORMATS:
            rows = parts[(parts.group == group) & (parts.format == format_)].set_index("shard")
            shares = (rows.elementwise_sum / rows.elementwise_sum.sum()).sort_values()[::-1]
            shards = by_format(explanation)[format_]["shards"]
            assert [entry["shard"] for entry in shards] == list(shares.index[: len(shards)])
            assert [entry["share"] for entry in shards] == pytest.approx(
                list(shares[: len(shards)])
            )
            assert [entry["token_share"] for entry in shards] == pytest.approx(
                [tokens[entry["shard"]] / tokens.sum() for entry in shards]
            )
        assert by_format(explanation)["none"]["shards"] == []


def test_odd_shard_that_decides_is_named_with_what_holds_without_it(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    explanation = explained(directory, group)
    assert by_format(explanation)[FORMATS[0]]["shards"][0]["shard"] == ODD_SHARD
    assert by_format(explanation)[FORMATS[0]]["shards"][0]["share"] > 0.9
    parts = score_parts(directory)
    parts = parts[parts.shard != ODD_SHARD]
    tokens = parts.drop_duplicates("shard").num_tokens.sum()
    sums = parts.groupby(["group", "format"]).elementwise_sum.sum()
    best = Everything.of(directory, (0.5 * sums / tokens).to_dict()).best(7.0)
    assert best is not None
    assert explanation["without_shard"] == [{"shard": ODD_SHARD, "format": best[0][group]}]
    assert best[0][group] != explanation["chosen"]
    shown = run("explain", directory.uri, group).output
    assert f"without shard {ODD_SHARD} the group gets {best[0][group]}" in shown


def test_resampled_shares_are_those_of_the_manifest(odd_run: tuple[RunDirectory, str]) -> None:
    directory, _ = odd_run
    kept = directory.read_json("manifest.json")["stability"]["kept"]
    assert any(share < 1 for share in kept.values())
    for group, share in kept.items():
        explanation = explained(directory, group)
        shares = {f: entry["resampled_share"] for f, entry in by_format(explanation).items()}
        assert shares[explanation["chosen"]] == share
        assert sum(shares.values()) == pytest.approx(1)
        assert explanation["num_resamples"] == 200


@pytest.mark.parametrize(
    ("chosen", "other", "said"),
    [
        (0.0, 1.0, "in 0% of 200 resamples of the shards (these take "),
        (0.4, 0.6, "in 40% of 200 resamples of the shards (a coin toss)"),
        (1.0, 0.0, "in 100% of 200 resamples of the shards (certain)"),
    ],
)
def test_format_that_resamples_never_take_is_no_coin_toss(
    odd_run: tuple[RunDirectory, str], chosen: float, other: float, said: str
) -> None:
    explanation = explain_group(odd_run[0], odd_run[1])
    second = next(entry.format for entry in explanation.formats if not entry.is_chosen)
    shares = {explanation.chosen: chosen, second: other}
    formats = tuple(
        dataclasses.replace(entry, resampled_share=shares.get(entry.format, 0.0))
        for entry in explanation.formats
    )
    text = head_lines(dataclasses.replace(explanation, formats=formats))[-1]
    assert said in text
    assert (second in text) == (other == 1)


def test_scores_and_costs_are_those_of_the_files(odd_run: tuple[RunDirectory, str]) -> None:
    directory, group = odd_run
    table = fastparquet.ParquetFile(directory.path("sensitivity.parquet")).to_pandas()
    rows = table[table.group == group].set_index("format")
    explanation = explained(directory, group)
    for format_ in FORMATS:
        entry = by_format(explanation)[format_]
        for column in ("score", "score_stderr", "weight_bits", "weight_bytes"):
            assert entry[column] == rows.loc[format_, column] > 0
    none = by_format(explanation)["none"]
    assert (none["score"], none["score_stderr"], none["weight_bits"]) == (0.0, None, 16.0)
    summary = directory.read_json("manifest.json")["solution"]
    assert explanation["plan_score"] == pytest.approx(summary["predicted_kl_nats"], rel=1e-12)


def files(directory: RunDirectory) -> Iterator[tuple[str, bytes]]:
    for path in sorted(Path(directory.uri).rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes()


def test_same_question_has_the_same_answer_and_changes_no_file(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    before = dict(files(directory))
    assert (
        run("explain", directory.uri, group).output == run("explain", directory.uri, group).output
    )
    assert explained(directory, group) == explained(directory, group)
    assert dict(files(directory)) == before


def test_parts_that_are_gone_or_damaged_are_said_and_the_rest_is_told(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    whole = explained(directory, group)
    path = Path(directory.path(part_name(SCORES, 2)))
    path.write_bytes(b"PAR1")
    damaged = explained(directory, group)
    assert "shard-000002.parquet is damaged" in damaged["no_shards"]
    path.unlink()
    gone = explained(directory, group)
    assert gone["no_shards"] == "1 of 6 parts are gone, the first of shard 2"
    for explanation in (damaged, gone):
        assert (explanation["num_shards"], explanation["without_shard"]) == (None, [])
        for format_, entry in by_format(explanation).items():
            assert entry == by_format(whole)[format_] | {"shards": []}


def test_group_seen_in_one_shard_alone_has_no_score_without_it(
    odd_run: tuple[RunDirectory, str],
) -> None:
    directory, group = odd_run
    other = ScoredRun.read(RunState.open(directory)).problem.searched[0].name
    for shard in set(range(NUM_SHARDS)) - {ODD_SHARD}:
        table = directory.read_table(part_name(SCORES, shard)).to_pylist()
        unseen = {"elementwise_sum": None, "token_sum": None}
        rows = [row | (unseen if row["group"] == other else {}) for row in table]
        directory.write_table(part_name(SCORES, shard), rows)
    explanation = explained(directory, group)
    assert {"shard": ODD_SHARD, "format": None} in explanation["without_shard"]
    assert "without shard 3 some group has no score" in run("explain", directory.uri, group).output
