"""Damaged and earlier files of a run: one line that names the file."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run
from autoquant_ray.wording import printable

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


def test_number_of_shards_is_checked_against_the_files(finished: RunDirectory) -> None:
    path = Path(finished.uri, "run.json")
    values = json.loads(path.read_text())
    values["dataset"]["num_shards"] = 10**9
    path.write_text(json.dumps(values))
    start = time.perf_counter()
    result = CliRunner().invoke(main, ["explain", finished.uri, "layers.0.mlp.down_proj"])
    assert time.perf_counter() - start < 5
    assert result.exit_code == 2
    assert "`dataset.num_shards` is 1000000000, and there are parts of 2 shards" in result.stderr
    assert len(result.stderr.splitlines()) == 1


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
        finished.read_table(name)
    assert len(str(caught.value).splitlines()) == 1
    result = CliRunner().invoke(main, ["solve", finished.uri, "--bits", "7"])
    assert result.exit_code == 2
    assert result.stderr == f"error: {printable(str(caught.value))}\n"
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


def test_read_columns_that_an_earlier_version_did_not_write_are_null(make_run: Any) -> None:
    directory = make_run()
    name = "sensitivity.parquet"
    table = directory.read_table(name).drop_columns(["sampling_stderr"])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    directory.write_bytes(name, sink.getvalue().to_pybytes())
    read = directory.read_table(name)
    assert read.column("sampling_stderr").null_count == table.num_rows > 0
    assert solve_run(directory, SolveOptions(bits=6))


@pytest.mark.parametrize("damage", [truncate, empty])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("resampling.parquet", "scan --resume"),
        ("sensitivity.parquet", "scan --resume"),
        ("plan.parquet", "scan --resume"),
    ],
)
def test_damaged_table_is_one_line_with_the_command_that_makes_it_again(
    damage: Any, name: str, command: str, finished: RunDirectory
) -> None:
    damage(Path(finished.uri, name))
    result = CliRunner().invoke(main, ["solve", finished.uri, "--bits", "7"])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert f"{name} is damaged" in line
    assert f"autoquant-ray {command} makes it again" in line


def test_solve_says_that_no_certainty_is_known_without_its_table(finished: RunDirectory) -> None:
    Path(finished.uri, "resampling.parquet").unlink()
    result = CliRunner().invoke(main, ["solve", finished.uri, "--bits", "7"])
    assert result.exit_code == 0
    assert "resampling.parquet is gone, so that no certainty is known" in result.stderr
    assert "autoquant-ray scan --resume makes it again" in result.stderr


@pytest.mark.parametrize("damage", [None, truncate, empty])
@pytest.mark.parametrize(
    "name",
    [
        "plan.parquet",
        "sensitivity.parquet",
        "resampling.parquet",
        "domain_sensitivity.parquet",
        "domain_resampling.parquet",
    ],
)
def test_stage_with_a_lost_or_damaged_table_is_not_done(
    damage: Any, name: str, make_run: Any
) -> None:
    directory: RunDirectory = make_run(num_shards=4, domains=("a", "b", "a", "b"))
    stage = "plan" if name == "plan.parquet" else "aggregate"

    def is_done() -> bool:
        state = RunState.open(directory)
        return state.is_done(stage, state.record.stages[stage]["fingerprint"])

    assert is_done()
    path = Path(directory.uri, name)
    path.unlink() if damage is None else damage(path)
    assert not is_done()
