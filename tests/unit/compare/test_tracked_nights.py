"""A night in MLflow: numbers and verdict of its row of the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nights import MOVED, rows

mlflow = pytest.importorskip("mlflow")


def test_night_is_logged_with_its_verdict(
    night: Any, scans: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    night(1)
    night(2, scan=lambda c, m: scans.run(c, m, seed=1, factors={MOVED: 50.0}))
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("autoquant_ray")
    logged = {run.data.tags["date"]: run for run in client.search_runs([experiment.experiment_id])}
    history = {row["date"]: row for row in rows(tmp_path)}
    assert logged.keys() == history.keys()
    for date, row in history.items():
        assert logged[date].info.run_name == row["run"]
        assert logged[date].data.tags["verdict"] == row["verdict"]
        assert logged[date].data.metrics["exit_code"] == row["exit_code"]
    changed = history["2026-11-02"]
    assert logged["2026-11-02"].data.metrics["num_moved"] == changed["num_moved"] > 0
    files = client.list_artifacts(logged["2026-11-02"].info.run_id)
    assert {entry.path for entry in files} == {"drift.json", "drift.md"}
