"""Nights through the real command line and Ray: two of them, killed, overlapping, drifted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

MOVED = "model.layers.0.mlp.down_proj"
RUNS = ("tiny-2026-11-01", "tiny-2026-11-02", "tiny-2026-11-03")


@pytest.fixture
def model(model_folder: Any, tmp_path: Path) -> Path:
    """A copy of the small model that a test may change."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


@pytest.fixture
def job(model: Path, text_file: Path, cluster_address: str) -> dict[str, Any]:
    """What every night does; a test may change it."""
    return {
        "kind": "nightly",
        "name": "tiny",
        "model": str(model),
        "data": str(text_file),
        "formats": ["wint4_afp16:max", "wint8_aint8"],
        "disable": ["lm_head"],
        "bits": 6,
        "shard_samples": 2,
        "workers": 1,
        "address": cluster_address,
    }


@pytest.fixture
def night(job: dict[str, Any], tmp_path: Path) -> Any:
    """Arguments of the command that runs the night of a day."""

    def build(day: int, *extra: Any) -> list[Any]:
        date = f"2026-11-{day:02d}"
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return ["nightly", path, "--runs", tmp_path / "runs", "--date", date, *extra]

    return build


def history(tmp_path: Path) -> list[tuple[str, str, str, int]]:
    rows = pq.read_table(tmp_path / "runs" / "history.parquet").to_pylist()
    return [(row["run"], row["status"], row["verdict"], row["exit_code"]) for row in rows]


def triple_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[f"{MOVED}.weight"] *= 3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_nights_same_then_drift(night: Any, model: Path, tmp_path: Path, run_command: Any) -> None:
    first = run_command(*night(1))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("# baseline: tiny, 2026-11-01\n")
    second = run_command(*night(2, "--json"))
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["verdict"] == "same"
    scores = [tmp_path / "runs" / name / "sensitivity.parquet" for name in RUNS[:2]]
    assert scores[0].read_bytes() == scores[1].read_bytes()
    triple_weight(model)
    third = run_command(*night(3))
    assert third.returncode == 3, third.stderr
    assert third.stdout.startswith("# drift: tiny, 2026-11-03 against tiny-2026-11-02\n")
    moved = json.loads((tmp_path / "runs" / RUNS[2] / "drift.json").read_text())
    assert moved["comparison"]["moved"][0]["group"] == MOVED
    assert history(tmp_path) == [
        (RUNS[0], "done", "baseline", 0),
        (RUNS[1], "done", "same", 0),
        (RUNS[2], "done", "drift", 3),
    ]


def test_killed_night_goes_on_and_overlapping_tick_leaves(
    job: dict[str, Any],
    night: Any,
    watch: Any,
    tmp_path: Path,
    start_command: Any,
    run_command: Any,
    cluster_address: str,
) -> None:
    run_folder = tmp_path / "runs" / RUNS[0]
    with start_command(*night(1)) as at_work:
        locks = tmp_path / "runs" / ".locks" / "tiny"
        watch.wait_for(lambda: any(locks.glob("*.json")), at_work)
        overlapping = run_command(*night(1))
        at_work.wait()
    assert overlapping.returncode == 0, overlapping.stderr
    assert f"in use by process {at_work.pid} on " in overlapping.stdout
    assert at_work.returncode == 0
    whole = (run_folder / "sensitivity.parquet").read_bytes()

    run_folder = tmp_path / "runs" / RUNS[1]
    job["address"] = "local"  # a cluster that ends with its driver
    before = watch.kill_driver(run_folder, start_command(*night(2)), after=2)
    assert before
    assert len(history(tmp_path)) == 1
    job["address"] = cluster_address
    again = run_command(*night(2))
    assert again.returncode == 0, again.stderr
    after = watch.part_times(run_folder)
    assert {name: after[name] for name in before} == before
    assert (run_folder / "sensitivity.parquet").read_bytes() == whole
    assert history(tmp_path)[1] == (RUNS[1], "done", "same", 0)
