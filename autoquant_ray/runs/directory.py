"""The run directory: file names, atomic writes, reading back.

Any path that pyarrow's file systems open works (:mod:`autoquant_ray.runs.filesystems`). Nothing is
ever unpickled.

A part is its own completion marker: it is there whole, or not at all. On a local disk a file is
written under a temporary name and renamed. An object store has no atomic rename and needs none: an
object appears when its upload ends, with all its bytes, and a driver that dies before that leaves
the object that was there before, or none. S3 (since 2020), GCS, MinIO and Ceph list and read an
object from then on, which resume and the lease rely on. A killed multipart upload (a file over 10
MiB) leaves its pieces in the bucket, invisible and charged for, until a lifecycle rule
(``AbortIncompleteMultipartUpload``) removes them. An object store cannot append either, so
``events.jsonl`` is replaced as a whole; no result needs its lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from autoquant_ray.errors import StoreError, StoreLostError
from autoquant_ray.runs.file_set import FileSet, Held
from autoquant_ray.runs.filesystems import child_uri, disk_problem, explain, open_place
from autoquant_ray.runs.names import EVENTS_FILE, LOCK, RUN_FILE, RUN_FILES, RUN_FOLDERS, part_name
from autoquant_ray.runs.parquet_bytes import Metadata, damaged, decode_table, encode_table
from autoquant_ray.runs.part_marks import marked, why_foreign
from autoquant_ray.runs.schemas import schema_of
from autoquant_ray.runs.table_rows import TableRows

SCHEMA_VERSION = 1
_FLUSH_S = 10.0
_CHANGES = ("write", "delete")
_MADE_BY = "give a folder that `autoquant-ray scan` or `import` has made"
Rows = Sequence[Mapping[str, Any]]
KEYS = ("group", "format")
"""Columns of a table of sums that repeat for every bucket."""


class RunDirectory:
    """One run's files.

    Args:
        uri: Local path, ``s3://`` or ``gs://``.

    Attributes:
        is_local: Whether the directory is on a disk of this machine.
        listener: Called with every event after it is written; None for nobody.
        held: The lease on the directory, while it is held through this object; its ``require()`` is
            called before every change.
        advice: What to do once a store that failed is in order, the end of a sentence.
        marks: Folder of parts -> fingerprint of its stage, which parts carry.

    Raises:
        StoreError: The path cannot be understood or reached.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._place = open_place(uri)
        self.is_local, self._root = self._place.is_local, self._place.root
        self._base = self._place.filesystem
        self.listener: Callable[..., None] | None = None
        self.held: Held | None = None
        self.advice = "start again"
        self.marks: dict[str, str] = {}
        self._set: FileSet | None = None
        self._was_written = False
        self._late_events: list[str] = []
        self._next_flush_s = 0.0

    def path(self, name: str) -> str:
        """Full path of a file, for people."""
        return f"{self._root}/{name}" if self.is_local else child_uri(self.uri, name)

    def child(self, name: str) -> RunDirectory:
        """A folder inside this one."""
        return RunDirectory(child_uri(self.uri, name))

    def exists(self, name: str = "") -> bool:
        """Whether a file (or, without a name, the directory with anything in it) is there."""
        if self._set is not None and (name in self._set.files or self._set.is_new):
            return name in self._set.files if name else bool(self._set.files)
        if name:
            with self._reaching("check", name):
                info = self._base.get_file_info(f"{self._root}/{name}")
            return bool(info.type != pa.fs.FileType.NotFound)
        return any(info.base_name != LOCK for info in self._list(""))

    def require_bucket(self) -> None:
        """Check that the bucket of an object store is there and may be looked into.

        Raises:
            StoreError: It is not.
        """
        with self._reaching("open", ""):
            self._place.require_bucket()

    def require_run(self) -> None:
        """Check that the directory holds a run of ours.

        Raises:
            StoreError: It does not.
        """
        if not self.exists(RUN_FILE):
            self.require_bucket()
            raise StoreError(f"{self.uri} is not a run directory: it has no {RUN_FILE}; {_MADE_BY}")
        values = self.read_json(RUN_FILE)
        if not isinstance(values, dict) or "schema_version" not in values:
            raise StoreError(f"{self.uri} is not a run directory: its {RUN_FILE} is not ours")

    def clear(self) -> None:
        """Delete the run's own files and folders; anything else in the directory stays.

        ``run.json`` goes last, so that what is left of an interrupted call is still a run.

        Raises:
            StoreError: The directory holds something else than a run.
        """
        if not self.exists():
            return
        self.require_run()
        self._require_held()
        for info in sorted(self._list(""), key=lambda info: info.base_name == RUN_FILE):
            if info.base_name in RUN_FOLDERS:
                with self._reaching("delete", info.base_name):
                    self._base.delete_dir(f"{self._root}/{info.base_name}")
            elif info.base_name in RUN_FILES:
                self.delete(info.base_name)

    def write_bytes(self, name: str, content: bytes) -> str:
        """Write a file so that readers see all of it or nothing; returns its full path."""
        if self._set is not None:
            self._set.files[name] = content
            return self.path(name)
        self._require_held()
        with self._reaching("write", name):
            self._place.write(name, content)
        self._was_written = True
        return self.path(name)

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file.

        Raises:
            StoreError: Missing or unreadable.
        """
        content = None if self._set is None else self._set.files.get(name)
        if content is None and not (self._set is not None and self._set.is_new):
            with self._reaching("read", name):
                content = self._place.read(name)
        if content is None:
            raise StoreError(f"{self.path(name)} does not exist")
        return content

    @contextmanager
    def together(self, *, is_new: bool = False) -> Iterator[None]:
        """Write a set of files: all of what is written inside appears at the end, or nothing.

        On a local disk all of them lie beside their places before the first is renamed. What is
        written is read inside; listings and :meth:`write_tables` know nothing of it.

        Args:
            is_new: The files are a new run: what is there is hidden, and cleared at the end.
        """
        if self._set is not None:
            yield
            return
        self._set = written = FileSet(is_new=is_new)
        try:
            yield
        finally:
            self._set = None
        self._require_held()
        with self._reaching("write", next(iter(written.files), "")):
            is_replaced = is_new and self.exists(RUN_FILE)
            self._place.write_all(written.files, self.clear if is_replaced else lambda: None)
        self._was_written = True
        for event, details in written.events:
            self._tell(event, details)

    def write_text(self, name: str, text: str) -> str:
        """Write a UTF-8 text file atomically; returns its full path."""
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> str:
        """Write JSON atomically; returns its full path."""
        return self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            StoreError: Missing or damaged.
        """
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise damaged(self.path(name), name, error) from None

    def write_table(self, name: str, rows: Rows | pa.Table) -> str:
        """Write a table, or rows with the columns of that file, as Parquet; returns the full path.

        A table is written as it is.
        """
        table = rows
        if not isinstance(rows, pa.Table):
            table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema_of(name))
        return self.write_bytes(name, encode_table(marked(table, name, self.marks)))

    def write_tables(self, name: str, tables: Iterable[pa.Table]) -> str:
        """Write tables with the columns of that file below each other, one in memory at a time.

        Each is a row group.
        """
        self._require_held()
        with (
            self._reaching("write", name),
            self._place.filled(name) as path,
            pq.ParquetWriter(path, schema_of(name), compression="zstd") as writer,
        ):
            for table in tables:
                if table.num_rows:
                    writer.write_table(table)
        self._was_written = True
        return self.path(name)

    def read_table(self, name: str, *, encoded: Sequence[str] = ()) -> pa.Table:
        """Read a Parquet file and check its columns.

        Args:
            name: The file.
            encoded: Columns of text to keep as numbers into a dictionary: millions of rows that
                repeat few names then take little memory and time.

        Raises:
            StoreError: Missing, damaged, or with other columns.
        """
        content = self.read_bytes(name)

        def check(metadata: Metadata) -> None:
            if reason := why_foreign(metadata, name, self.marks):
                raise StoreError(f"{self.path(name)} is {reason}")

        try:
            return decode_table(content, schema_of(name), encoded, self.path(name), check)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(self.path(name), name, error) from None

    def read_rows(self, name: str) -> TableRows:
        """Rows of a Parquet file, kept column by column.

        Raises:
            StoreError: As :meth:`read_table`.
        """
        return TableRows(self.read_table(name))

    def num_row_groups(self, name: str) -> int:
        """Into how many tables :meth:`write_tables` has written a file.

        Raises:
            StoreError: Missing or damaged.
        """
        with self._opened(name) as file:
            return int(file.num_row_groups)

    def read_row_group(self, name: str, number: int, columns: Sequence[str]) -> pa.Table:
        """Read some columns of one of the tables that :meth:`write_tables` has written.

        Raises:
            StoreError: Missing, damaged, or without the columns.
        """
        with self._opened(name) as file:
            table = file.read_row_group(number, columns=list(columns), use_threads=False)
            if missing := set(columns) - set(table.column_names):
                raise StoreError(f"{self.path(name)} lacks the columns {sorted(missing)}")
            return table.select(list(columns))

    @contextmanager
    def _opened(self, name: str) -> Iterator[pq.ParquetFile]:
        with self._reaching("read", name), self._place.opened(name) as file:
            if file is None:
                raise StoreError(f"{self.path(name)} does not exist")
            try:
                yield pq.ParquetFile(file)
            except (pa.ArrowInvalid, ValueError) as error:
                raise damaged(self.path(name), name, error) from None

    def is_intact(self, name: str) -> bool:
        """Whether a Parquet file is there and its end is whole, so that it can be opened."""
        try:
            return self.exists(name) and self.num_row_groups(name) >= 0
        except StoreError:
            return False

    def list_parts(self, folder: str) -> list[int]:
        """Numbers of the shards (or layers) that have a part in a folder, sorted."""
        names = {info.base_name for info in self._list(folder)}
        numbers = (int(name[6:-8]) for name in names if name[6:-8].isdecimal())
        return sorted(n for n in numbers if part_name(folder, n).rpartition("/")[2] in names)

    def delete(self, name: str) -> None:
        """Delete one file if it is there."""
        if self.exists(name):
            self._require_held()
            with self._reaching("delete", name), suppress(FileNotFoundError):
                self._base.delete_file(f"{self._root}/{name}")

    def list_folders(self, folder: str) -> list[str]:
        """Names of the folders inside a folder, sorted."""
        infos = self._list(folder)
        return sorted(i.base_name for i in infos if i.type == pa.fs.FileType.Directory)

    def list_files(self, folder: str) -> list[str]:
        """Names of the files inside a folder, sorted."""
        infos = self._list(folder)
        return sorted(i.base_name for i in infos if i.type == pa.fs.FileType.File)

    def delete_if_empty(self, folder: str) -> None:
        """Delete a folder that holds nothing; object stores have no folders of their own."""
        if self.is_local:
            self._place.remove_if_empty(folder)

    def append_event(self, event: str, **details: Any) -> None:
        """Add one line to ``events.jsonl`` and tell the listener. Every event of a run passes here.

        Args:
            event: One of the kinds in :mod:`autoquant_ray.runs.events`.
            details: The fields of that kind.

        An object store cannot append, so there the file is written anew: at most every 10
        seconds for the frequent ``shard_done``, which a killed driver may therefore lose.
        """
        if self._set is not None:
            self._set.events.append((event, details))
            return
        self._tell(event, details)

    def _tell(self, event: str, details: Mapping[str, Any]) -> None:
        self._write_event(event, details)
        if self.listener is not None:
            self.listener(event, **details)

    def _write_event(self, event: str, details: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **details}) + "\n"
        if not self.is_local:
            self._late_events.append(line)
            if event != "shard_done" or time.monotonic() >= self._next_flush_s:
                self._flush_events()
            return
        self._require_held()
        with self._reaching("write", EVENTS_FILE):
            self._place.append(EVENTS_FILE, line.encode())
        self._was_written = True

    def _require_held(self) -> None:
        if self.held is not None:
            self.held.require()

    def _flush_events(self) -> None:
        before = self.read_bytes(EVENTS_FILE) if self.exists(EVENTS_FILE) else b""
        self.write_bytes(EVENTS_FILE, before + "".join(self._late_events).encode())
        self._late_events.clear()
        self._next_flush_s = time.monotonic() + _FLUSH_S

    def _list(self, folder: str) -> list[Any]:
        root = f"{self._root}/{folder}".rstrip("/")
        infos: list[Any] = []
        with self._reaching("list", folder), suppress(FileNotFoundError):  # deleted meanwhile
            infos = self._base.get_file_info(pa.fs.FileSelector(root, allow_not_found=True))
        return infos

    @contextmanager
    def _reaching(self, verb: str, name: str) -> Iterator[None]:
        """Turn errors of the file system into ours, which name the file and the remedy.

        Raises:
            StoreLostError: This process wrote here before, so that a run stopped in the middle.
        """
        path = self.path(name) if name else self.uri
        try:
            yield
        except OSError as error:
            lost = disk_problem(error, path) if self.is_local and verb in _CHANGES else None
            text = lost or f"cannot {verb} {path}: {explain(error)}"
            if self._was_written:
                raise StoreLostError(
                    f"{text}; what was written before is kept: when this is in order, {self.advice}"
                ) from None
            if lost is not None:
                raise StoreLostError(f"{text}, then {self.advice}") from None
            raise StoreError(text) from None
