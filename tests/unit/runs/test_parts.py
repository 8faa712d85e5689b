"""Parts are read in order, a few ahead, and none is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import part_name
from autoquant_ray.runs.parts import Parts, map_ahead


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
