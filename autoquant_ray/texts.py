"""Calibration texts: read from files, datasets or ``pydoc``, in a fixed order, streamed.

A text file is read line by line, Parquet batch by batch with only the column that is needed, a
dataset row by row. Reading ends when the caller stops asking, so a few samples of a large file cost
little. Which tokens form a sample is decided in :mod:`autoquant_ray.data`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant_ray.errors import DataError, one_line
from autoquant_ray.shuffling import shuffled

PYDOC_SOURCE = "pydoc"
"""Name of the text that comes with every CPython: the topics of its ``help()``."""

_FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_DOCUMENT_SEPARATOR = "\n\n"
_PARQUET_BATCH_ROWS = 1024
_DOMAIN = re.compile(r"[^,\x00-\x1f]+")
_MAX_DOMAIN_LENGTH = 64

Row = tuple[str, str]
"""A text and its domain."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which calibration data is used, and how it becomes samples.

    Attributes:
        source: Path of a text file (one sample per line), a ``.jsonl``, ``.json`` or
            ``.parquet`` file, a dataset folder, a hub id, or ``pydoc``.
        text_field: Column that holds the text; not used for text files and ``pydoc``.
        split: Split of a dataset folder or hub id.
        num_samples: Number of samples at most.
        seq_len: Longest sample, in tokens.
        pack: Chop the running text into windows of ``seq_len`` tokens instead of taking every
            text as a sample.
        shuffle_seed: Seed of the texts' order; None keeps the source's own.
        domain_field: Column that holds each text's domain; None where the source is one.
    """

    source: str
    text_field: str = "text"
    split: str = "train"
    num_samples: int
    seq_len: int
    pack: bool = False
    shuffle_seed: int | None = None
    domain_field: str | None = None


def read_texts(spec: DataSpec) -> Iterator[str]:
    """The texts of :func:`read_rows` alone."""
    return (text for text, _ in read_rows(spec))


def read_rows(spec: DataSpec) -> Iterator[Row]:
    """Read the texts of a source, in its own order or shuffled, empty ones included.

    Memory is bounded by the longest text, except for a ``.json`` file that holds one array, which
    is read whole. With ``pack``, the texts joined are the text to chop: lines of a text file keep
    their line end, other documents are separated by an empty line, within each domain.

    Yields:
        Each text with its domain, '' without a ``domain_field``.

    Raises:
        DataError: At once for a source that does not exist, is of an unknown kind or has no
            columns for ``domain_field``, or a packed text file that is to be shuffled: its lines
            are one running text; while iterating for a missing ``text_field``, or a row that
            cannot be read or holds no text or domain.
    """
    require_source(spec.source)
    path = Path(spec.source).expanduser()
    if spec.source == PYDOC_SOURCE:
        _require_columns(spec)
        documents: Iterator[Row] = ((text, "") for text in read_pydoc())
    elif path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            _require_columns(spec)
            _require_separate_lines(spec)
            return _shuffled(_read_text_lines(path, keep_line_ends=spec.pack), spec)
        documents = reader(path, spec)
    else:
        documents = _read_dataset(path, spec)
    documents = _shuffled(documents, spec)
    return _separated(documents) if spec.pack else documents


def _shuffled(rows: Iterable[Row], spec: DataSpec) -> Iterator[Row]:
    return shuffled(rows, spec.shuffle_seed, length=lambda row: len(row[0]))


def require_source(source: str) -> None:
    """Check that a source that looks like a path exists.

    Raises:
        DataError: It does not.
    """
    if _looks_like_path(source) and not Path(source).expanduser().exists():
        raise DataError(
            f"data source {source} does not exist; give a text, JSONL or Parquet file, a "
            f"dataset folder, a hub id or {PYDOC_SOURCE!r}"
        )


def _require_separate_lines(spec: DataSpec) -> None:
    if spec.pack and spec.shuffle_seed is not None:
        raise DataError(
            f"data source {spec.source} is one running text with --pack, --data-seed would shuffle "
            "its lines; give JSONL or Parquet with one document per row, or leave out one of both"
        )


def _require_columns(spec: DataSpec) -> None:
    if spec.domain_field is not None:
        raise DataError(
            f"data source {spec.source} has no field {spec.domain_field!r}: it has no columns; "
            "give JSONL or Parquet, or name the domains with --data NAME=SOURCE"
        )


def _looks_like_path(source: str) -> bool:
    is_rooted = "/" in source and source.startswith((".", "/", "~"))
    return is_rooted or source.lower().endswith(_FILE_SUFFIXES)


def _separated(documents: Iterable[Row]) -> Iterator[Row]:
    started: set[str] = set()
    for document, domain in documents:
        if document.strip():
            yield (_DOCUMENT_SEPARATOR if domain in started else "") + document, domain
            started.add(domain)
        else:
            yield "", domain


def read_pydoc() -> Iterator[str]:
    """The topics of Python's own ``help()``, in the order of their names."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _read_text_lines(path: Path, *, keep_line_ends: bool) -> Iterator[Row]:
    for _, line in _decoded_lines(path):
        yield line if keep_line_ends else line.removesuffix("\n"), ""


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {number} is not UTF-8 text: {one_line(error)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def _read_json(path: Path, spec: DataSpec) -> Iterator[Row]:
    first_lines = (line.strip() for _, line in _decoded_lines(path))
    is_array = next((line for line in first_lines if line), "").startswith("[")
    if not is_array:
        return _read_json_lines(path, spec)
    rows = _parse_json("".join(line for _, line in _decoded_lines(path)), str(path))
    return (_row_of(row, spec, f"row {number}") for number, row in enumerate(rows, start=1))


def _read_json_lines(path: Path, spec: DataSpec) -> Iterator[Row]:
    for number, line in _decoded_lines(path):
        if line.strip():
            row = _parse_json(line, f"{path} line {number}")
            yield _row_of(row, spec, f"line {number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {one_line(error)}") from None


def _read_parquet(path: Path, spec: DataSpec) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffering ahead would hold more the longer the file is.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            columns = _columns(file.schema_arrow.names, spec)
            batches = file.iter_batches(_PARQUET_BATCH_ROWS, columns=columns, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield _row_of(row, spec, f"row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}") from None


def _read_dataset(path: Path, spec: DataSpec) -> Iterator[Row]:
    import datasets

    failures = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError)
    try:
        dataset = _open_dataset(path, spec)
        if dataset.column_names is not None:
            dataset = dataset.select_columns(_columns(dataset.column_names, spec))
    except (*failures, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data source {spec.source} cannot be loaded as a dataset folder or hub id: "
            f"{one_line(error)}"
        ) from None

    def rows() -> Iterator[Row]:
        try:
            for number, row in enumerate(dataset, start=1):
                yield _row_of(row, spec, f"row {number}")
        except (*failures, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data source {spec.source}: {one_line(error)}") from None

    return rows()


def _open_dataset(path: Path, spec: DataSpec) -> Any:
    import datasets

    if (path / "state.json").is_file():
        return datasets.load_from_disk(path)
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        if spec.split not in splits:
            raise ValueError(f"it has no split {spec.split!r}; splits: {', '.join(splits)}")
        return splits[spec.split]
    name = str(path) if path.is_dir() else spec.source
    return datasets.load_dataset(name, split=spec.split, streaming=True)


def _row_of(row: Any, spec: DataSpec, where: str) -> Row:
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise DataError(f"data source {spec.source} {where} is not an object but {kind}")
    _columns(row, spec, where)
    text = _checked_text(row[spec.text_field], spec.text_field, spec, where)
    if spec.domain_field is None:
        return text, ""
    domain = _checked_text(row[spec.domain_field], spec.domain_field, spec, where).strip()
    if not domain or len(domain) > _MAX_DOMAIN_LENGTH or not _DOMAIN.fullmatch(domain):
        raise DataError(
            f"data source {spec.source} {where}: field {spec.domain_field!r} holds "
            f"{domain[:80]!r}, which is no domain: give 1 to {_MAX_DOMAIN_LENGTH} characters "
            "without commas"
        )
    return text, domain


def _columns(columns: Iterable[str], spec: DataSpec, where: str = "") -> list[str]:
    """The columns that are read; checks that they are there."""
    wanted = {"--text-field": spec.text_field, "--domain-field": spec.domain_field}
    for flag, field in wanted.items():
        if field is not None and field not in columns:
            place = f"{spec.source} {where}".strip()
            raise DataError(
                f"data source {place} has no field {field!r}; it has: "
                f"{', '.join(columns) or 'none'}; name one with {flag}"
            )
    return list(dict.fromkeys(field for field in wanted.values() if field is not None))


def _checked_text(value: Any, field: str, spec: DataSpec, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"data source {spec.source} {where}: field {field!r} holds "
            f"{type(value).__name__}, not text"
        )
    return value


_READERS: dict[str, Callable[[Path, DataSpec], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""File name ending -> reader; any other file is read as text, line by line."""
