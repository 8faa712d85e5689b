"""Calibration data: texts -> samples -> steps.

Texts are read in a fixed order and streamed: a text file line by line, Parquet batch by batch with
only the column that is needed, a dataset row by row. Reading ends when the caller stops asking, so
a few samples of a large file cost little. Which tokens form a sample depends on the data and the
:class:`DataSpec` alone, never on how texts were chunked or where they were tokenized.

Not here: shuffling, chat templates, images, and the distribution of the tokenization over a
cluster (:mod:`autoquant_ray.distributed.tokenization`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from autoquant_ray.errors import DataError

PYDOC_SOURCE = "pydoc"
"""Name of the text that comes with every CPython: the topics of its ``help()``."""

_FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_DOCUMENT_SEPARATOR = "\n\n"
_PARQUET_BATCH_ROWS = 1024
_MIN_SAMPLE_TOKENS = 2  # a sample of one token predicts nothing


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which calibration data is used, and how it becomes samples.

    Attributes:
        source: Path of a ``.txt`` file (one sample per line), a ``.jsonl``, ``.json`` or
            ``.parquet`` file, a dataset folder, a hub id, or ``pydoc``.
        text_field: Column that holds the text; not used for text files and ``pydoc``.
        split: Split of a dataset folder or hub id.
        num_samples: Number of samples at most.
        seq_len: Longest sample, in tokens.
        pack: Chop the running text into windows of ``seq_len`` tokens instead of taking every
            text as a sample.
    """

    source: str
    text_field: str = "text"
    split: str = "train"
    num_samples: int
    seq_len: int
    pack: bool = False


@dataclass
class DataCounts:
    """What happened to the input; texts after the last sample count nowhere.

    Attributes:
        read: Texts consumed.
        used: Samples given out; with ``pack`` these are windows.
        empty: Texts of white space only. With ``pack`` the line ends of such lines of a text
            file still belong to the running text.
        too_short: Samples skipped because they had fewer than 2 tokens.
        cut: Samples that were cut to ``seq_len``.
    """

    read: int = 0
    used: int = 0
    empty: int = 0
    too_short: int = 0
    cut: int = 0


def read_texts(spec: DataSpec) -> Iterator[str]:
    """Read the texts of a source, in its own order, empty ones included.

    Memory is bounded by the longest text, except for a ``.json`` file that holds one array, which
    is read whole. With ``pack``, the texts joined are the text to chop: lines of a text file keep
    their line end, other documents are separated by an empty line.

    Raises:
        DataError: At once for a source that does not exist or is of an unknown kind; while
            iterating for a missing ``text_field``, or a row that cannot be read or holds no text.
    """
    path = Path(spec.source).expanduser()
    if spec.source == PYDOC_SOURCE:
        documents = _read_pydoc()
    elif path.is_file():
        if path.suffix.lower() == ".txt":
            return _read_text_lines(path, keep_line_ends=spec.pack)
        documents = _file_reader(path)(path, spec)
    elif not path.is_dir() and _looks_like_path(spec.source):
        raise DataError(
            f"data source {spec.source} does not exist; give a file ({', '.join(_FILE_SUFFIXES)}), "
            f"a dataset folder, a hub id or {PYDOC_SOURCE!r}"
        )
    else:
        documents = _read_dataset(path, spec)
    return _separated(documents) if spec.pack else documents


def chunk_texts(texts: Iterator[str], chunk_size: int) -> Iterator[list[str]]:
    """Group texts into lists of ``chunk_size``; the last may be shorter."""
    while chunk := list(islice(texts, chunk_size)):
        yield chunk


def tokenize_chunk(
    tokenizer: Callable[..., Any], texts: list[str], *, pack: bool
) -> list[list[int]]:
    """Tokenize texts without padding or truncation.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        texts: Texts; an empty one gives no tokens, not even special ones.
        pack: Leave out special tokens, because a window may begin anywhere.

    Returns:
        One list of token ids per text.
    """
    filled = [text for text in texts if text]
    if not filled:
        return [[] for _ in texts]
    # verbose: a text longer than the model's context is cut or chopped later, so no warning.
    encoding = tokenizer(
        filled, add_special_tokens=not pack, return_attention_mask=False, verbose=False
    )
    token_lists = iter(encoding["input_ids"])
    return [list(next(token_lists)) if text else [] for text in texts]


class SampleAssembler:
    """Makes samples of token lists that arrive in order, until there are ``num_samples``.

    Args:
        spec: The rules: number and length of samples, packed or not.

    Attributes:
        counts: What happened to the input so far.
    """

    def __init__(self, spec: DataSpec) -> None:
        self.counts = DataCounts()
        self._spec = spec
        self._window: list[int] = []

    @property
    def is_full(self) -> bool:
        """Whether ``num_samples`` have been given out; further input is ignored."""
        return self.counts.used >= self._spec.num_samples

    def add(self, token_lists: list[list[int]], texts_empty: list[bool]) -> list[list[int]]:
        """Take the next texts.

        Args:
            token_lists: Token ids of each text.
            texts_empty: Whether each text is white space only.

        Returns:
            The samples completed by these texts, each of 2 to ``seq_len`` token ids.
        """
        samples: list[list[int]] = []
        for tokens, is_empty in zip(token_lists, texts_empty, strict=True):
            if self.is_full:
                break
            self.counts.read += 1
            self.counts.empty += is_empty
            if self._spec.pack:
                samples += self._chop(tokens)
            elif not is_empty:
                samples += self._take(tokens)
        return samples

    def finish(self) -> list[list[int]]:
        """Give out what remains: with ``pack``, the last window if it has 2 tokens or more."""
        rest, self._window = self._window, []
        return self._take(rest) if rest and not self.is_full else []

    def _chop(self, tokens: list[int]) -> list[list[int]]:
        running, seq_len = self._window + tokens, self._spec.seq_len
        num_windows = min(len(running) // seq_len, self._spec.num_samples - self.counts.used)
        self._window = running[num_windows * seq_len :]
        self.counts.used += num_windows
        return [running[i * seq_len : (i + 1) * seq_len] for i in range(num_windows)]

    def _take(self, tokens: list[int]) -> list[list[int]]:
        if len(tokens) < _MIN_SAMPLE_TOKENS:
            self.counts.too_short += 1
            return []
        self.counts.used += 1
        self.counts.cut += len(tokens) > self._spec.seq_len
        return [tokens[: self._spec.seq_len]]


def require_usable(counts: DataCounts, source: str) -> None:
    """Check that the data gave at least one sample.

    Raises:
        DataError: It gave none; the message says what became of the texts.
    """
    if counts.used == 0:
        raise DataError(
            f"data source {source} holds no usable sample: of {counts.read} texts read, "
            f"{counts.empty} are empty and {counts.too_short} have fewer than "
            f"{_MIN_SAMPLE_TOKENS} tokens; give texts of at least {_MIN_SAMPLE_TOKENS} tokens"
        )


def plan_steps(lengths: Sequence[int], step_tokens: int) -> list[list[int]]:
    """Group samples of similar length into steps, longest first.

    Args:
        lengths: Tokens of each sample.
        step_tokens: Tokens, padding included, that a step may hold. A longer sample is a step of
            its own.

    Returns:
        Positions of the samples of each step; every position occurs once.
    """
    steps: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if steps and (len(steps[-1]) + 1) * lengths[steps[-1][0]] <= step_tokens:
            steps[-1].append(position)
        else:
            steps.append([position])
    return steps


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its class name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _looks_like_path(source: str) -> bool:
    is_rooted = "/" in source and source.startswith((".", "/", "~"))
    return is_rooted or source.lower().endswith(_FILE_SUFFIXES)


def _separated(documents: Iterable[str]) -> Iterator[str]:
    separator = ""
    for document in documents:
        if document.strip():
            yield separator + document
            separator = _DOCUMENT_SEPARATOR
        else:
            yield ""


def _read_pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _file_reader(path: Path) -> Callable[[Path, DataSpec], Iterator[str]]:
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"data source {path} is of an unknown kind; give a file that ends in one of "
            f"{', '.join(_FILE_SUFFIXES)}"
        )
    return readers[path.suffix.lower()]


def _read_text_lines(path: Path, *, keep_line_ends: bool) -> Iterator[str]:
    for _, line in _decoded_lines(path):
        yield line if keep_line_ends else line.removesuffix("\n")


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


def _read_json(path: Path, spec: DataSpec) -> Iterator[str]:
    first_lines = (line.strip() for _, line in _decoded_lines(path))
    is_array = next((line for line in first_lines if line), "").startswith("[")
    if not is_array:
        return _read_json_lines(path, spec)
    rows = _parse_json("".join(line for _, line in _decoded_lines(path)), str(path))
    return (_text_of(row, spec, f"row {number}") for number, row in enumerate(rows, start=1))


def _read_json_lines(path: Path, spec: DataSpec) -> Iterator[str]:
    for number, line in _decoded_lines(path):
        if line.strip():
            row = _parse_json(line, f"{path} line {number}")
            yield _text_of(row, spec, f"line {number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {one_line(error)}") from None


def _read_parquet(path: Path, spec: DataSpec) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_field(file.schema_arrow.names, spec)
            batches = file.iter_batches(_PARQUET_BATCH_ROWS, columns=[spec.text_field])
            values = (
                value for batch in batches for value in batch.column(spec.text_field).to_pylist()
            )
            for number, value in enumerate(values, start=1):
                yield _checked_text(value, spec, f"row {number}")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {one_line(error)}") from None


def _read_dataset(path: Path, spec: DataSpec) -> Iterator[str]:
    import datasets

    failures = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError)
    try:
        dataset = _open_dataset(path, spec)
        if dataset.column_names is not None:
            _require_field(dataset.column_names, spec)
            dataset = dataset.select_columns([spec.text_field])
    except (*failures, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data source {spec.source} cannot be loaded as a dataset folder or hub id: "
            f"{one_line(error)}"
        ) from None

    def texts() -> Iterator[str]:
        try:
            for number, row in enumerate(dataset, start=1):
                yield _text_of(row, spec, f"row {number}")
        except (*failures, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data source {spec.source}: {one_line(error)}") from None

    return texts()


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


def _text_of(row: Any, spec: DataSpec, where: str) -> str:
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise DataError(f"data source {spec.source} {where} is not an object but {kind}")
    _require_field(row, spec, where)
    return _checked_text(row[spec.text_field], spec, where)


def _require_field(columns: Iterable[str], spec: DataSpec, where: str = "") -> None:
    if spec.text_field not in columns:
        place = f"{spec.source} {where}".strip()
        raise DataError(
            f"data source {place} has no field {spec.text_field!r}; it has: "
            f"{', '.join(columns) or 'none'}; name one with --text-field"
        )


def _checked_text(value: Any, spec: DataSpec, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"data source {spec.source} {where}: field {spec.text_field!r} holds "
            f"{type(value).__name__}, not text"
        )
    return value
