"""MLflow's own client reads what was logged into its store of files."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scored_run import evaluation_row, put_scored_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState
from autoquant_ray.solve import solve_run
from autoquant_ray.tracking.mlflow_runs import log_measurements, log_night, tracked

mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where runs are logged, read by MLflow's client."""
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return mlflow.MlflowClient(tracking_uri=uri)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return put_scored_run(tmp_path / "run", num_layers=1)


def record_of(run: RunDirectory) -> Any:
    return RunState.open(run).record


def runs_of(client: Any, experiment: str = "autoquant_ray") -> list[Any]:
    there = client.get_experiment_by_name(experiment)
    return list(client.search_runs([there.experiment_id]))


def files_of(client: Any, run: Any, folder: str | None = None) -> set[str]:
    return {entry.path for entry in client.list_artifacts(run.info.run_id, folder)}


def test_scan_has_its_config_solution_and_files(store: Any, run: RunDirectory) -> None:
    with tracked(run, record_of(run)):
        (begun,) = runs_of(store)
        assert begun.info.status == "RUNNING"
        solve_run(run, SolveOptions(bits=6.0), folder="")
    (logged,) = runs_of(store)
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "run")
    parameters = logged.data.params
    assert (parameters["bits"], parameters["seq_len"]) == ("6.0", "1024")
    assert parameters["model"] == "org/some-model"
    assert '"wint4_afp16"' in parameters["formats"]
    assert "bytes" not in parameters, "it has no value"
    solution = run.read_json("manifest.json")["solution"]
    metrics = logged.data.metrics
    assert metrics["predicted_kl"] == solution["predicted_kl_nats"] > 0
    assert metrics["weight_bytes"] == solution["weight_bytes"]
    assert (metrics["seconds/score"], metrics["num_quarantined"]) == (61.5, 0)
    assert logged.data.tags["versions/torch"] == "2.13.0"
    assert logged.data.tags["run_id"] == record_of(run).run_id
    assert files_of(store, logged) == {"manifest.json", "report.md", "report.html"}
    path = Path(store.download_artifacts(logged.info.run_id, "report.md"))
    assert path.read_bytes() == run.read_bytes("report.md")


def test_resumed_scan_goes_on_with_its_run(
    store: Any, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, status in ((KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")):
        with pytest.raises(error), tracked(run, record_of(run)):
            raise error
        (stopped,) = runs_of(store)
        assert stopped.info.status == status
    content = run.read_json("run.json")
    run.write_json("run.json", content | {"config": content["config"] | {"workers": 7}})
    with tracked(run, record_of(run)):
        solve_run(run, SolveOptions(bits=6.0), folder="")
    (logged,) = runs_of(store)
    assert (logged.info.run_id, logged.info.status) == (stopped.info.run_id, "FINISHED")
    assert logged.data.params["workers"] == "auto", "as it was started"
    other = put_scored_run(Path(run.uri).parent / "other", num_layers=1, run_id="another")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "nights")
    with pytest.raises(KeyError), tracked(other, record_of(other)):
        raise KeyError
    assert len(runs_of(store)) == len(runs_of(store, "nights")) == 1


def test_run_whose_name_holds_a_quote_is_logged_once(store: Any, tmp_path: Path) -> None:
    """The id of a run begins with the name of its folder."""
    run = put_scored_run(tmp_path / "it's mine", num_layers=1, run_id="it's mine-2026")
    solve_run(run, SolveOptions(bits=6.0), folder="")
    for _ in range(2):
        with tracked(run, record_of(run)):
            pass
    (logged,) = runs_of(store)
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "it's mine")


def test_measurements_and_nights_are_added_by_the_names_of_columns(
    store: Any, run: RunDirectory
) -> None:
    with tracked(run, record_of(run)):
        solve_run(run, SolveOptions(bits=6.0), folder="")
    row = evaluation_row(run, kl_mean=0.25, perplexity=12.5)
    run.write_table("evaluation.parquet", [row, row | {"name": "uniform x", "kl_mean": 9.0}])
    task = {"name": "solution", "task": "gsm8k", "metric": "exact_match", "filter": "strict-match"}
    task |= {"value": 0.5, "stderr": 0.1, "difference": -0.25}
    plain = task | {"task": "arc_easy", "metric": "acc", "filter": "none", "stderr": None}
    log_measurements(run, record_of(run), "", [row], [task, plain | {"name": "16 bits"}])
    log_measurements(run, record_of(run), "bits-4.50", [row | {"kl_mean": 0.5}], [plain])
    night = {"job": "qwen", "date": "2026-11-30", "verdict": "drift", "num_changed": 3}
    run.write_text("drift.md", "moved")
    log_night(run, record_of(run), night | {"min_spearman": None, "exit_code": 3})
    (logged,) = runs_of(store)
    metrics = logged.data.metrics
    assert (metrics["kl_mean"], metrics["perplexity"]) == (0.25, 12.5)
    assert metrics["gsm8k/exact_match/strict-match"] == 0.5
    assert metrics["gsm8k/exact_match_stderr/strict-match"] == 0.1
    assert metrics["bits-4.50/kl_mean"] == 0.5
    assert metrics["bits-4.50/arc_easy/acc_difference"] == -0.25
    assert not {"arc_easy/acc", "bits-4.50/arc_easy/acc_stderr", "min_spearman"} & set(metrics)
    assert (metrics["num_changed"], metrics["exit_code"]) == (3, 3)
    assert (logged.data.tags["verdict"], logged.data.tags["job"]) == ("drift", "qwen")
    assert {"evaluation.parquet", "drift.md"} < files_of(store, logged)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_server_that_is_down_is_a_single_warning(
    run: RunDirectory,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    with caplog.at_level(logging.WARNING), tracked(run, record_of(run)):
        solve_run(run, SolveOptions(bits=6.0), folder="")
    log_night(run, record_of(run), {})
    (warning,) = [r for r in caplog.records if "MLflow" in r.getMessage()]
    assert f"127.0.0.1:{closed_port}" in warning.getMessage()
    assert "refused" in warning.getMessage()
    assert run.exists("manifest.json")


@pytest.mark.parametrize("place", ["127.0.0.1:{port}", "127.0.0.1:many", "[::1", "[::1/x"])
def test_no_warning_has_the_password_of_an_address(
    place: str,
    run: RunDirectory,
    closed_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = f"http://somebody:pass@word@{place.format(port=closed_port)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with caplog.at_level(logging.WARNING):
        log_night(run, record_of(run), {})
    (warning,) = [r.getMessage() for r in caplog.records if "MLflow" in r.getMessage()]
    assert place.format(port=closed_port) in warning
    assert "word" not in warning
    assert "somebody" not in warning


def test_store_that_breaks_is_a_warning(
    store: Any, run: RunDirectory, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING), tracked(run, record_of(run)):
        solve_run(run, SolveOptions(bits=6.0), folder="")
        for path in sorted((tmp_path / "mlruns").rglob("meta.yaml")):
            path.write_text("{")
    assert "was not told" in caplog.text


def test_nothing_is_imported_where_the_variable_is_unset(run: RunDirectory) -> None:
    code = (
        "import sys; from autoquant_ray.runs.directory import RunDirectory\n"
        "from autoquant_ray.runs.state import RunState\n"
        "from autoquant_ray.tracking.mlflow_runs import log_night\n"
        "run = RunDirectory(sys.argv[1]); log_night(run, RunState.open(run).record, {})\n"
        "assert 'mlflow' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, run.uri], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
