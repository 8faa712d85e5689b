"""Rows of a table whose columns stay columns: a row is a mapping only while it is looked at.

A run with its experts apart has hundreds of thousands of rows. Kept as dictionaries they would take
hundreds of MiB, and reading them value by value seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, overload

import pyarrow as pa


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


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Values of a column as Python has them; None for null."""
    if column.null_count == len(column):
        return [None] * len(column)
    if column.null_count:
        return list(column.to_pylist())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return list(column.to_numpy().tolist())
    array = column.combine_chunks()
    if pa.types.is_string(column.type):
        encoded = array.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        return [names[index] for index in encoded.indices.to_numpy().tolist()]
    if pa.types.is_list(column.type):
        values = _values(pa.chunked_array([array.flatten()]))
        ends = itertools.accumulate(array.value_lengths().to_numpy().tolist(), initial=0)
        return [values[start:end] for start, end in itertools.pairwise(ends)]
    return list(column.to_pylist())
