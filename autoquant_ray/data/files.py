"""Readers of files of data: each row with the place that it stands at, streamed.

Rows are what the file says: text of a CSV stays text, and an object of JSON keeps the keys that
it has. ``datasets`` infers types of columns, by which dates become timestamps, ``null`` in a CSV
becomes nothing and ``01`` becomes 1.0; so files are read here, and data sets of a hub by it.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from autoquant_ray.config.sources import FileKind
from autoquant_ray.data.forms import messages_in
from autoquant_ray.data.kinds import decoded_lines, opened
from autoquant_ray.data.rows import IMAGE_FIELDS, Row, RowReader
from autoquant_ray.errors import DataError, one_line

logger = logging.getLogger(__name__)

_BATCH_ROWS, _IMAGE_ROWS = 1024, 8


def read_file(path: Path, kind: FileKind, rows: RowReader) -> Iterator[Row]:
    """What the rows of a file hold, in its order.

    Raises:
        DataError: While iterating; it cannot be read, or a row cannot.
    """
    return _READERS[kind](path, rows)


def warn_of_json(path: Path, line: str) -> None:
    """Tell that a line of a text file is an object of JSON, which is likely not meant as text."""
    if line.lstrip().startswith("{"):
        try:
            json.loads(line)
        except ValueError:
            return
        logger.warning(
            "%s is read as plain text, but its lines look like JSON; read its rows with `read_as` "
            "json",
            path,
        )


def _read_text(path: Path, rows: RowReader) -> Iterator[Row]:
    for number, line in decoded_lines(path):
        if number == 1:
            warn_of_json(path, line)
        yield rows.read({rows.spec.text_field: line.removesuffix("\n")}, f"line {number}")


def _read_json(path: Path, rows: RowReader) -> Iterator[Row]:
    """A row per line; or a list of rows, or a single row, over all lines."""
    if is_whole(path):
        parsed = _parse_json("".join(line for _, line in decoded_lines(path)), str(path))
        listed = parsed if isinstance(parsed, list) else [parsed]
        numbered = ((f"row {number}", row) for number, row in enumerate(listed, start=1))
    else:
        numbered = (
            (f"line {number}", _parse_json(line, f"{path} line {number}"))
            for number, line in decoded_lines(path)
            if line.strip()
        )
    for number, (where, row) in enumerate(numbered):
        if number == 0:
            _require_row(row, f"{path} {where}", rows)
        yield rows.read(row, where)


def is_whole(path: Path) -> bool:
    """Whether a file of JSON is one value over all lines, which is read as a whole.

    Raises:
        DataError: It cannot be read.
    """
    first_lines = (line.strip() for _, line in decoded_lines(path))
    first = next((line for line in first_lines if line), "")
    return first == "{" or (first.startswith("[") and not messages_in(first))


def _require_row(row: Any, where: str, rows: RowReader) -> None:
    """Check that an object is a row, and does not hold all rows in a list of its own.

    Raises:
        DataError: It does.
    """
    if not isinstance(row, dict) or rows.is_readable(row):
        return
    for key, value in row.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            raise DataError(
                f"{where} is an object that holds a list under {key[:40]!r}; give that list alone "
                f"where its entries are the rows: jq '.[\"{key[:40]}\"]' FILE > ROWS.json"
            )


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        is_more = "Extra data" in str(error)
        remedy = "give a list of rows, or a row per line" if is_more else "mend it, or leave it out"
        raise DataError(f"{where} is not valid JSON: {one_line(error)}; {remedy}") from None


def _read_separated(path: Path, rows: RowReader, separator: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than Python's 128 KiB
    number = 0
    try:
        with opened(path) as stream:
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            reader = csv.reader(lines, delimiter=separator, strict=True)
            header: list[str] | None = None
            for fields in reader:
                number = reader.line_num
                if header is None:
                    header = _header(path, fields)
                elif fields:
                    if len(fields) != len(header):
                        raise DataError(
                            f"{path} line {number}: {len(fields)} fields, but {len(header)} in "
                            "the first line"
                        )
                    row = dict(zip(header, fields, strict=True))
                    yield rows.read(row, f"line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} after line {number} is not UTF-8: {one_line(error)}") from None
    except csv.Error as error:
        raise DataError(
            f"{path} after line {number} cannot be read: {one_line(error)}; in a quoted field "
            "every quote is doubled, and the field ends with a quote"
        ) from None


def _header(path: Path, fields: list[str]) -> list[str]:
    _require_single(path, fields)
    return fields


def _require_single(path: Path, columns: Sequence[str]) -> None:
    if len(set(columns)) != len(columns):
        raise DataError(f"{path} names a column twice: {', '.join(columns)[:200]}; rename either")


def _read_parquet(path: Path, rows: RowReader) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffering ahead would hold more the longer the file is.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            schema = file.schema_arrow
            _require_single(path, schema.names)
            columns = rows.columns(schema.names, lists=lists_in(schema))
            size = _BATCH_ROWS if not set(columns) & set(IMAGE_FIELDS) else _IMAGE_ROWS
            batches = file.iter_batches(size, columns=columns, use_threads=False)
            yield from _rows_of(batches, rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}") from None


def _read_arrow(path: Path, rows: RowReader) -> Iterator[Row]:
    """A file of Arrow in either of its two forms: as a stream or with a directory at its end."""
    import pyarrow

    with ExitStack() as stack:
        try:
            source = stack.enter_context(pyarrow.memory_map(str(path)))
            try:
                file = stack.enter_context(pyarrow.ipc.open_file(source))
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                file = batches = stack.enter_context(pyarrow.ipc.open_stream(source))
            _require_single(path, file.schema.names)
            columns = rows.columns(file.schema.names, lists=lists_in(file.schema))
            yield from _rows_of((batch.select(columns) for batch in batches), rows)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path} cannot be read as Arrow: {one_line(error)}") from None


def lists_in(schema: Any) -> list[str]:
    """Columns of an Arrow schema that hold lists."""
    from pyarrow import types

    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return [field.name for field in schema if any(is_kind(field.type) for is_kind in kinds)]


def _rows_of(batches: Any, rows: RowReader) -> Iterator[Row]:
    records = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(records, start=1):
        yield rows.read(row, f"row {number}", is_table=True)


_READERS: dict[FileKind, Callable[[Path, RowReader], Iterator[Row]]] = {
    "text": _read_text,
    "json": _read_json,
    "csv": lambda path, rows: _read_separated(path, rows, ","),
    "tsv": lambda path, rows: _read_separated(path, rows, "\t"),
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
