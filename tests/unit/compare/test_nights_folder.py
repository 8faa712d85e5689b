"""The folder of a job's nights: two at a time, retention, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from click.testing import CliRunner
from nights import JOB, Scans, folders, make_nightly, no_scan, rows

from autoquant_ray.cli.main import main
from autoquant_ray.compare.history import LOCKS, put_row, read_history
from autoquant_ray.compare.nightly import run_night
from autoquant_ray.errors import (
    ConfigError,
    StoreError,
)
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import lease


def test_second_tick_says_who_is_at_work(night: Any, tmp_path: Path) -> None:
    folder = RunDirectory(str(tmp_path / "runs"))
    with lease(folder, f"{LOCKS}/demo"):
        second = night(1, no_scan)
    assert second.exit_code == 0
    assert second.document["status"] == "held"
    assert "in use by process" in second.lines[0]
    assert rows(tmp_path) == []


def test_another_job_is_not_held(night: Any, tmp_path: Path) -> None:
    with lease(RunDirectory(str(tmp_path / "runs")), f"{LOCKS}/other"):
        assert night(1).document["status"] == "done"


def test_nights_leave_no_locks(night: Any, tmp_path: Path) -> None:
    night(1)
    assert not (tmp_path / "runs" / LOCKS).exists()
    with pytest.raises(ConfigError, match="nobody"):
        night(2, baseline="nobody")
    assert not (tmp_path / "runs" / LOCKS).exists()


def test_rows_of_two_jobs_at_once_are_both_kept(tmp_path: Path) -> None:
    folder = RunDirectory(str(tmp_path))
    names = [f"job{number}-2026-11-01" for number in range(4)]
    row = {"job": "job", "date": "2026-11-01", "status": "done", "exit_code": 0}
    threads = [
        threading.Thread(target=put_row, args=(folder, row | {"run": name})) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [night["run"] for night in read_history(folder)] == names


def test_oldest_nights_are_deleted_their_rows_stay(night: Any, tmp_path: Path) -> None:
    for day in range(1, 5):
        last = night(day, keep=2)
    assert folders(tmp_path) == ["demo-2026-11-03", "demo-2026-11-04"]
    assert last.lines[-1] == "deleted demo-2026-11-02, beyond the 2 kept"
    assert len(rows(tmp_path)) == 4


def test_baseline_and_last_good_night_are_never_deleted(
    night: Any, scans: Scans, tmp_path: Path
) -> None:
    night(1)
    night(2)
    for day in (3, 4):
        night(
            day,
            lambda config, mode: scans.run(config, mode, quarantined=True),
            keep=1,
            baseline="demo-2026-11-01",
        )
    assert folders(tmp_path) == ["demo-2026-11-01", "demo-2026-11-02", "demo-2026-11-04"]


def test_only_runs_of_the_job_are_deleted(night: Any, scans: Scans, tmp_path: Path) -> None:
    night(1)
    runs = tmp_path / "runs"
    scans(make_nightly().config(str(runs / "demo-two-2026-11-01")), "new")
    scans(make_nightly().config(str(runs / "demo-2026-11-01-copy")), "new")
    (runs / "demo-2026-10-01").mkdir()
    (runs / "demo-2026-10-01" / "notes.txt").write_text("mine")
    (runs / "demo-2026-11-01" / "notes.txt").write_text("mine")
    night(2, keep=1)
    night(3, keep=1)
    assert folders(tmp_path) == [
        "demo-2026-10-01",
        "demo-2026-11-01",
        "demo-2026-11-01-copy",
        "demo-2026-11-02",
        "demo-2026-11-03",
        "demo-two-2026-11-01",
    ]
    assert [path.name for path in (runs / "demo-2026-11-01").iterdir()] == ["notes.txt"]


def test_run_in_use_is_not_deleted(night: Any, tmp_path: Path) -> None:
    night(1)
    with lease(RunDirectory(str(tmp_path / "runs" / "demo-2026-11-01"))):
        night(2, keep=1)
        night(3, keep=1)
    assert folders(tmp_path) == ["demo-2026-11-01", "demo-2026-11-02", "demo-2026-11-03"]


@pytest.mark.parametrize("baseline", ["../other", "a/b", "..", "demo-2026-01-01"])
def test_wrong_baseline_is_refused_before_the_scan(night: Any, baseline: str) -> None:
    night(1)
    with pytest.raises(ConfigError, match="baseline"):
        night(2, no_scan, baseline=baseline)


@pytest.mark.parametrize("date", ["2026-11-1", "../2026-11-01", "2026-13-01", "today", ""])
def test_wrong_date_is_refused(scans: Scans, tmp_path: Path, date: str) -> None:
    with pytest.raises(ConfigError, match="YYYY-MM-DD"):
        run_night(make_nightly(), str(tmp_path / "runs"), scans, date=date)
    assert list(tmp_path.iterdir()) == []


def test_missing_secret_is_refused(night: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_TOKEN"):
        night(1, no_scan, secrets=["NO_SUCH_TOKEN"])


def make_foreign(runs: Path, kind: str) -> None:
    if kind == "a file":
        runs.write_text("text")
        return
    runs.mkdir()
    if kind == "foreign files":
        (runs / "photo.jpg").write_text("x")
    elif kind == "a damaged history":
        (runs / "history.parquet").write_text("x")
    elif kind == "a run":
        (runs / "run.json").write_text("{}")
    else:
        table = RunDirectory(str(runs))
        table.write_table("history.parquet", pa.Table.from_pylist([{"sample": 1, "tokens": [1]}]))


@pytest.mark.parametrize(
    "kind", ["a file", "foreign files", "a damaged history", "a foreign history", "a run"]
)
def test_foreign_folder_is_refused_and_untouched(night: Any, tmp_path: Path, kind: str) -> None:
    make_foreign(tmp_path / "runs", kind)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="runs"):
        night(1, no_scan)
    assert sorted(tmp_path.rglob("*")) == before


def test_command_refuses_another_kind_of_job(tmp_path: Path) -> None:
    path = tmp_path / "scan.yaml"
    scan = {key: value for key, value in JOB.items() if key != "kind"} | {"out": "runs/x"}
    path.write_text(yaml.safe_dump(scan))
    result = CliRunner().invoke(main, ["nightly", str(path), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert "this is a scan job" in result.stderr
