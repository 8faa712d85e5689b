"""Files of a run: names, columns and keys of the contract, in two Parquet readers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fastparquet
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from strict_json import read_json

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.runs.directory import SCHEMA_VERSION, RunDirectory
from autoquant_ray.solve import solve_run

COLUMNS = {
    "plan.parquet": "group, format, module_names, num_weights, weight_bits, weight_bytes, "
    "modelopt_cost, is_searched, kv_bytes_per_token",
    "calibration.parquet": "module, statistic, value",
    "scores/shard-000000.parquet": "shard, group, format, elementwise_sum, token_sum, num_tokens, "
    "num_samples, seconds, elementwise_variance, token_variance, expert_tokens, row_share, "
    "sample_sums, sample_tokens, drawing_variances, sequence_sum",
    "scores/shard-000001.parquet": "shard, group, format, elementwise_sum, token_sum, num_tokens, "
    "num_samples, seconds, elementwise_variance, token_variance, expert_tokens, row_share, "
    "sample_sums, sample_tokens, drawing_variances, sequence_sum",
    "sensitivity.parquet": "group, format, score, score_stderr, elementwise, token, "
    "modelopt_score, num_tokens, num_shards, weight_bits, weight_bytes, sampling_stderr, "
    "expert_tokens, row_share",
    "resampling.parquet": "bucket, group, format, sum, bucket_tokens",
    "manifest.parquet": "module, group, format, weight_bits, weight_bytes, score",
    "solutions/bits-6.00/manifest.parquet": "module, group, format, weight_bits, weight_bytes, "
    "score",
}
"""The contract, and after it what was added; written out here so that a renamed column fails."""

STRINGS = {"group", "format", "module", "statistic"}
INTEGERS = {
    "bucket",
    "bucket_tokens",
    "num_weights",
    "shard",
    "num_tokens",
    "num_samples",
    "num_shards",
}

OTHER_TYPES = {
    "module_names": pa.list_(pa.string()),
    "is_searched": pa.bool_(),
    "expert_tokens": pa.list_(pa.int64()),
    "sample_sums": pa.list_(pa.float64()),
    "sample_tokens": pa.list_(pa.int64()),
    "drawing_variances": pa.list_(pa.float64()),
}


def test_parquet_files_are_exactly_those_of_the_contract(finished: RunDirectory) -> None:
    root = Path(finished.uri)
    written = {str(path.relative_to(root)) for path in root.rglob("*.parquet")}
    assert written == set(COLUMNS)


@pytest.mark.parametrize("name", COLUMNS)
def test_parquet_columns_are_the_contract_in_both_readers(
    name: str, finished: RunDirectory
) -> None:
    path = Path(finished.uri, name)
    table = pq.read_table(path)
    assert table.num_rows > 0
    assert ", ".join(table.column_names) == COLUMNS[name]
    frame = fastparquet.ParquetFile(str(path)).to_pandas()
    assert ", ".join(frame.columns) == COLUMNS[name]
    assert len(frame) == table.num_rows
    for column in table.column_names:
        ours, theirs = table.column(column).to_pylist(), frame[column].tolist()
        assert [_plain(value) for value in theirs] == ours, column


def _plain(value: Any) -> Any:
    """What a data frame holds, as Python has it: a column of numbers has NaN for null."""
    if isinstance(value, list):
        return list(value)
    return None if isinstance(value, float) and math.isnan(value) else value


@pytest.mark.parametrize("name", COLUMNS)
def test_parquet_numbers_are_64_bits_wide(name: str, finished: RunDirectory) -> None:
    for field in pq.read_schema(Path(finished.uri, name)):
        wide = pa.int64() if field.name in INTEGERS else pa.float64()
        plain = pa.string() if field.name in STRINGS else wide
        expected = OTHER_TYPES.get(field.name, plain)
        assert field.type == expected, field.name


def test_parquet_missing_error_bar_is_null_in_both_readers(finished: RunDirectory) -> None:
    rows = finished.read_table("sensitivity.parquet").to_pylist()
    for row in rows:
        row["score_stderr"] = None
    finished.write_table("sensitivity.parquet", rows)
    path = Path(finished.uri, "sensitivity.parquet")
    assert pq.read_table(path).column("score_stderr").null_count == len(rows)
    frame = fastparquet.ParquetFile(str(path)).to_pandas()
    assert frame["score_stderr"].isna().all()
    assert frame["score"].notna().all()


def test_parquet_same_rows_give_the_same_bytes(finished: RunDirectory) -> None:
    before = finished.read_bytes("plan.parquet")
    rows = finished.read_table("plan.parquet").to_pylist()
    finished.write_table("plan.parquet", rows)
    assert finished.read_bytes("plan.parquet") == before


def test_manifest_rows_cover_every_module_and_add_up(finished: RunDirectory) -> None:
    rows = pq.read_table(Path(finished.uri, "manifest.parquet")).to_pylist()
    plan = pq.read_table(Path(finished.uri, "plan.parquet")).to_pylist()
    planned = list(dict.fromkeys(name for row in plan for name in row["module_names"]))
    assert [row["module"] for row in rows] == planned
    costs = {(row["group"], row["format"]): row["weight_bytes"] for row in plan}
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        (format_,) = {row["format"] for row in members}
        total = sum(row["weight_bytes"] for row in members)
        assert total == pytest.approx(costs[group, format_], rel=1e-12)


def test_run_json_holds_config_versions_and_stages(finished: RunDirectory) -> None:
    values = read_json(finished, "run.json")
    assert values["schema_version"] == SCHEMA_VERSION == 1
    assert values["config"]["bits"] == 8
    assert {"python", "torch", "ray", "transformers", "nvidia-modelopt"} <= set(values["versions"])
    assert values["fingerprints"] == {"model": "model", "data": "data"}
    for stage in ("plan", "aggregate"):
        assert values["stages"][stage]["state"] == "done"
        assert values["stages"][stage]["seconds"] >= 0
        assert len(values["stages"][stage]["fingerprint"]) == 16


@pytest.mark.parametrize("start", ["", "solutions/bits-6.00/"])
def test_manifest_json_has_the_keys_of_the_contract(start: str, finished: RunDirectory) -> None:
    manifest = read_json(finished, f"{start}manifest.json")
    assert list(manifest) == [
        "schema_version",
        "run_id",
        "model",
        "dataset",
        "budget",
        "solution",
        "quantization_config",
        "stability",
    ]
    assert manifest["schema_version"] == 1
    assert manifest["run_id"] == read_json(finished, "run.json")["run_id"]
    assert manifest["model"]["name"] == "llama"
    assert manifest["dataset"]["name"] == "made-up.txt"
    assert manifest["budget"]["bits"] == (6 if start else 8)
    solution = manifest["solution"]
    assert {
        "effective_bits",
        "effective_bits_all",
        "weight_bytes",
        "predicted_kl_nats",
        "is_satisfied",
        "optimality_gap",
    } <= set(solution)
    assert solution["is_satisfied"] is True
    assert solution["optimality_gap"] == 0


@pytest.mark.parametrize("start", ["", "solutions/bits-6.00/"])
def test_solution_numbers_follow_from_the_parquet_files(
    start: str, finished: RunDirectory, make_model: Any
) -> None:
    solution = read_json(finished, f"{start}manifest.json")["solution"]
    rows = pq.read_table(Path(finished.uri, f"{start}manifest.parquet")).to_pylist()
    weights = {row["module"]: 8 * row["weight_bytes"] / row["weight_bits"] for row in rows}
    searched = [row for row in rows if row["module"] != "lm_head"]

    def average(some: list[dict[str, Any]]) -> float:
        return 8 * sum(r["weight_bytes"] for r in some) / sum(weights[r["module"]] for r in some)

    assert solution["effective_bits"] == pytest.approx(average(searched), rel=1e-12)
    assert solution["effective_bits"] <= (6 if start else 8)
    assert solution["effective_bits_all"] == pytest.approx(average(rows), rel=1e-12)
    scores = {row["group"]: row["score"] for row in rows}
    assert solution["predicted_kl_nats"] == pytest.approx(sum(scores.values()), rel=1e-12)
    total = sum(parameter.numel() for parameter in make_model("llama").parameters())
    others = 2 * (total - sum(weights.values()))
    stored = others + sum(row["weight_bytes"] for row in rows)
    assert solution["weight_bytes"] == pytest.approx(stored, rel=1e-12)


@pytest.mark.parametrize("format_", ["none", "wint8_aint8"])
def test_solution_of_tied_head_counts_the_embedding_once(
    format_: str, make_run: Any, make_model: Any
) -> None:
    """In 16 bits the head is the embedding; quantized it is stored beside the embedding."""
    directory = make_run("qwen3", disable=())
    solution = solve_run(directory, SolveOptions(bits=12, pins={"lm_head": format_}))
    rows = pq.read_table(solution.paths["manifest.parquet"]).to_pylist()
    stored = {row["module"]: row["weight_bytes"] for row in rows}
    weights = sum(
        8 * r["weight_bytes"] / r["weight_bits"] for r in rows if r["module"] != "lm_head"
    )
    unique = sum(parameter.numel() for parameter in make_model("qwen3").parameters())
    head = stored.pop("lm_head")
    expected = 2 * (unique - weights) + sum(stored.values()) + (0 if format_ == "none" else head)
    assert solution.summary["weight_bytes"] == pytest.approx(expected, rel=1e-12)


def test_events_are_one_json_object_a_line(finished: RunDirectory) -> None:
    lines = Path(finished.uri, "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert all({"time", "event"} <= set(event) for event in events)
    done = [event["stage"] for event in events if event["event"] == "stage_done"]
    assert done == ["plan", "aggregate"]


def test_events_in_an_object_store_are_gathered_but_complete_and_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr("autoquant_ray.runs.directory.time.monotonic", lambda: now_s)
    directory = RunDirectory("mock:///")

    def written() -> list[Any]:
        lines = directory.read_bytes("events.jsonl").decode().splitlines()
        return [json.loads(line).get("shard") for line in lines]

    directory.append_event("stage_started")
    for shard in range(3):
        directory.append_event("shard_done", shard=shard)
    assert written() == [None]
    now_s += 10
    directory.append_event("shard_done", shard=3)
    assert written() == [None, 0, 1, 2, 3]
    directory.append_event("shard_done", shard=4)
    directory.append_event("stage_done")
    assert written() == [None, 0, 1, 2, 3, 4, None]


@pytest.mark.parametrize("start", ["", "solutions/bits-6.00/"])
def test_report_lists_every_layer_sorted(start: str, finished: RunDirectory) -> None:
    text = Path(finished.uri, f"{start}report.md").read_text()
    table = text.partition("## Layers")[2].partition("## Scores")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert cells[0] == ["Layer", "Num Bits", "Sensitivity", "Size Cost", "Chosen"]
    rows = pq.read_table(Path(finished.uri, f"{start}manifest.parquet")).to_pylist()
    assert sorted(row[0] for row in cells[1:]) == sorted(row["module"] for row in rows)
    assert cells[-1][0] == "lm_head"
    shown = [float(row[2]) for row in cells[1:-1]]
    assert shown == sorted(shown, reverse=True)
    chosen = {row["module"]: row["format"] for row in rows}
    assert all(row[4].split(" (")[0] == chosen[row[0]] for row in cells[1:])
