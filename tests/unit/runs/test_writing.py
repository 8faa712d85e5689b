"""Writes are whole or not there: full disks, folders in the way, readers that are open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import part_name


def test_write_below_a_file_fails_and_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    (tmp_path / "scores").write_text("a file, not a folder")
    with pytest.raises(StoreError, match=r"cannot write .*scores/shard-000000\.parquet"):
        directory.write_table(part_name("scores", 0), [])
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    assert (tmp_path / "scores").read_text() == "a file, not a folder"


def test_write_over_a_folder_fails_and_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    (tmp_path / "plan.parquet").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*plan\.parquet"):
        directory.write_bytes("plan.parquet", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.parquet"]
    assert list((tmp_path / "plan.parquet").iterdir()) == []


WRITE_ON_A_FULL_DISK = """
import resource, sys
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    RunDirectory(sys.argv[1]).write_bytes("plan.parquet", b"x" * 5000)
except StoreError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize("before", [None, b"old"])
def test_write_that_stops_midway_leaves_the_old_file_or_none(
    before: bytes | None, tmp_path: Path
) -> None:
    """The process may write 1000 bytes per file, so the write stops as on a full disk."""
    if before is not None:
        (tmp_path / "plan.parquet").write_bytes(before)
    done = subprocess.run(
        [sys.executable, "-c", WRITE_ON_A_FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"1 cannot write {tmp_path}/plan.parquet: ")
    assert "MiB are free there" in done.stdout
    assert done.stdout.endswith("start again\n")
    assert len(done.stdout.splitlines()) == 1
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({} if before is None else {"plan.parquet": before})


EVENTS_ON_A_FULL_DISK = """
import resource, sys
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
directory = RunDirectory(sys.argv[1])
directory.write_text("run.json", "{}")
try:
    while True:
        directory.append_event("shard_done", stage="score", shard=7)
except StoreError as error:
    print(error.exit_code, error)
"""


def test_events_on_a_full_disk_are_whole_lines_and_the_error_is_no_usage_error(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVENTS_ON_A_FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"1 cannot write {tmp_path}/events.jsonl")
    assert "MiB are free there" in line
    assert line.endswith("start again")
    text = (tmp_path / "events.jsonl").read_text()
    assert 900 < len(text) <= 1000
    assert {json.loads(event)["shard"] for event in text.splitlines()} == {7}
    assert text.endswith("}\n")


SET_ON_A_FULL_DISK = """
import resource, sys
from autoquant_ray.errors import StoreError
from autoquant_ray.runs.directory import RunDirectory
directory = RunDirectory(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with directory.together(is_new=sys.argv[2] == "new"):
        directory.write_text("run.json", "{}")
        directory.write_text("manifest.json", "new")
        directory.write_bytes("solutions/a/manifest.parquet", b"x" * 5000)
except StoreError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize("kind", ["new", "more"])
def test_set_of_files_that_does_not_fit_leaves_what_was_there(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    before = {"run.json": '{"schema_version": 1}', "manifest.json": "old"}
    for name, text in before.items():
        (run / name).write_text(text)
    words = [sys.executable, "-c", SET_ON_A_FULL_DISK, str(run), kind]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"1 cannot write {run}/run.json: ")
    assert not (run / "solutions").exists()
    assert {str(p.relative_to(run)): p.read_text() for p in run.rglob("*") if p.is_file()} == before


def test_set_of_files_is_read_inside_and_appears_at_the_end(tmp_path: Path) -> None:
    directory, other = RunDirectory(str(tmp_path)), RunDirectory(str(tmp_path))
    directory.write_text("b", "old")
    with directory.together():
        directory.write_text("a/a", "first")
        directory.append_event("run_done", quarantined=0)
        directory.write_text("b", "new")
        assert (directory.read_bytes("a/a"), directory.read_bytes("b")) == (b"first", b"new")
        assert other.read_bytes("b") == b"old"
        assert not other.exists("a/a")
        assert not other.exists("events.jsonl")
    assert (other.read_bytes("a/a"), other.read_bytes("b")) == (b"first", b"new")
    assert json.loads(other.read_bytes("events.jsonl"))["event"] == "run_done"


def test_set_of_files_is_dropped_after_an_error(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))

    def fail() -> None:
        with directory.together(is_new=True):
            directory.write_text("run.json", "{}")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    directory.write_text("run.json", "{}")
    assert directory.read_bytes("run.json") == b"{}"


def test_write_replaces_a_file_whole(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    directory.write_bytes("a/b.bin", b"long content")
    directory.write_bytes("a/b.bin", b"short")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"short"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_write_keeps_the_old_content_for_a_reader_that_is_open(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    directory.write_bytes("run.json", b"old content")
    with (tmp_path / "run.json").open("rb", buffering=0) as reader:
        directory.write_bytes("run.json", b"new")
        assert reader.read() == b"old content"


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.write_json("a.json", {"score": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_parts_ignore_other_files(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    for shard in (3, 0, 12):
        directory.write_table(part_name("scores", shard), [])
    (tmp_path / "scores" / ".shard-000001.parquet.ab12.tmp").write_bytes(b"half")
    (tmp_path / "scores" / "notes.txt").write_text("hello")
    assert directory.list_parts("scores") == [0, 3, 12]
