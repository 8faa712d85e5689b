"""Files of a run: columns, two Parquet readers, atomic writes, damage, and ``mtq.quantize``."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import fastparquet
import modelopt.torch.quantization as mtq
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from modelopt.torch.quantization.nn import TensorQuantizer

from autoquant_ray import load_quantization_config
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import SCHEMA_VERSION, RunDirectory
from autoquant_ray.runs.names import part_name
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run

COLUMNS = {
    "plan.parquet": "group, format, module_names, num_weights, weight_bits, weight_bytes, "
    "modelopt_cost, is_searched, kv_bytes_per_token",
    "calibration.parquet": "module, statistic, value",
    "scores/shard-000000.parquet": "shard, group, format, elementwise_sum, token_sum, num_tokens, "
    "num_samples, seconds, elementwise_variance, token_variance, expert_tokens",
    "scores/shard-000001.parquet": "shard, group, format, elementwise_sum, token_sum, num_tokens, "
    "num_samples, seconds, elementwise_variance, token_variance, expert_tokens",
    "sensitivity.parquet": "group, format, score, score_stderr, elementwise, token, "
    "modelopt_score, num_tokens, num_shards, weight_bits, weight_bytes, sampling_stderr, "
    "expert_tokens",
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
}


@pytest.fixture
def finished(make_run: Any) -> RunDirectory:
    """A run with every file of the contract: the scan's own solution and one at 6 bits."""
    directory: RunDirectory = make_run()
    maxima = [{"module": "lm_head", "statistic": "input_amax", "value": 1.5}]
    directory.write_table("calibration.parquet", "calibration", maxima)
    solve_run(directory, SolveOptions(bits=8), folder="")
    solve_run(directory, SolveOptions(bits=6))
    return directory


def read_json(directory: RunDirectory, name: str) -> Any:
    """JSON as any other tool reads it: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = Path(directory.uri, name).read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


# --- Parquet


def test_parquet_files_are_exactly_those_of_the_contract(finished: RunDirectory) -> None:
    root = Path(finished.uri)
    found = {str(path.relative_to(root)) for path in root.rglob("*.parquet")}
    assert found == set(COLUMNS)


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
        assert [list(x) if isinstance(x, list) else x for x in theirs] == ours, column


@pytest.mark.parametrize("name", COLUMNS)
def test_parquet_numbers_are_64_bits_wide(name: str, finished: RunDirectory) -> None:
    for field in pq.read_schema(Path(finished.uri, name)):
        wide = pa.int64() if field.name in INTEGERS else pa.float64()
        plain = pa.string() if field.name in STRINGS else wide
        expected = OTHER_TYPES.get(field.name, plain)
        assert field.type == expected, field.name


def test_parquet_missing_error_bar_is_null_in_both_readers(finished: RunDirectory) -> None:
    rows = finished.read_table("sensitivity.parquet", "sensitivity").to_pylist()
    for row in rows:
        row["score_stderr"] = None
    finished.write_table("sensitivity.parquet", "sensitivity", rows)
    path = Path(finished.uri, "sensitivity.parquet")
    assert pq.read_table(path).column("score_stderr").null_count == len(rows)
    frame = fastparquet.ParquetFile(str(path)).to_pandas()
    assert frame["score_stderr"].isna().all()
    assert frame["score"].notna().all()


def test_parquet_same_rows_give_the_same_bytes(finished: RunDirectory) -> None:
    before = finished.read_bytes("plan.parquet")
    rows = finished.read_table("plan.parquet", "plan").to_pylist()
    finished.write_table("plan.parquet", "plan", rows)
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


# --- JSON


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


# --- writing


def test_write_below_a_file_fails_and_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    (tmp_path / "scores").write_text("a file, not a folder")
    with pytest.raises(StoreError, match=r"cannot write .*scores/shard-000000\.parquet"):
        directory.write_table(part_name("scores", 0), "scores", [])
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    assert (tmp_path / "scores").read_text() == "a file, not a folder"


def test_write_over_a_folder_fails_and_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    (tmp_path / "plan.parquet").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*plan\.parquet"):
        directory.write_bytes("plan.parquet", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.parquet"]
    assert list((tmp_path / "plan.parquet").iterdir()) == []


WRITE_ON_A_FULL_DISK = """
import resource, sys
from autoquant_ray.errors import StoreError
from autoquant_ray.store import RunDirectory
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    RunDirectory(sys.argv[1]).write_bytes("plan.parquet", b"x" * 5000)
except StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("before", [None, b"old"])
def test_write_that_stops_midway_leaves_the_old_file_or_none(
    before: bytes | None, tmp_path: Path
) -> None:
    """The process may write 1000 bytes per file, so the write stops as on a full disk."""
    if before is not None:
        (tmp_path / "plan.parquet").write_bytes(before)
    done = subprocess.run(
        [sys.executable, "-c", WRITE_ON_A_FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({} if before is None else {"plan.parquet": before})


EVENTS_ON_A_FULL_DISK = """
import resource, sys
from autoquant_ray.errors import StoreError
from autoquant_ray.store import RunDirectory
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
directory = RunDirectory(sys.argv[1])
directory.write_text("run.json", "{}")
try:
    while True:
        directory.append_event("shard_done", stage="score", shard=7)
except StoreError as error:
    print(error.exit_code, error)
"""


def test_events_on_a_full_disk_are_whole_lines_and_the_error_is_no_usage_error(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVENTS_ON_A_FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"1 cannot write {tmp_path}/events.jsonl")
    assert "--resume" in line
    text = (tmp_path / "events.jsonl").read_text()
    assert 900 < len(text) <= 1000
    assert {json.loads(event)["shard"] for event in text.splitlines()} == {7}
    assert text.endswith("}\n")


def test_write_replaces_a_file_whole(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    directory.write_bytes("a/b.bin", b"long content")
    directory.write_bytes("a/b.bin", b"short")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"short"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_write_keeps_the_old_content_for_a_reader_that_is_open(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    directory.write_bytes("run.json", b"old content")
    with (tmp_path / "run.json").open("rb", buffering=0) as reader:
        directory.write_bytes("run.json", b"new")
        assert reader.read() == b"old content"


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.write_json("a.json", {"score": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_parts_ignore_other_files(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    for shard in (3, 0, 12):
        directory.write_table(part_name("scores", shard), "scores", [])
    (tmp_path / "scores" / ".shard-000001.parquet.ab12.tmp").write_bytes(b"half")
    (tmp_path / "scores" / "notes.txt").write_text("hello")
    assert directory.list_parts("scores") == [0, 3, 12]


# --- damage


DAMAGED_RUNS = {
    "empty": b"",
    "half": None,
    "not-json": b"hello",
    "list": b"[]",
    "not-utf8": b'{"schema_version": "\xff"}',
    "pickle": pickle.dumps({"schema_version": 1}),
    "no-version": b"{}",
    "later-version": b'{"schema_version": 2}',
}


@pytest.mark.parametrize("damage", DAMAGED_RUNS)
def test_run_json_damaged_is_one_line(damage: str, finished: RunDirectory) -> None:
    path = Path(finished.uri, "run.json")
    content = DAMAGED_RUNS[damage]
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(StoreError) as caught:
        RunState.open(finished)
    assert len(str(caught.value).splitlines()) == 1
    assert finished.uri in str(caught.value)
    result = CliRunner().invoke(main, ["solve", finished.uri, "--bits", "7"])
    assert result.exit_code == 2
    assert result.stderr == f"error: {caught.value}\n"


def test_run_json_missing_is_no_run(finished: RunDirectory) -> None:
    Path(finished.uri, "run.json").unlink()
    with pytest.raises(StoreError, match=r"is not a run directory: it has no run\.json"):
        RunState.open(finished)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    content = path.read_bytes()
    middle = bytes(byte ^ 0xFF for byte in content[8:200])
    path.write_bytes(content[:8] + middle + content[200:])


def drop_column(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["weight_bytes"]), path)


def change_type(path: Path) -> None:
    table = pq.read_table(path)
    index = table.column_names.index("weight_bits")
    words = pa.array(["many"] * table.num_rows)
    pq.write_table(table.set_column(index, "weight_bits", words), path)


@pytest.mark.parametrize("damage", [truncate, empty, garble, drop_column, change_type])
@pytest.mark.parametrize("name", ["plan.parquet", "sensitivity.parquet"])
def test_parquet_damaged_is_one_line(damage: Any, name: str, finished: RunDirectory) -> None:
    damage(Path(finished.uri, name))
    with pytest.raises(StoreError, match=name) as caught:
        finished.read_table(name, name.removesuffix(".parquet"))
    assert len(str(caught.value).splitlines()) == 1
    result = CliRunner().invoke(main, ["solve", finished.uri, "--bits", "7"])
    assert result.exit_code == 2
    assert result.stderr == f"error: {caught.value}\n"
    assert finished.list_folders("solutions") == ["bits-6.00"]


@pytest.mark.parametrize("name", ["plan.parquet", "sensitivity.parquet"])
def test_parquet_missing_is_one_line(name: str, finished: RunDirectory) -> None:
    Path(finished.uri, name).unlink()
    with pytest.raises(StoreError, match=rf"{name} does not exist"):
        solve_run(finished, SolveOptions(bits=7))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"solution": {}}'])
def test_report_of_damaged_manifest_is_one_line(content: bytes, finished: RunDirectory) -> None:
    Path(finished.uri, "manifest.json").write_bytes(content)
    result = CliRunner().invoke(main, ["report", finished.uri])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert "manifest.json" in line


# --- mtq.quantize

WEIGHT, INPUT = "weight", "input"
QUANTIZERS = {
    "wint4_afp16": {WEIGHT: (4, {-1: 128, "type": "static"}, None)},
    "wfp8_afp8": {WEIGHT: ((4, 3), None, None), INPUT: ((4, 3), None, None)},
    "wint8_aint8": {WEIGHT: (8, None, 0), INPUT: (8, None, None)},
    "none": {},
}
"""Format -> quantizer -> (num_bits, block_sizes, axis); ModelOpt sets a block format's axis."""

PINS = {
    "llama": {
        "model.layers.0.self_attn.q_proj": "wint8_aint8",
        "model.layers.0.mlp.gate_proj": "wfp8_afp8",
        "model.layers.1.self_attn.o_proj": "none",
        "model.layers.1.mlp.down_proj": "wint4_afp16",
    },
    "qwen3_moe": {
        "model.layers.0.self_attn.q_proj": "wint8_aint8",
        "model.layers.0.mlp.experts": "wint8_aint8",
        "model.layers.1.self_attn.o_proj": "none",
        "model.layers.1.mlp.experts": "wint4_afp16",
    },
}


def expected_quantizers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Quantizer name -> settings that the layers of a manifest ask for, experts by kind."""
    expected = {}
    for row in rows:
        is_experts = row["module"].endswith(".experts")
        starts = ("gate_up_proj_", "down_proj_") if is_experts else ("",)
        for start in starts:
            for part, settings in QUANTIZERS[row["format"]].items():
                name = f"{start}{part}_quantizer"
                expected[f"{row['module']}.{name}"] = settings
    return expected


def enabled_quantizers(model: torch.nn.Module) -> dict[str, Any]:
    """Quantizer name -> settings of all enabled ones; one entry for a list over experts."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled:
            continue
        start, _, last = name.rpartition(".")
        of_experts = last.isdigit()
        shown = start.replace("_quantizers", "_quantizer") if of_experts else name
        blocks = module.block_sizes
        axis = None if blocks else module.axis
        settings = (module.num_bits, dict(blocks) if blocks else None, axis)
        assert found.setdefault(shown, settings) == settings, name
    return found


@pytest.mark.parametrize("family", PINS)
def test_quantization_config_sets_exactly_the_manifest_quantizers(
    family: str, make_run: Any, make_model: Any, make_samples: Any
) -> None:
    directory = make_run(family)
    solution = solve_run(directory, SolveOptions(bits=10, pins=PINS[family]))
    manifest = read_json(directory, f"solutions/{solution.name}/manifest.json")
    rows = pq.read_table(solution.paths["manifest.parquet"]).to_pylist()
    assert PINS[family].items() <= {row["group"]: row["format"] for row in rows}.items()
    ids = torch.tensor(make_samples([24] * 4))
    model = make_model(family)
    plain = model(input_ids=ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = load_quantization_config(manifest)
        quantized = mtq.quantize(model, config, forward_loop=lambda m: m(input_ids=ids))
    assert enabled_quantizers(quantized) == expected_quantizers(rows)
    logits = quantized(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - plain).abs().max() > 0


def test_quantization_config_all_none_changes_nothing(
    make_run: Any, make_model: Any, make_samples: Any
) -> None:
    directory = make_run()
    solution = solve_run(directory, SolveOptions(bits=16, allow={"*": ("none",)}))
    manifest = read_json(directory, f"solutions/{solution.name}/manifest.json")
    ids = torch.tensor(make_samples([24] * 2))
    model = make_model("llama")
    plain = model(input_ids=ids).logits
    quantized = mtq.quantize(
        model, load_quantization_config(manifest), forward_loop=lambda m: m(input_ids=ids)
    )
    assert enabled_quantizers(quantized) == {}
    assert torch.equal(quantized(input_ids=ids).logits, plain)


def test_quantization_config_of_vision_model_leaves_the_tower_alone(
    make_run: Any, make_model: Any, make_samples: Any
) -> None:
    directory = make_run("qwen3_vl", disable=())
    solution = solve_run(directory, SolveOptions(bits=8))
    manifest = read_json(directory, f"solutions/{solution.name}/manifest.json")
    rows = pq.read_table(solution.paths["manifest.parquet"]).to_pylist()
    towers = [row for row in rows if "visual" in row["module"]]
    assert towers
    assert all(row["format"] == "none" for row in towers)
    ids = torch.tensor(make_samples([24] * 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = mtq.quantize(
            make_model("qwen3_vl"),
            load_quantization_config(manifest),
            forward_loop=lambda m: m(input_ids=ids),
        )
    found = enabled_quantizers(quantized)
    assert found == expected_quantizers(rows)
    assert found


def test_quantization_config_of_imported_manifest_is_refused() -> None:
    with pytest.raises(ValueError, match="imported"):
        load_quantization_config({"quantization_config": None})


def test_read_columns_that_an_earlier_version_did_not_write_are_null(make_run: Any) -> None:
    directory = make_run()
    name = "sensitivity.parquet"
    table = directory.read_table(name, "sensitivity").drop_columns(["sampling_stderr"])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    directory.write_bytes(name, sink.getvalue().to_pybytes())
    read = directory.read_table(name, "sensitivity")
    assert read.column("sampling_stderr").null_count == table.num_rows > 0
    assert solve_run(directory, SolveOptions(bits=6))
