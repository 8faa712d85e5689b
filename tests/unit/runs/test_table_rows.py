"""Columns as NumPy arrays without pandas: equal to what pyarrow gives with it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from autoquant_ray.runs.table_rows import has_values, numbers_of, rows_with

VALUES = {
    "floats": pa.array([0.5, None, -2.0, 7.25, None, 1.0, 3.0, None, 4.0, 5.0]),
    "small integers": pa.array([1, 2, None, 4, 5, 6, 7, 8, 9, None], pa.int32()),
    "no null": pa.array(range(10), pa.int64()),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("start", [0, 3, 9, 10])
def test_numbers_with_nulls(name: str, start: int) -> None:
    array = VALUES[name].slice(start)
    column = pa.chunked_array([array.slice(0, 2), array.slice(2)])
    for values in (array, column):
        np.testing.assert_array_equal(
            numbers_of(values, null=-1.0), values.fill_null(-1).to_numpy()
        )
        np.testing.assert_array_equal(has_values(values), values.is_valid().to_pylist())


def test_numbers_without_a_stand_in_for_null() -> None:
    with pytest.raises(TypeError, match="null"):
        numbers_of(VALUES["floats"])


@pytest.mark.parametrize(("text", "expected"), [("b", [1, 2, 3]), ("a", [0]), ("z", [])])
def test_rows_with_a_text(text: str, expected: list[int]) -> None:
    table = pa.table({"name": ["a", "b", "c", "b"], "number": range(4)})
    assert rows_with(table, "name", text).column("number").to_pylist() == expected
