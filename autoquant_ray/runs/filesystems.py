"""From a URI to pyarrow's file system, with what object stores need: where the server is, timeouts
that end, an upload that is whole or not there, and errors that say what to do.

pyarrow reads S3 credentials from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_SESSION_TOKEN``), ``~/.aws`` or the machine's role; a URI that holds them is refused, since
URIs are printed and written to ``run.json``. MinIO, Ceph and the like are found by
``?endpoint_override=http://HOST:PORT`` or by ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs

from autoquant_ray.config.values import place_problem
from autoquant_ray.errors import StoreError, one_line

_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S, _ATTEMPTS = 5.0, 10.0, 5
_THREAD_START_S = 10.0
"""Of one request to S3: a refused connection is given up after about ten seconds, a server that
never answers after about one minute."""
_GS_RETRY_S = 20
_S3_OPTIONS = ("endpoint_override", "scheme", "region", "tls_ca_file_path")

_REMEDIES = (
    (("No space left on device", "Disk quota exceeded", "StorageFull"), "free space there"),
    (("File too large",), "raise the limit on the size of files (ulimit -f)"),
    (("Read-only file system",), "make it writable"),
    (("Permission denied",), "give this user the permission"),
    (("NO_SUCH_BUCKET", "NoSuchBucket"), "create the bucket, or correct its name"),
    (
        ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "InvalidAccessKey", "SIGNATURE", "TOKEN", "403"),
        "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) and "
        "what they may do in this bucket",
    ),
    (
        ("OAuth2 access token",),
        "give Google's credentials (GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth "
        "application-default login), or gs://anonymous@BUCKET for a public bucket",
    ),
    (("Unrecognized filesystem",), "use a local path, s3://BUCKET/PATH or gs://BUCKET/PATH"),
    (("Not a directory",), "give a folder"),
    (
        ("NETWORK_CONNECTION", "curlCode", "CURL error"),
        "check that the server runs and its address (AWS_ENDPOINT_URL, or ?endpoint_override= in "
        "the URI)",
    ),
)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
_DISK_MARKS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Read-only file system",
    "StorageFull",
)
"""The same from Rust, which writes safetensors, and from C++."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder of a file system.

    Attributes:
        filesystem: pyarrow's.
        root: Path of the folder inside it.
        is_local: Whether it is a disk of this machine, with rename and append.
        bucket: Bucket of an object store, '' elsewhere.
    """

    filesystem: Any
    root: str
    is_local: bool
    bucket: str

    def require_bucket(self) -> None:
        """Check that the bucket is there: a listing of a missing one is just empty.

        Raises:
            OSError: It is not, or it cannot be reached.
        """
        if not self.bucket:
            return
        if self.filesystem.get_file_info(self.bucket).type == pa.fs.FileType.NotFound:
            raise OSError(f"NO_SUCH_BUCKET: there is no bucket {self.bucket!r}")

    def read(self, name: str) -> bytes | None:
        """A whole file; None where there is none.

        Raises:
            OSError: It cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{name}", compression=None) as file:
                content: bytes = file.read()
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that readers see all of it, or what was there before.

        Raises:
            OSError: It cannot be written. After a lost answer of an object store either content
                may be there.
        """
        target = f"{self.root}/{name}"
        if not self.is_local:
            _put_object(self.filesystem, target, content)
            return
        try:
            _write_and_rename(target, content)
        except FileNotFoundError:  # another process has just deleted the empty folder
            _write_and_rename(target, content)

    def write_all(self, files: Mapping[str, bytes], clear: Callable[[], None]) -> None:
        """Write a set of files: on a local disk none takes its place before all are written.

        Args:
            files: Name -> content, in this order.
            clear: Called before the first takes its place.

        Raises:
            OSError: One cannot be written; of an object store those before it may be there.
        """
        if not self.is_local:
            clear()
            for name, content in files.items():
                self.write(name, content)
            return
        folders = {folder for name in files for folder in Path(f"{self.root}/{name}").parents}
        new = [folder for folder in folders if not folder.exists()]
        try:
            with ExitStack() as stack:
                renamed_to = {name: _Beside(f"{self.root}/{name}") for name in files}
                for name, beside in renamed_to.items():
                    stack.enter_context(beside).write_bytes(files[name])
                clear()
                for beside in renamed_to.values():
                    beside.rename()
        except BaseException:
            for folder in sorted(new, reverse=True):
                with suppress(OSError):
                    os.rmdir(folder)
            raise

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        """A file to read parts of; None where there is none.

        Raises:
            OSError: It cannot be read.
        """
        try:
            file = self.filesystem.open_input_file(f"{self.root}/{name}")
        except FileNotFoundError:
            yield None
            return
        with file:
            yield file

    @contextmanager
    def filled(self, name: str) -> Iterator[str]:
        """Path of a local file to fill, which takes its place when the context ends well.

        Its content is never in memory as a whole. Readers see all of it, or what was there before.

        Raises:
            OSError: It cannot be written.
        """
        target = f"{self.root}/{name}"
        if self.is_local:
            with _renamed_to(target) as temporary:
                yield str(temporary)
            return
        with tempfile.TemporaryDirectory(prefix="autoquant-") as folder:
            path = f"{folder}/content"
            yield path
            with pa.memory_map(path) as content:
                _put_object(self.filesystem, target, content.read_buffer())

    def append(self, name: str, line: bytes) -> None:
        """Add a line to a file of a local disk, or leave the file as it was.

        Raises:
            OSError: It cannot be written.
        """
        os.makedirs(self.root, exist_ok=True)
        path, end = f"{self.root}/{name}", None
        try:
            with open(path, "ab") as stream:
                end = stream.tell()
                stream.write(line)
        except OSError:
            if end is not None:
                with suppress(OSError):
                    os.truncate(path, end)  # no half line on a full disk
            raise

    def remove_if_empty(self, folder: str) -> None:
        """Delete a folder of a local disk that holds nothing."""
        with suppress(OSError):
            os.rmdir(f"{self.root}/{folder}".rstrip("/"))


def open_place(uri: str) -> Place:
    """Open a local path, ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``, or what else pyarrow knows.

    Raises:
        StoreError: The URI cannot be understood, holds credentials, or its server not be reached.
    """
    if (problem := place_problem(uri)) is not None:
        raise StoreError(problem)
    if "://" not in uri:
        root = str(Path(uri).expanduser().absolute())
        return Place(filesystem=pa.fs.LocalFileSystem(), root=root, is_local=True, bucket="")
    try:
        parts = urlsplit(uri)
        if parts.scheme == "s3":
            return _open_s3(uri)
        if parts.scheme in ("gs", "gcs"):
            uri = _with_default(uri, "retry_limit_seconds", str(_GS_RETRY_S))
        filesystem, root = pa.fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        shown = uri.partition("?")[0]
        raise StoreError(f"run directory {shown} cannot be opened: {explain(error)}") from None
    is_local = isinstance(filesystem, pa.fs.LocalFileSystem)
    bucket = root.partition("/")[0] if parts.scheme in ("gs", "gcs") else ""
    return Place(filesystem=filesystem, root=root, is_local=is_local, bucket=bucket)


def _open_s3(uri: str) -> Place:
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    unknown = sorted(set(options) - set(_S3_OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; there are {', '.join(_S3_OPTIONS)}")
    bucket = parts.netloc
    if not bucket:
        raise ValueError("it names no bucket; write s3://BUCKET/PATH")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if os.environ.get(name):
            options.setdefault("endpoint_override", os.environ[name])
    if "region" not in options:
        at_home = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        is_aws = "endpoint_override" not in options
        options["region"] = pa.fs.resolve_s3_region(bucket) if is_aws else at_home or "us-east-1"
    filesystem = pa.fs.S3FileSystem(
        **options,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_REQUEST_TIMEOUT_S,
        retry_strategy=pa.fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        background_writes=True,
        allow_delayed_open=True,
    )
    root = f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")
    return Place(filesystem=filesystem, root=root, is_local=False, bucket=bucket)


def child_uri(uri: str, name: str) -> str:
    """URI of something below a folder; options after ``?`` stay at the end."""
    base, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def disk_problem(error: BaseException, path: Path | str) -> str | None:
    """What is wrong with a local disk that is full, read-only or broken, with the remedy; None for
    any other error.

    Args:
        error: Of Python, or of a library that writes by itself.
        path: What was to be written.
    """
    is_of_disk = isinstance(error, OSError) and error.errno in _DISK_ERRORS
    if not is_of_disk and not any(mark in str(error) for mark in _DISK_MARKS):
        return None
    folder = next((p for p in (Path(path), *Path(path).parents) if p.exists()), Path("/"))
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free there"
    except OSError:
        free = "its free space is unknown"
    reason, remedy = _reason_and_remedy(error)
    return f"cannot write {path}: {reason} ({free}); {remedy or 'look at the disk'}"


def explain(error: BaseException) -> str:
    """An error of a file system on one line, with the remedy where it is known."""
    reason, remedy = _reason_and_remedy(error)
    return reason if remedy is None else f"{reason}; {remedy}"


def _reason_and_remedy(error: BaseException) -> tuple[str, str | None]:
    text = one_line(error, limit=220)
    for marks, remedy in _REMEDIES:
        if any(mark in str(error) for mark in marks):
            return text.rstrip("."), remedy
    return text, None


def _put_object(filesystem: Any, target: str, content: bytes | pa.Buffer) -> None:
    """Upload an object in one go.

    ``with`` would not do: leaving it by an exception closes the stream, and closing completes the
    upload of what was written so far; so does the end of a stream that nobody closed. The whole
    content is therefore given at once, by a thread that no signal can interrupt. Up to 10 MiB are
    one PUT (``allow_delayed_open``). More are a multipart upload, which a failed part leaves
    incomplete only with ``background_writes``; without them, what was uploaded becomes the object.
    """

    def upload() -> None:
        stream = filesystem.open_output_stream(target, compression=None)
        stream.write(content)
        stream.close()

    _run_to_the_end(upload)


def _run_to_the_end(work: Callable[[], None]) -> None:
    """Run in a thread, and wait for its end even if a signal comes; then that signal is raised.

    ``ThreadPoolExecutor`` forgets a thread, and does not wait for it, when the signal comes while
    the thread starts.
    """
    has_begun, has_ended = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        has_begun.set()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)
        finally:
            has_ended.set()

    try:
        threading.Thread(target=run).start()
    finally:
        if has_begun.wait(_THREAD_START_S):  # a signal may have come before there was a thread
            has_ended.wait()
    if errors:
        raise errors[0]


def _write_and_rename(target: str, content: bytes) -> None:
    with _renamed_to(target) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _renamed_to(target: str) -> Iterator[Path]:
    """A path beside a file, which takes its place when the context ends well."""
    beside = _Beside(target)
    with beside as temporary:
        yield temporary
        beside.rename()


class _Beside:
    """A path beside a file, deleted at the end of the context unless it took its place."""

    def __init__(self, target: str) -> None:
        self._target = target
        folder, _, file = target.rpartition("/")
        self._temporary = Path(f"{folder}/.{file}.{uuid.uuid4().hex[:8]}.tmp")

    def __enter__(self) -> Path:
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        return self._temporary

    def __exit__(self, *_: object) -> None:
        self._temporary.unlink(missing_ok=True)

    def rename(self) -> None:
        os.replace(self._temporary, self._target)


def _with_default(uri: str, option: str, value: str) -> str:
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    return urlunsplit(parts._replace(query=urlencode({option: value} | options)))
