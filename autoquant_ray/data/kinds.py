"""What kind of data a file holds, by its ending or because the user says so, and its content.

A file of a kind that is not known is refused: its braces and commas would else be calibrated on.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast, get_args

from autoquant_ray.config.sources import FileKind
from autoquant_ray.errors import DataError, one_line

ENDINGS: dict[str, FileKind] = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
"""File name ending -> kind."""

_COLUMNAR = ("parquet", "arrow")
"""Kinds that are read in parts from anywhere in the file, so that they cannot be compressed."""

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def kind_of(path: Path) -> FileKind | None:
    """The kind that a file's name says, below the ending of a compression; None if it says none."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in _COMPRESSIONS:
        kind = ENDINGS.get(endings[-2]) if len(endings) > 1 else None
        return None if kind in _COLUMNAR else kind
    return ENDINGS.get(endings[-1]) if endings else None


def require_kind(path: Path, given: FileKind | None = None) -> FileKind:
    """The kind of a file.

    Args:
        path: The file.
        given: What the user says it is.

    Raises:
        DataError: Nobody says.
    """
    kind = kind_of(path) if given is None else given
    if kind is None:
        raise DataError(
            f"data source {path} is of no kind that is known by its ending ("
            f"{' '.join(ENDINGS)}, the first seven also with {' '.join(_COMPRESSIONS)}); say what "
            f"it is with `read_as` ({', '.join(get_args(FileKind))})"
        )
    return kind


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked.

    Raises:
        DataError: It cannot be read, or is not compressed as its ending says.
    """
    ending = path.suffix.lower()
    try:
        with _open(path, ending) as stream:
            yield stream
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def _open(path: Path, ending: str) -> IO[bytes]:
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if ending == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if ending == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if ending == ".zst":
        import pyarrow

        stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return io.BufferedReader(stream)
    return path.open("rb")


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, ends included and always a line feed.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    number = 0
    try:
        with opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {number} is not UTF-8 text: {one_line(error)}") from None
