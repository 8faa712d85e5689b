"""Calibration texts: read from files, datasets or ``pydoc``, in a fixed order, streamed.

A text file is read line by line, Parquet batch by batch with only the column that is needed, a
dataset row by row. Reading ends when the caller stops asking, so a few samples of a large file cost
little. Which tokens form a sample is decided in :mod:`autoquant_ray.data.cutting`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from autoquant_ray.data.conversations import Conversation
from autoquant_ray.data.rows import IMAGE_FIELDS, Row, columns_of, require_answers, row_of
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError, one_line

PYDOC_SOURCE = "pydoc"
"""Name of the text that comes with every CPython: the topics of its ``help()``."""

_FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_DOCUMENT_SEPARATOR = "\n\n"
_PARQUET_BATCH_ROWS, _IMAGE_ROWS = 1024, 8


def read_texts(spec: DataSpec) -> Iterator[str | Conversation]:
    """The texts, or conversations, of :func:`read_rows` alone."""
    return (text for text, _ in read_rows(spec))


def read_rows(spec: DataSpec) -> Iterator[Row]:
    """Read the texts or conversations of a source, in its own order or shuffled, empty ones too.

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
            f"data source {spec.source} is one running text with `pack`, `data_seed` would shuffle "
            "its lines; give JSONL or Parquet with one document per row, or leave out one of both"
        )


def _require_columns(spec: DataSpec) -> None:
    require_answers(spec)
    if spec.domain_field is not None:
        raise DataError(
            f"data source {spec.source} has no field {spec.domain_field!r}: it has no columns; "
            "give JSONL or Parquet, or name the domains with `data` NAME=SOURCE"
        )


def _looks_like_path(source: str) -> bool:
    is_rooted = "/" in source and source.startswith((".", "/", "~"))
    return is_rooted or source.lower().endswith(_FILE_SUFFIXES)


def _separated(documents: Iterable[Row]) -> Iterator[Row]:
    started: set[str] = set()
    for document, domain in documents:
        assert isinstance(document, str)  # conversations are not packed
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
    return (row_of(row, spec, f"row {number}") for number, row in enumerate(rows, start=1))


def _read_json_lines(path: Path, spec: DataSpec) -> Iterator[Row]:
    for number, line in _decoded_lines(path):
        if line.strip():
            row = _parse_json(line, f"{path} line {number}")
            yield row_of(row, spec, f"line {number}")


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
            columns = columns_of(file.schema_arrow.names, spec)
            size = _PARQUET_BATCH_ROWS if not set(columns) & set(IMAGE_FIELDS) else _IMAGE_ROWS
            batches = file.iter_batches(size, columns=columns, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield row_of(row, spec, f"row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}") from None


def _read_dataset(path: Path, spec: DataSpec) -> Iterator[Row]:
    import datasets

    failures = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError)
    try:
        dataset = _open_dataset(path, spec)
        if dataset.column_names is not None:
            dataset = dataset.select_columns(columns_of(dataset.column_names, spec))
            for name, feature in (dataset.features or {}).items():
                if isinstance(feature, datasets.Image):
                    dataset = dataset.cast_column(name, datasets.Image(decode=False))
    except (*failures, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data source {spec.source} cannot be loaded as a dataset folder or hub id: "
            f"{one_line(error)}"
        ) from None

    def rows() -> Iterator[Row]:
        try:
            for number, row in enumerate(dataset, start=1):
                yield row_of(row, spec, f"row {number}")
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


_READERS: dict[str, Callable[[Path, DataSpec], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""File name ending -> reader; any other file is read as text, line by line."""


_BUFFER_TEXTS = 10_000
_BUFFER_CHARACTERS = 2**26

Text = TypeVar("Text")
"""A text, or a text with what belongs to it."""


def shuffled(
    texts: Iterable[Text],
    seed: int | None,
    *,
    max_texts: int = _BUFFER_TEXTS,
    max_characters: int = _BUFFER_CHARACTERS,
    length: Callable[[Any], int] = len,
) -> Iterator[Text]:
    """Shuffle texts through a buffer, as ``datasets`` shuffles a stream.

    What fits the buffer is permuted as a whole. Of a longer stream, a text comes out no earlier
    than the buffer's size before its own place. Only ``random.random()`` is drawn from, the one
    generator that Python promises to keep from version to version.

    Args:
        texts: Read no further ahead than the buffer holds.
        seed: Seed of the order; None leaves it as it is.
        max_texts: Texts that the buffer holds.
        max_characters: Characters that it holds; one longer text still fits.
        length: Characters of a text.
    """
    if seed is None:
        return iter(texts)
    return _shuffled_by_seed(texts, seed, max_texts, max_characters, length)


def _shuffled_by_seed(
    texts: Iterable[Text],
    seed: int,
    max_texts: int,
    max_characters: int,
    length: Callable[[Any], int],
) -> Iterator[Text]:
    draw = random.Random(seed).random
    buffer: list[Text] = []
    num_characters = 0

    def take() -> Text:
        index = int(draw() * len(buffer))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    for text in texts:
        buffer.append(text)
        num_characters += length(text)
        while len(buffer) > max_texts or (num_characters > max_characters and len(buffer) > 1):
            taken = take()
            num_characters -= length(taken)
            yield taken
    while buffer:
        yield take()
