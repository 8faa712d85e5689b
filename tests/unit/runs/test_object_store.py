"""Run directories on S3: whole files, long listings, the lease, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pytest
from click.testing import CliRunner
from object_store import BUCKET, KEYS, ObjectStore
from runs_folder import put_everything

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.compare.site_page import write_site
from autoquant_ray.errors import EXIT_USAGE, HeldError, StoreError, StoreLostError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.filesystems import child_uri, open_place
from autoquant_ray.runs.lease import Claim, lease
from autoquant_ray.runs.names import LOCK, SCORES, part_name
from autoquant_ray.runs.state import require_target
from autoquant_ray.solve import solve_run

MIB = 2**20


@pytest.fixture(autouse=True)
def access_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    started = ObjectStore()
    yield started
    started.stop()


@pytest.fixture
def store(server: ObjectStore) -> Iterator[ObjectStore]:
    """The server without faults."""
    yield server
    server.gateway.fault = lambda _method, _path: None


# --- Where the server is


def test_endpoint_from_the_uri(store: ObjectStore) -> None:
    directory = RunDirectory(store.uri("uri/run"))
    path = directory.write_json("run.json", {"a": 1})
    assert store.content("uri/run/run.json") == b'{\n  "a": 1\n}\n'
    assert path == f"s3://{BUCKET}/uri/run/run.json?endpoint_override={store.url}"
    assert directory.child("b").path("c") == directory.path("b/c")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_endpoint_from_the_environment(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, store.url)
    RunDirectory(f"s3://{BUCKET}/{name}/a%20run/").write_text("report.md", "text")
    assert store.content(f"{name}/a run/report.md") == b"text"


def test_uri_wins_over_the_environment(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    RunDirectory(store.uri("wins")).write_text("report.md", "text")
    assert store.keys("wins/") == ["report.md"]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://key:hidden@bucket/run", "holds credentials; give them as AWS_ACCESS_KEY_ID"),
        ("s3://bucket/run?endpoint=http://a:1", "unknown option 'endpoint'; there are endpoint_ov"),
        ("s3:///run", "it names no bucket; write s3://BUCKET/PATH"),
        ("ftp://host/run", "Unrecognized filesystem type"),
    ],
)
def test_uri_that_cannot_be_used_is_refused(uri: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        RunDirectory(uri)
    assert "hidden" not in str(caught.value)


def test_gs_uri_gets_a_limit_of_retries() -> None:
    """Opening a gs:// place asks no server; that is all that is tested of it."""
    uri = "gs://anonymous@bucket/runs/a?scheme=http&endpoint_override=127.0.0.1:1"
    place = open_place(uri)
    assert (place.root, place.bucket) == ("bucket/runs/a", "bucket")
    limited, _ = pa.fs.FileSystem.from_uri(f"{uri}&retry_limit_seconds=20")
    unlimited, _ = pa.fs.FileSystem.from_uri(uri)
    assert place.filesystem.equals(limited)
    assert not place.filesystem.equals(unlimited)


def test_child_of_a_local_path_keeps_a_question_mark() -> None:
    assert child_uri("runs/what?", "a") == "runs/what?/a"


# --- Whole files


def test_small_file_is_one_put(store: ObjectStore) -> None:
    before = len(store.gateway.requests)
    RunDirectory(store.uri("small")).write_bytes("a", b"x" * 9 * MIB)
    assert store.gateway.requests[before:] == [("PUT", f"/{BUCKET}/small/a")]


@pytest.mark.parametrize("broken", ["partNumber=1&", "partNumber=2&", "partNumber=3&", "uploadId="])
def test_broken_upload_leaves_the_earlier_file(store: ObjectStore, broken: str) -> None:
    directory = RunDirectory(store.uri("multipart"))
    directory.write_bytes("a", b"earlier")
    is_end = broken == "uploadId="
    store.gateway.fault = lambda method, path: (
        400 if broken in path and (method == "POST") == is_end else None
    )
    with pytest.raises(StoreLostError, match="cannot write s3://bucket/multipart/a"):
        directory.write_bytes("a", b"x" * 25 * MIB)
    assert store.count("PUT", "multipart/a?partNumber=") >= 3
    assert store.content("multipart/a") == b"earlier"
    store.gateway.fault = lambda _method, _path: None
    directory.write_bytes("a", b"x" * 25 * MIB)
    assert store.content("multipart/a") == b"x" * 25 * MIB


class Interrupting:
    """A file system on which a signal always comes between opening a file and writing to it."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def open_output_stream(self, *arguments: Any, **options: Any) -> Any:
        stream = self._filesystem.open_output_stream(*arguments, **options)
        signal.raise_signal(signal.SIGUSR1)
        return stream


def test_interrupted_upload_is_whole(store: ObjectStore) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    place = open_place(store.uri("interrupted"))
    interrupting = dataclasses.replace(place, filesystem=Interrupting(place.filesystem))
    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupting.write("a", b"whole")
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert store.content("interrupted/a") == b"whole"


# --- Listings


def test_parts_beyond_one_page_are_all_listed(store: ObjectStore) -> None:
    for shard in range(1205):
        key = f"many/run/{part_name(SCORES, shard)}"
        store.client.put_object(Bucket=BUCKET, Key=key, Body=b"")
    before = len(store.gateway.requests)
    assert RunDirectory(store.uri("many/run")).list_parts(SCORES) == list(range(1205))
    assert len(store.gateway.requests) - before <= 4


def test_events_are_kept_across_writers(store: ObjectStore) -> None:
    first = RunDirectory(store.uri("events"))
    for shard in range(50):
        first.append_event("shard_done", shard=shard)
    first.append_event("stage_stopped")
    RunDirectory(store.uri("events")).append_event("stage_started")
    lines = store.content("events/events.jsonl").decode().splitlines()
    assert len(lines) == 52
    assert store.count("PUT", "/events/events.jsonl") <= 4


# --- The lease


def test_second_holder_is_refused(store: ObjectStore) -> None:
    directory = RunDirectory(store.uri("lease/two"))
    other = RunDirectory(store.uri("lease/two"))
    with lease(directory):
        assert not other.exists()
        with pytest.raises(HeldError, match=r"is in use by process \d+ on"), lease(other):
            pass
    with lease(directory) as again:
        again.require()
    assert store.keys("lease/two/") == []


def test_contenders_never_hold_it_together(store: ObjectStore) -> None:
    holders: list[int] = []
    most, entered = [0], [0]

    def contend(number: int) -> None:
        directory = RunDirectory(store.uri("lease/contended"))
        for _ in range(4):
            try:
                with lease(directory):
                    holders.append(number)
                    most[0] = max(most[0], len(holders))
                    entered[0] += 1
                    directory.list_files(LOCK)
                    holders.remove(number)
            except HeldError:
                directory.list_files(LOCK)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert entered[0] >= 1


def test_expired_claim_of_a_dead_machine_is_taken_over(store: ObjectStore) -> None:
    directory = RunDirectory(store.uri("lease/expired"))
    claim = Claim(
        id="other",
        holder="process 7 on far-away",
        machine="far-away",
        pid=7,
        process_start=0.0,
        since=time.time() - 100,
        expires=time.time() + 1.5,
    )
    directory.write_json(f"{LOCK}/other.json", vars(claim))
    with lease(directory):
        assert time.time() >= claim.expires
        assert len(store.keys(f"lease/expired/{LOCK}/")) == 1
    assert store.keys(f"lease/expired/{LOCK}/") == []


def test_lease_whose_renewal_hangs_is_lost(store: ObjectStore) -> None:
    directory = RunDirectory(store.uri("lease/hangs"))
    may_answer = threading.Event()
    with lease(directory, ttl_s=0.6) as held:
        store.gateway.fault = lambda _method, _path: 503 if may_answer.wait(60) else 400
        end = time.time() + 0.7
        while time.time() < end:
            may_answer.wait(0.05)
        with pytest.raises(HeldError, match="another process may have taken over"):
            held.require()
        store.gateway.fault = lambda _method, _path: None
        may_answer.set()


# --- Errors


def run_cli(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments)
    return done.exit_code, done.stderr.strip()


def test_missing_bucket_is_named(store: ObjectStore) -> None:
    uri = store.uri("run", bucket="not-there")
    with pytest.raises(StoreError, match=r"cannot open s3://not-there/run.*create the bucket"):
        require_target(RunDirectory(uri), "new")
    code, line = run_cli("solve", uri, "--bits", "8")
    assert (code, line.count("\n")) == (EXIT_USAGE, 0)
    assert "no bucket 'not-there'" in line


def test_missing_run_is_named(store: ObjectStore) -> None:
    code, line = run_cli("report", store.uri("nothing/here"))
    assert code == EXIT_USAGE
    said = f"error: {store.uri('nothing/here')} is not a run directory: it has no run.json; give"
    assert line.startswith(said)


def test_wrong_keys_are_said(store: ObjectStore) -> None:
    store.check_keys(after=0)
    try:
        code, line = run_cli("solve", store.uri("run"), "--bits", "8")
    finally:
        store.check_keys(after=float("inf"))
    assert (code, line.count("\n")) == (EXIT_USAGE, 0)
    assert f"s3://{BUCKET}/run" in line
    assert "check the credentials (AWS_ACCESS_KEY_ID" in line


def test_wrong_endpoint_is_said() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    uri = f"s3://{BUCKET}/run?endpoint_override=http://127.0.0.1:{port}"
    code, line = run_cli("solve", uri, "--bits", "8")
    assert (code, line.count("\n")) == (EXIT_USAGE, 0)
    assert uri.partition("?")[0] in line
    assert "check that the server runs and its address (AWS_ENDPOINT_URL" in line


def test_server_that_fails_later_leaves_a_resumable_run(store: ObjectStore) -> None:
    directory = RunDirectory(store.uri("later"))
    directory.write_text("report.md", "text")
    store.gateway.fault = lambda _method, _path: 400
    for call in (
        lambda: directory.write_text("report.md", "new"),
        lambda: directory.read_bytes("report.md"),
        lambda: directory.exists("report.md"),
        lambda: directory.list_parts(SCORES),
        lambda: directory.delete("report.md"),
        lambda: directory.append_event("stage_started"),
    ):
        with pytest.raises(StoreLostError, match="in order, start again") as caught:
            call()
        assert caught.value.exit_code == 1
    store.gateway.fault = lambda _method, _path: None
    directory.append_event("stage_stopped")
    lines = store.content("later/events.jsonl").decode().splitlines()
    assert len(lines) == 2, "the event that could not be written is written with the next one"


# --- Commands


def test_site_of_runs_in_a_bucket_is_the_local_one(store: ObjectStore, tmp_path: Path) -> None:
    local, remote = tmp_path / "runs", RunDirectory(store.uri("site/runs"))
    put_everything(local)
    for path in local.rglob("*"):
        if path.is_file():
            remote.write_bytes(str(path.relative_to(local)), path.read_bytes())
    page = Path(write_site(RunDirectory(str(local)))).read_bytes()
    for out in (None, store.uri("site/runs/index.html")):
        assert write_site(remote, out) == remote.path("index.html")
        assert remote.read_bytes("index.html") == page
    write_site(remote, str(tmp_path / "elsewhere.html"))
    assert "report.html" not in (tmp_path / "elsewhere.html").read_text(), "no link could work"


def test_overwrite_deletes_only_the_run(store: ObjectStore) -> None:
    directory = RunDirectory(store.uri("clear/run"))
    directory.write_json("run.json", {"schema_version": 1})
    directory.write_bytes(part_name(SCORES, 0), b"part")
    directory.write_bytes("notes.txt", b"not ours")
    directory.clear()
    assert store.keys("clear/run/") == ["notes.txt"]
    with pytest.raises(StoreError, match=r"it has no run.json"):
        directory.clear()


def test_solve_and_report_write_what_they_write_locally(store: ObjectStore, make_run: Any) -> None:
    local = make_run()
    remote = RunDirectory(store.uri("commands/run"))
    for name in ("run.json", "plan.parquet", "resampling.parquet", "sensitivity.parquet"):
        remote.write_bytes(name, local.read_bytes(name))
    for directory in (local, remote):
        solve_run(directory, SolveOptions(bits=6))
    code, _ = run_cli("report", remote.uri)
    assert code == 0
    names = ["manifest.parquet", "manifest.json", "report.md", "report.html"]
    for name in (f"solutions/bits-6.00/{name}" for name in names):
        assert remote.read_bytes(name) == local.read_bytes(name)
