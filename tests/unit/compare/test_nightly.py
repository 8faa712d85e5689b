"""A night's decisions, with scans whose scores are made up and take no time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner

from autoquant_ray.allocate.options import solve_options
from autoquant_ray.cli.main import main
from autoquant_ray.compare.history import LOCKS, put_row, read_history
from autoquant_ray.compare.nightly import Night, run_night
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import (
    ChangedError,
    ConfigError,
    InfeasibleBudgetError,
    StoreError,
    WorkerError,
)
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.jobs.file import NightlyJob, make_job
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import lease
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.runs.state import Mode, RunState
from autoquant_ray.score.scorer import ShardScores
from autoquant_ray.score.sensitivity import SensitivitySums
from autoquant_ray.solve import solve_run

NUM_SHARDS = 8
MOVED = "model.layers.1.mlp.down_proj"


class Scans:
    """Makes runs as a scan would, remembers what it was asked for."""

    def __init__(self, make_model: Any, write_run: Any) -> None:
        self._make_model = make_model
        self._write_run = write_run
        self.modes: list[Mode] = []

    def __call__(self, config: ScanConfig, mode: Mode) -> None:
        self.run(config, mode)

    def run(
        self,
        config: ScanConfig,
        mode: Mode,
        *,
        seed: int = 0,
        factors: dict[str, float] | None = None,
        quarantined: bool = False,
    ) -> None:
        """Write a whole run; the scores of some groups are multiplied by factors."""
        self.modes.append(mode)
        config = config.model_copy(update={"device": "cpu", "dtype": "float32"})
        plan = build_plan(
            self._make_model("llama"), resolve_formats(config.formats, device="cpu"), config.disable
        )
        draw = np.random.default_rng(seed)
        scale_G = np.array([(factors or {}).get(g.name, 1.0) for g in plan.searched])
        base_GF = scale_G[:, None] * np.outer(
            1 + np.arange(len(plan.searched)), 4.0 ** -np.arange(1, 1 + len(plan.formats))
        )
        scores = [shard_scores(base_GF * draw.uniform(0.9, 1.1)) for _ in range(NUM_SHARDS)]
        identity = make_identity("changed" if factors else "model")
        directory = self._write_run(config, plan, identity, scores, mode)
        if quarantined:
            RunState.open(directory).quarantine(7, "score", "it killed three workers")
        elif mode == "resume":
            state = RunState.open(directory)
            state.values["quarantined"] = []
            state.save()
        solve_run(directory, solve_options(config), folder="")


def shard_scores(sums_GF: Any) -> ShardScores:
    zeros_GF = np.zeros_like(sums_GF)
    sums = SensitivitySums(
        elementwise_GF=sums_GF,
        token_GF=sums_GF,
        elementwise_variance_GF=zeros_GF,
        token_variance_GF=zeros_GF,
        num_rows_G=np.full(len(sums_GF), 10),
    )
    return ShardScores(sums=sums, num_tokens=50, num_samples=4, loss=1.0, seconds=0.1)


def make_identity(fingerprint: str) -> dict[str, Any]:
    counts = {"read": 8, "used": 8, "empty": 0, "too_short": 0, "cut": 0}
    return {
        "model": {"name": "llama", "fingerprint": fingerprint},
        "dataset": {
            "name": "made-up.txt",
            "max_samples": 128,
            "seq_len": 512,
            "counts": counts,
            "num_samples": 4 * NUM_SHARDS,
            "num_tokens": 54 * NUM_SHARDS,
            "num_shards": NUM_SHARDS,
        },
        "fingerprints": {"model": fingerprint, "data": "data"},
    }


@pytest.fixture
def scans(make_model: Any, write_run: Any) -> Scans:
    return Scans(make_model, write_run)


JOB = {
    "kind": "nightly",
    "name": "demo",
    "model": "llama",
    "data": "made-up.txt",
    "formats": ["wint8_aint8", "wint4_afp16"],
    "disable": ["lm_head"],
    "bits": 7,
}


def make_nightly(**changes: Any) -> NightlyJob:
    job = make_job(JOB | changes, "job.yaml")
    assert isinstance(job, NightlyJob)
    return job


@pytest.fixture
def night(tmp_path: Path, scans: Scans) -> Callable[..., Night]:
    """Run the night of a day of November 2026."""

    def run(day: int, scan: Any = scans, keep: int | None = None, **changes: Any) -> Night:
        date = f"2026-11-{day:02d}"
        return run_night(
            make_nightly(**changes), str(tmp_path / "runs"), scan, keep=keep, date=date
        )

    return run


def no_scan(config: ScanConfig, mode: Mode) -> None:
    pytest.fail("a finished night was scanned again")


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return read_history(RunDirectory(str(tmp_path / "runs")))


def markdown(tmp_path: Path, day: int) -> str:
    return (tmp_path / "runs" / f"demo-2026-11-{day:02d}" / "drift.md").read_text()


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())


# ---- the verdict of a night --------------------------------------------------------------------


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
    assert schema.remove_metadata() == SCHEMAS["history"]


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


# ---- a night that is started again -------------------------------------------------------------


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
    state.values["versions"] |= versions
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


# ---- failures ----------------------------------------------------------------------------------


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


# ---- two at a time -----------------------------------------------------------------------------


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
    assert [one["run"] for one in read_history(folder)] == names


# ---- retention ---------------------------------------------------------------------------------


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


# ---- wrong input -------------------------------------------------------------------------------


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
        table.write_table("history.parquet", "samples", [{"sample": 1, "tokens": [1]}])


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
