"""Rows of a table whose columns stay columns: a row is a mapping only while it is looked at.

A run with its experts apart has hundreds of thousands of rows. Kept as dictionaries they would take
hundreds of MiB, and reading them value by value seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from autoquant_ray.arrays import Mask


class TableRows(Sequence[dict[str, Any]]):
    """Rows of a table with the values that ``to_pylist`` gives; equal texts are one object.

    Args:
        table: The table.
    """

    def __init__(self, table: pa.Table) -> None:
        self._names = list(table.column_names)
        self._columns = [_values(table.column(name)) for name in self._names]
        self._num_rows: int = table.num_rows

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        return self._columns[self._names.index(name)]

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._num_rows))]
        return {n: values[index] for n, values in zip(self._names, self._columns, strict=True)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*self._columns, strict=True):
            yield dict(zip(self._names, values, strict=True))


def numbers_of(column: pa.Array | pa.ChunkedArray, null: float | None = None) -> npt.NDArray[Any]:
    """Integers or floats of a column, read-only; ``null`` where it has nulls.

    ``to_numpy``, ``fill_null`` and comparisons with a text do the same, but they import pandas
    first, which takes longer than many commands that read a run.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if null is None or not array.null_count:
        return np.from_dlpack(array)
    values = pa.Array.from_buffers(
        array.type, len(array), [None, array.buffers()[1]], offset=array.offset
    )
    return np.where(has_values(array), np.from_dlpack(values), null)


def has_values(column: pa.Array | pa.ChunkedArray) -> Mask:
    """Where a column is not null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not array.null_count:
        return np.ones(len(array), dtype=np.bool_)
    bits = np.unpackbits(np.frombuffer(array.buffers()[0], dtype=np.uint8), bitorder="little")
    return bits[array.offset : array.offset + len(array)].astype(np.bool_)


def rows_with(table: pa.Table, column: str, text: str) -> pa.Table:
    """The shortest slice of a table that holds every row whose column is a text."""
    encoded = table.column(column).combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    if text not in texts:
        return table.slice(0, 0)
    rows = np.flatnonzero(numbers_of(encoded.indices) == texts.index(text))
    return table.slice(rows[0], rows[-1] - rows[0] + 1)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Values of a column as Python has them; None for null."""
    if column.null_count == len(column):
        return [None] * len(column)
    if column.null_count:
        return list(column.to_pylist())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return list(numbers_of(column).tolist())
    array = column.combine_chunks()
    if pa.types.is_string(column.type):
        encoded = array.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        return [names[index] for index in numbers_of(encoded.indices).tolist()]
    if pa.types.is_list(column.type):
        values = _values(pa.chunked_array([array.flatten()]))
        ends = itertools.accumulate(numbers_of(array.value_lengths()).tolist(), initial=0)
        return [values[start:end] for start, end in itertools.pairwise(ends)]
    return list(column.to_pylist())
