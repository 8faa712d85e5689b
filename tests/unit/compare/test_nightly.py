"""A night's decisions: verdicts, nights that are started again, failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from nights import MOVED, NUM_SHARDS, Scans, make_identity, markdown, no_scan, rows

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import (
    ChangedError,
    InfeasibleBudgetError,
    WorkerError,
)
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import HISTORY_FILE
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.runs.state import Mode, RunState


def test_first_night_is_the_baseline(night: Any, tmp_path: Path) -> None:
    first = night(1)
    assert (first.exit_code, first.document["verdict"]) == (0, "baseline")
    assert markdown(tmp_path, 1).startswith("# baseline: demo, 2026-11-01")
    (row,) = rows(tmp_path)
    assert (row["job"], row["run"], row["date"]) == ("demo", "demo-2026-11-01", "2026-11-01")
    assert (row["status"], row["verdict"], row["baseline"]) == ("done", "baseline", None)
    assert (row["exit_code"], row["error"], row["num_changed"]) == (0, None, None)
    assert row["num_shards"] == NUM_SHARDS
    assert row["predicted_kl_nats"] > 0
    schema = pq.read_schema(tmp_path / "runs" / "history.parquet")
    assert schema.remove_metadata() == SCHEMAS[HISTORY_FILE]


def test_equal_second_night_is_same(night: Any, tmp_path: Path) -> None:
    night(1)
    second = night(2)
    assert (second.exit_code, second.document["verdict"]) == (0, "same")
    row = rows(tmp_path)[1]
    assert (row["baseline"], row["num_moved"], row["num_changed"]) == ("demo-2026-11-01", 0, 0)
    assert row["min_spearman"] == 1.0


def test_noisy_second_night_is_noise(night: Any, scans: Scans) -> None:
    night(1)
    second = night(2, lambda config, mode: scans.run(config, mode, seed=1))
    assert (second.exit_code, second.document["verdict"]) == (0, "noise")


def test_moved_group_is_drift_and_named(night: Any, scans: Scans, tmp_path: Path) -> None:
    night(1)
    second = night(2, lambda config, mode: scans.run(config, mode, factors={MOVED: 3.0}))
    assert second.exit_code == 3
    text = markdown(tmp_path, 2)
    assert text.startswith("# drift: demo, 2026-11-02 against demo-2026-11-01\n")
    assert "The score of 1 group moved by 10% or more and by more than error bars explain" in text
    assert f"| {MOVED} | unknown | +200% |" in text
    assert "Changed: the model." in text
    document = json.loads((tmp_path / "runs" / "demo-2026-11-02" / "drift.json").read_text())
    assert document == second.document
    assert document["comparison"]["moved"][0]["group"] == MOVED
    assert rows(tmp_path)[1]["num_moved"] == 1


def test_night_after_a_drift_is_compared_with_it(night: Any, scans: Scans) -> None:
    def changed(config: ScanConfig, mode: Mode) -> None:
        scans.run(config, mode, factors={MOVED: 3.0})

    night(1)
    night(2, changed)
    third = night(3, changed)
    assert (third.document["baseline"], third.document["verdict"]) == ("demo-2026-11-02", "same")


def test_named_baseline_is_compared_with_every_night(night: Any, scans: Scans) -> None:
    def changed(config: ScanConfig, mode: Mode) -> None:
        scans.run(config, mode, factors={MOVED: 3.0})

    night(1)
    for day in (2, 3):
        later = night(day, changed, baseline="demo-2026-11-01")
        assert (later.document["baseline"], later.exit_code) == ("demo-2026-11-01", 3)


def test_changed_menu_and_budget_compare_what_both_have(night: Any, tmp_path: Path) -> None:
    night(1)
    second = night(2, formats=["wint8_aint8", "wfp8_afp8"], bits=9)
    comparison = second.document["comparison"]
    assert list(comparison["spearman"]) == ["wint8_aint8"]
    assert {change["name"] for change in comparison["changes"]} == {"menu", "bits"}
    assert "the menu of formats, bits 7.0 -> 9.0" in markdown(tmp_path, 2)
    assert second.exit_code == 0


def test_finished_night_is_shown_and_keeps_its_one_row(
    night: Any, scans: Scans, tmp_path: Path
) -> None:
    night(1)
    first = night(2, lambda config, mode: scans.run(config, mode, factors={MOVED: 3.0}))
    before = rows(tmp_path)
    again = night(2, no_scan)
    assert (again.document, again.exit_code) == (first.document, 3)
    assert rows(tmp_path) == before


def test_finished_night_of_another_config_is_shown_and_says_so(night: Any, tmp_path: Path) -> None:
    night(1)
    night(1, no_scan, bits=9)
    assert "bits: 7.0 -> 9.0" in markdown(tmp_path, 1)


def leave_partial(config: ScanConfig, **versions: str) -> None:
    """What a killed scan leaves."""
    config = config.model_copy(update={"device": "cpu", "dtype": "float32"})
    state = RunState.start(RunDirectory(config.out), config, "new", make_identity("model"))
    state.record.versions |= versions
    state.begin()


def killed(config: ScanConfig, mode: Mode) -> None:
    leave_partial(config)
    raise KeyboardInterrupt


def test_killed_night_goes_on(night: Any, scans: Scans, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        night(1, killed)
    assert not (tmp_path / "runs" / "history.parquet").exists()
    night(1)
    assert scans.modes == ["resume"]
    assert [row["status"] for row in rows(tmp_path)] == ["done"]


def killed_with_other_packages(config: ScanConfig, _mode: Mode) -> None:
    leave_partial(config, torch="1.0")
    raise KeyboardInterrupt


def test_killed_night_of_other_packages_starts_again_and_says_so(
    night: Any, scans: Scans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "autoquant_ray.compare.nightly.parse_date", lambda date: date or "2026-11-01"
    )
    with pytest.raises(KeyboardInterrupt):
        night(1, killed_with_other_packages)
    assert night(1).exit_code == 0
    assert scans.modes == ["resume", "overwrite"]
    assert "was started with torch 1.0" in markdown(tmp_path, 1)


def test_old_night_of_other_packages_is_not_replaced(
    night: Any, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "autoquant_ray.compare.nightly.parse_date", lambda date: date or "2026-11-05"
    )
    with pytest.raises(KeyboardInterrupt):
        night(1, killed_with_other_packages)
    with pytest.raises(ChangedError, match=r"was started with torch 1\.0"):
        night(1)
    assert scans.modes == ["resume"]


def test_folder_that_a_killed_first_night_left_empty_is_ours(night: Any, tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo-2026-11-01" / ".lock").mkdir(parents=True)
    assert night(2).exit_code == 0


def test_earlier_killed_night_is_told_and_is_no_baseline(night: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        night(1, killed)
    second = night(2)
    assert second.document["verdict"] == "baseline"
    assert "demo-2026-11-01 never finished; go on with it with --date 2026-11-01" in markdown(
        tmp_path, 2
    )
    assert [(row["run"], row["status"]) for row in rows(tmp_path)] == [
        ("demo-2026-11-01", "failed"),
        ("demo-2026-11-02", "done"),
    ]


def test_quarantined_night_needs_a_look_and_is_tried_again(
    night: Any, scans: Scans, tmp_path: Path
) -> None:
    first = night(1, lambda config, mode: scans.run(config, mode, quarantined=True))
    assert (first.exit_code, first.document["status"]) == (3, "quarantined")
    assert "Shard 7 was left out" in markdown(tmp_path, 1)
    assert night(2).document["verdict"] == "baseline"
    again = night(1)
    assert scans.modes == ["resume", "resume", "resume"]
    assert (again.exit_code, again.document["status"]) == (0, "done")
    assert [row["status"] for row in rows(tmp_path)] == ["done", "done"]


@pytest.mark.parametrize(
    ("error", "status", "exit_code", "text"),
    [
        (WorkerError("every shard\nfailed"), "failed", 1, "every shard failed"),
        (InfeasibleBudgetError("too small"), "infeasible", 4, "too small"),
        (ZeroDivisionError("a bug"), "failed", 1, "ZeroDivisionError: a bug"),
    ],
)
def test_failed_scan_has_a_row(
    night: Any, tmp_path: Path, error: Exception, status: str, exit_code: int, text: str
) -> None:
    def fail(config: ScanConfig, mode: Mode) -> None:
        raise error

    with pytest.raises(type(error)):
        night(1, fail)
    (row,) = rows(tmp_path)
    assert (row["status"], row["exit_code"], row["error"]) == (status, exit_code, text)
    assert (row["verdict"], row["predicted_kl_nats"]) == (None, None)
    assert night(1).exit_code == 0
    assert [row["status"] for row in rows(tmp_path)] == ["done"]


def test_job_whose_files_have_another_path_has_not_changed(
    night: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt", "other.txt"):
        (tmp_path / name).write_text("some words\n")
    monkeypatch.chdir(tmp_path)
    night(1, data={"a": str(tmp_path / "a.txt"), "b": "b.txt"})
    shown = night(1, no_scan, data={"a": "a.txt", "b": str(tmp_path / "b.txt")})
    assert shown.document["notes"] == []
    (note,) = night(1, no_scan, data={"a": "a.txt", "b": "other.txt"}).document["notes"]
    assert "The job changed since this night was scanned (data: " in note
