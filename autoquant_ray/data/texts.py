"""Calibration texts: read from files, folders, datasets or ``pydoc``, in a fixed order, streamed.

A text file is read line by line, Parquet batch by batch with only the columns that are needed, a
dataset row by row. Reading ends when the caller stops asking, so a few samples of a large file cost
little. Which tokens form a sample is decided in :mod:`autoquant_ray.data.cutting`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from autoquant_ray.config.sources import FileKind
from autoquant_ray.data.chat_samples import refused_sample
from autoquant_ray.data.conversations import BadSample, Conversation
from autoquant_ray.data.cutting import DataCounts, require_usable
from autoquant_ray.data.files import is_whole, read_file, warn_of_json
from autoquant_ray.data.folders import read_dataset, read_folder
from autoquant_ray.data.kinds import decoded_lines, kind_of, require_kind
from autoquant_ray.data.rows import Row, RowReader, require_answers
from autoquant_ray.data.spec import DataSpec
from autoquant_ray.errors import DataError

PYDOC_SOURCE = "pydoc"
"""Name of the text that comes with every CPython: the topics of its ``help()``."""

_MOST_FIRST_ROWS = 64
_MOST_READ_TWICE = 2**25
"""Bytes of a file that can only be read as a whole."""

_DOCUMENT_SEPARATOR = "\n\n"


def read_texts(spec: DataSpec) -> Iterator[str | Conversation | BadSample]:
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
    require_source(spec.source, spec.read_as)
    path = Path(spec.source).expanduser()
    if spec.source == PYDOC_SOURCE:
        _require_columns(spec)
        documents: Iterator[Row] = ((text, "") for text in read_pydoc())
    elif path.is_file():
        kind = require_kind(path, spec.read_as)
        documents = _read_rows_of_file(path, kind, spec)
        if kind == "text":
            return _shuffled(documents, spec)
    else:
        documents = read_folder(path, spec) if path.is_dir() else read_dataset(path, spec)
    documents = _shuffled(documents, spec)
    return _separated(documents) if spec.pack else documents


def _shuffled(rows: Iterable[Row], spec: DataSpec) -> Iterator[Row]:
    return shuffled(rows, spec.shuffle_seed, length=lambda row: len(row[0]))


def require_source(source: str, read_as: FileKind | None = None) -> None:
    """Check that a source that looks like a path exists, and that a file is of a known kind.

    Args:
        source: As the user gave it.
        read_as: What the user says that it holds.

    Raises:
        DataError: It does not exist, or nobody says what it holds.
    """
    path = Path(source).expanduser()
    if _looks_like_path(source) and not path.exists():
        raise DataError(
            f"data source {source} does not exist; give a file of text, JSONL, CSV or Parquet, a "
            f"folder, a hub id or {PYDOC_SOURCE!r}"
        )
    if path.is_file() and source != PYDOC_SOURCE:
        require_kind(path, read_as)
    elif read_as is not None and not path.is_dir():
        raise DataError(f"`read_as` {read_as} is for files, which {source} is not; leave it out")


def require_rows(spec: DataSpec, *, skips_bad: bool) -> None:
    """Check a source, and where it is a file, as many of its first rows as are read in any case.

    Takes no tokenizer, and no time: a folder or a data set, whose rows take long to find, is left
    to the reading.

    Args:
        spec: What will be read.
        skips_bad: Chats that cannot be used are no error.

    Raises:
        DataError: The source does not exist; or of the first rows one cannot be read, is not what
            the options say, or all are empty.
    """
    require_source(spec.source, spec.read_as)
    path = Path(spec.source).expanduser()
    if spec.source == PYDOC_SOURCE or not path.is_file():
        return
    kind = require_kind(path, spec.read_as)
    if kind == "json" and path.stat().st_size > _MOST_READ_TWICE and is_whole(path):
        return
    most = 1 if spec.pack else min(spec.num_samples, _MOST_FIRST_ROWS)
    rows = itertools.islice(_read_rows_of_file(path, kind, spec, announces=False), most)
    contents = [content for content, _ in rows]
    for content in contents:
        if isinstance(content, BadSample) and not skips_bad:
            raise refused_sample(content.reason)
    is_all = len(contents) < most
    if is_all and not any(not isinstance(text, str) or text.strip() for text in contents):
        require_usable(DataCounts(read=len(contents), empty=len(contents)), spec.source)


def _read_rows_of_file(
    path: Path, kind: FileKind, spec: DataSpec, *, announces: bool = True
) -> Iterator[Row]:
    if kind == "text":
        _require_columns(spec)
        _require_separate_lines(spec)
        return _read_text_lines(path, keep_line_ends=spec.pack, announces=announces)
    return read_file(path, kind, RowReader(spec, announces=announces))


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
    return is_rooted or kind_of(Path(source)) is not None


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


def _read_text_lines(path: Path, *, keep_line_ends: bool, announces: bool) -> Iterator[Row]:
    for number, line in decoded_lines(path):
        if announces and number == 1:
            warn_of_json(path, line)
        yield line if keep_line_ends else line.removesuffix("\n"), ""


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
