"""Tables to the bytes of Parquet files, and back with the columns that a file of that name has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from autoquant_ray.errors import StoreError, one_line
from autoquant_ray.runs.names import remedy_of
from autoquant_ray.runs.schemas import ADDED_COLUMNS

Metadata = Mapping[bytes, bytes] | None


def damaged(path: str, name: str, error: BaseException) -> StoreError:
    """The error for a file that cannot be read.

    Args:
        path: For people.
        name: In its run.
        error: What reading it raised.
    """
    return StoreError(f"{path} is damaged: {one_line(error, limit=150)}; {remedy_of(name)}")


def encode_table(table: pa.Table) -> bytes:
    """A table as the content of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def decode_table(
    content: bytes,
    schema: pa.Schema,
    encoded: Sequence[str],
    path: str,
    check: Callable[[Metadata], None],
) -> pa.Table:
    """The table of a Parquet file.

    Args:
        content: Of the file.
        schema: Columns that it must have; those of :data:`ADDED_COLUMNS` may be missing.
        encoded: Columns of text to keep as numbers into a dictionary.
        path: Of the file, for errors.
        check: Called with the file's metadata before anything is read; raises what it refuses.

    Raises:
        StoreError: It lacks columns.
        pyarrow.ArrowException, OSError, ValueError: It is damaged.
    """
    for column in encoded:
        field = pa.field(column, pa.dictionary(pa.int32(), pa.string()))
        schema = schema.set(schema.get_field_index(column), field)
    # Parts are small, and several are read at a time.
    file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=list(encoded))
    check(file.schema_arrow.metadata)
    table = file.read(use_threads=False)
    missing = set(schema.names) - set(table.column_names)
    if missing - ADDED_COLUMNS:
        raise StoreError(f"{path} lacks the columns {sorted(missing - ADDED_COLUMNS)}")
    for column in sorted(missing):
        table = table.append_column(column, pa.nulls(table.num_rows))
    return table.select(schema.names).cast(schema)
