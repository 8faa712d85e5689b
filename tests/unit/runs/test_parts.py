"""Parts are read in order, a few ahead, and none is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import part_name
from autoquant_ray.runs.parts import Parts, map_ahead
from autoquant_ray.runs.schemas import schema_of


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(str(tmp_path))
    for shard in range(40):
        rows = [{"module": "m", "statistic": "s", "value": float(shard)}]
        directory.write_table(part_name("calibration", shard), rows)
    return directory


def values(parts: Parts) -> list[float]:
    return [part.column("value")[0].as_py() for part in parts]


def test_parts_come_in_the_order_of_the_shards_and_can_be_read_again(
    directory: RunDirectory,
) -> None:
    shards = [*range(39, 0, -3), 38]
    parts = Parts(directory, "calibration", shards)
    assert len(parts) == len(shards)
    assert values(parts) == values(parts) == shards
    assert parts[1].column("value").to_pylist() == [36.0]
    assert values(parts[2:4]) == [33.0, 30.0]


def test_parts_missing_one_raises_in_its_place(directory: RunDirectory) -> None:
    iterator = iter(Parts(directory, "calibration", [5, 99, 6]))
    assert next(iterator).column("value").to_pylist() == [5.0]
    with pytest.raises(StoreError, match="shard-000099"):
        next(iterator)


def test_map_ahead_pulls_no_more_than_a_few_items() -> None:
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            pulled.append(item)
            yield item

    squares = map_ahead(lambda item: item * item, items())
    assert [next(squares) for _ in range(100)] == [item * item for item in range(100)]
    assert 100 < len(pulled) <= 120
    squares.close()
    assert len(pulled) <= 120


def test_tables_are_written_below_each_other_with_one_in_memory(tmp_path: Path) -> None:
    directory, num_tables, num_bytes = RunDirectory(str(tmp_path)), 20, 8 * 2**20
    schema = schema_of("rounding.parquet")
    largest = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal largest
        yield pa.Table.from_pylist([], schema=schema)
        for number in range(num_tables):
            codes = np.random.default_rng(number).bytes(num_bytes)  # not to be compressed
            row = {"module": f"layer {number}", "part": "", "format": "a", "codes": codes}
            yield pa.Table.from_pylist([row], schema=schema)
            largest = max(largest, pa.total_allocated_bytes() - before)

    before = pa.total_allocated_bytes()
    directory.write_tables("rounding.parquet", tables())
    assert largest < 0.3 * num_tables * num_bytes
    read = directory.read_table("rounding.parquet")
    assert read.column("module").to_pylist() == [f"layer {n}" for n in range(num_tables)]
    assert {len(codes.as_buffer()) for codes in read.column("codes")} == {num_bytes}
    assert pq.read_table(tmp_path / "rounding.parquet").num_rows == num_tables


def test_tables_that_cannot_be_made_leave_what_was_there(directory: RunDirectory) -> None:
    schema = schema_of("rounding.parquet")

    def tables() -> Iterator[pa.Table]:
        yield pa.Table.from_pylist([{"module": "a", "part": "", "format": "a"}], schema=schema)
        raise StoreError("no more")

    directory.write_text("rounding.parquet", "before")
    with pytest.raises(StoreError, match="no more"):
        directory.write_tables("rounding.parquet", tables())
    assert directory.read_bytes("rounding.parquet") == b"before"
    assert directory.list_files("") == ["rounding.parquet"]


ROWS = [{"module": "m", "statistic": "s", "value": 1.0}]


def marked_run(folder: Path, mark: str) -> RunDirectory:
    """A directory whose calibration stage has a fingerprint."""
    directory = RunDirectory(str(folder))
    directory.marks["calibration"] = mark
    return directory


def test_part_of_another_run_is_refused_and_of_the_same_data_is_not(tmp_path: Path) -> None:
    first, same, other = (marked_run(tmp_path / n, n[0]) for n in ("a1", "a2", "b"))
    name = part_name("calibration", 3)
    first.write_table(name, ROWS)
    for directory in (same, other):
        directory.write_bytes(name, first.read_bytes(name))
    assert same.read_rows(name)[0] == ROWS[0]
    with pytest.raises(StoreError, match=r"is a part of another run; .* --resume makes it again"):
        other.read_table(name)


def test_part_under_the_name_of_another_shard_is_refused(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    first, second = part_name("calibration", 3), part_name("calibration", 4)
    directory.write_table(first, ROWS)
    directory.write_bytes(second, directory.read_bytes(first))
    with pytest.raises(StoreError, match=rf"{second} is the part {first} under another name"):
        directory.read_table(second)


def test_part_of_other_held_out_data_is_refused(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    first, second = (part_name(f"evaluation/{key}/plan", 0) for key in ("data", "else"))
    row = {"sample": 0, "kl": [0.5], "loss": [1.0], "reference_loss": [1.0], "agrees": [True]}
    directory.write_table(first, [row])
    directory.write_bytes(second, directory.read_bytes(first))
    assert directory.read_rows(first)[0]["sample"] == 0
    with pytest.raises(StoreError, match="another run"):
        directory.read_table(second)


def test_part_of_an_earlier_version_says_nothing_and_is_read(tmp_path: Path) -> None:
    directory = marked_run(tmp_path, "a")
    name = part_name("calibration", 3)
    (tmp_path / "calibration").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS, schema=schema_of(name)), tmp_path / name)
    assert directory.read_rows(name)[0] == ROWS[0]
