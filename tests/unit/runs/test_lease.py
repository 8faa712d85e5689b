"""The lease: one holder at a time, and none that a crash could keep."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from autoquant_ray.errors import HeldError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import Claim, lease
from autoquant_ray.runs.names import LOCK


def foreign_claim(directory: RunDirectory, *, expires: float) -> str:
    """A claim of a process on another machine."""
    claim = Claim(
        id="other",
        holder="process 7 on far-away",
        machine="far-away",
        pid=7,
        process_start=0.0,
        since=time.time() - 100,
        expires=expires,
    )
    return directory.write_json(f"{LOCK}/other.json", asdict(claim))


def test_second_holder_is_refused_and_told_who(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    mine = f"in use by process {os.getpid()} on "
    other = RunDirectory(directory.uri)
    with lease(directory), pytest.raises(HeldError, match=mine), lease(other):
        pass
    with lease(directory) as outer, lease(directory) as inner:  # the same holder
        assert inner is outer
    with lease(directory) as again:
        again.require()
    assert not (tmp_path / "run").exists()


def test_lock_alone_is_no_content(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    with lease(directory):
        assert not directory.exists()


def test_killed_holder_keeps_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from autoquant_ray.runs.lease import lease\n"
        "from autoquant_ray.runs.directory import RunDirectory\n"
        "with lease(RunDirectory(sys.argv[1]), ttl_s=600):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    directory = RunDirectory(str(tmp_path))
    with pytest.raises(HeldError, match=f"process {process.pid} on"), lease(directory):
        pass
    process.kill()
    process.wait()
    with lease(directory):
        pass


def test_living_holder_is_respected_after_a_step_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(str(tmp_path))
    with lease(directory) as held:
        booted = psutil.boot_time()  # as /proc/stat has it, it moves with the clock
        monkeypatch.setattr("psutil.boot_time", lambda: booted + 20)
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 20)
        with pytest.raises(HeldError, match="in use"), lease(RunDirectory(str(tmp_path))):
            pass
        held.require()


def test_reused_process_number_is_another_process(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    with lease(directory):
        (name,) = directory.list_files(LOCK)
        claim = directory.read_json(f"{LOCK}/{name}")
    directory.write_json(f"{LOCK}/{name}", claim | {"process_start": claim["process_start"] - 1})
    with lease(directory):
        assert name not in directory.list_files(LOCK)


@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_holder_without_its_claim_writes_no_more(tmp_path: Path, change: str) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    with lease(directory) as held:
        directory.write_text("before", "kept")
        (name,) = directory.list_files(LOCK)
        other = RunDirectory(directory.uri)
        if change == "gone":
            other.delete(f"{LOCK}/{name}")
        else:
            claim = other.read_json(f"{LOCK}/{name}")
            other.write_json(f"{LOCK}/{name}", claim | {"machine": "far-away"})
        for write in (
            held.require,
            lambda: directory.write_text("after", "lost"),
            lambda: directory.write_table("history.parquet", []),
            lambda: directory.write_tables("rounding.parquet", []),
            lambda: directory.delete("before"),
            lambda: directory.append_event("run_done", quarantined=0),
        ):
            with pytest.raises(HeldError, match="lost"):
                write()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_file()) == [
        "before"
    ]


def test_expired_claim_of_another_machine_is_taken_over(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    path = foreign_claim(directory, expires=time.time() - 1)
    with lease(directory):
        assert not Path(path).exists()


def test_waits_for_a_claim_that_nobody_renews(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    expires = time.time() + 1.5
    foreign_claim(directory, expires=expires)
    with lease(directory):
        assert time.time() >= expires


def test_renewed_claim_of_another_machine_is_respected(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    foreign_claim(directory, expires=time.time() + 60)
    renewal = threading.Timer(0.5, foreign_claim, [directory], {"expires": time.time() + 90})
    renewal.start()
    with pytest.raises(HeldError, match="process 7 on far-away"), lease(directory):
        pass
    renewal.join()


def test_holder_renews(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    pause = threading.Event()
    with lease(directory, ttl_s=6) as held:
        (name,) = directory.list_files(LOCK)
        first = directory.read_json(f"{LOCK}/{name}")["expires"]
        while directory.read_json(f"{LOCK}/{name}")["expires"] == first:
            pause.wait(0.05)
        held.require()
        assert directory.read_json(f"{LOCK}/{name}")["expires"] > first


def test_lease_that_cannot_be_renewed_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(str(tmp_path))
    before = set(threading.enumerate())
    with lease(directory, ttl_s=0.3) as held:
        (renewing,) = set(threading.enumerate()) - before
        expires = time.time() + 0.3
        monkeypatch.setattr("autoquant_ray.runs.lease.time.time", lambda: expires + 5)
        renewing.join()
        with pytest.raises(HeldError, match="lost"):
            held.require()


def contend(root: str, log: str) -> None:
    """Take the lease a few times; while holding it, note entry and exit."""
    directory = RunDirectory(root)
    for _ in range(6):
        try:
            with lease(directory), open(log, "a", encoding="utf-8") as stream:
                stream.write(f"in {os.getpid()}\n")
                stream.flush()
                time.sleep(0.02)
                stream.write(f"out {os.getpid()}\n")
                stream.flush()
        except HeldError:
            time.sleep(0.05)


def test_contenders_never_hold_it_together(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    context = get_context("fork")
    processes = [
        context.Process(target=contend, args=(str(tmp_path / "run"), str(log))) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = log.read_text().splitlines()
    assert len(lines) >= 2
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.split() == ["in", left.split()[1]]
        assert left.startswith("out")
