"""A run here is a run in MLflow: found again by its id, so that a resumed scan goes on with it.

Only the driver talks to MLflow. MLflow itself asks a server that does not answer for minutes, so it
is asked first whether anybody listens.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autoquant_ray.errors import one_line
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    DRIFT_JSON,
    DRIFT_MARKDOWN,
    EVALUATION_FILE,
    MANIFEST_JSON,
    REPORT_HTML,
    REPORT_MARKDOWN,
    TASKS_FILE,
    last_part,
    solution_folder,
)
from autoquant_ray.runs.record import RunRecord
from autoquant_ray.tracking import content

logger = logging.getLogger(__name__)

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
_EXPERIMENT = "autoquant_ray"
_RUN_ID = "run_id"
_LISTENS_S = 5.0
_PORTS = {"http": 80, "https": 443}
_LONGEST_REASON = 200
_USER = re.compile(r"(?<=://)[^/\s]*@")
"""Name and password in an address."""


@contextmanager
def tracked(directory: RunDirectory, record: RunRecord) -> Iterator[None]:
    """Log a scan: its config at once, its solution and files when the context ends well.

    Args:
        directory: The run.
        record: Its record, which the scan completes.
    """
    _with_run(directory, record, lambda run: run.start(record))
    try:
        yield
    except KeyboardInterrupt:
        _with_run(directory, record, lambda run: run.end("KILLED"))
        raise
    except BaseException:
        _with_run(directory, record, lambda run: run.end("FAILED"))
        raise

    def finish(run: _MlflowRun) -> None:
        manifest = directory.read_json(MANIFEST_JSON)
        run.add(content.solution_metrics(record, manifest))
        run.upload(directory, (MANIFEST_JSON, REPORT_MARKDOWN, REPORT_HTML))
        run.end("FINISHED")

    _with_run(directory, record, finish)


def log_measurements(
    directory: RunDirectory,
    record: RunRecord,
    solution: str,
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
) -> None:
    """Add what was measured of a solution to the run that it belongs to.

    Args:
        directory, record: The run.
        solution: Its name; '' for the scan's own.
        rows: Of ``evaluation.parquet``, the solution's and its rivals'.
        tasks: Of ``tasks.parquet``.
    """

    def add(run: _MlflowRun) -> None:
        start = solution_folder(solution)
        run.add(content.measured_metrics(solution, rows, tasks))
        reports = (f"{start}{name}" for name in (MANIFEST_JSON, REPORT_MARKDOWN, REPORT_HTML))
        run.upload(directory, (EVALUATION_FILE, TASKS_FILE, *reports))

    _with_run(directory, record, add)


def log_night(directory: RunDirectory, record: RunRecord, row: Mapping[str, Any]) -> None:
    """Add what a night found to its run.

    Args:
        directory, record: The night's run.
        row: Of ``history.parquet``.
    """

    def add(run: _MlflowRun) -> None:
        run.add(content.night_metrics(row), content.night_tags(row))
        run.upload(directory, (DRIFT_JSON, DRIFT_MARKDOWN))

    _with_run(directory, record, add)


class _MlflowRun:
    """The run in MLflow that has a run's id as a tag; made where there is none."""

    def __init__(self, client: Any, name: str, run_id: str) -> None:
        self._client = client
        experiment = os.environ.get(EXPERIMENT) or _EXPERIMENT
        there = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if there is None else there.experiment_id
        sign = '"' if "'" in run_id else "'"
        runs = client.search_runs(
            [number], f"tags.`{_RUN_ID}` = {sign}{run_id}{sign}", max_results=1
        )
        tags = {_RUN_ID: run_id}
        run = runs[0] if runs else client.create_run(number, run_name=name, tags=tags)
        self._id: str = run.info.run_id
        self._parameters: Mapping[str, str] = run.data.params

    def start(self, record: RunRecord) -> None:
        """Mark it as running, with its config; a parameter that is there stays as it was."""
        self._client.update_run(self._id, status="RUNNING")
        for name, value in content.parameters(record.config or {}).items():
            if name not in self._parameters:
                self._client.log_param(self._id, name, value)
        self.add({}, content.tags(record))

    def add(self, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None) -> None:
        """Add numbers and texts."""
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value)
        for name, text in (tags or {}).items():
            self._client.set_tag(self._id, name, text)

    def upload(self, directory: RunDirectory, names: Iterable[str]) -> None:
        """Copy files of the run that are there, in the folders that they have in it."""
        with tempfile.TemporaryDirectory(prefix="autoquant-") as folder:
            for name in names:
                if directory.exists(name):
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(directory.read_bytes(name))
                    self._client.log_artifact(self._id, str(path), name.rpartition("/")[0] or None)

    def end(self, status: str) -> None:
        """``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._client.set_terminated(self._id, status)


def _with_run(
    directory: RunDirectory, record: RunRecord, use: Callable[[_MlflowRun], None]
) -> None:
    """Do something with a run's run in MLflow, if there is an MLflow."""
    uri = os.environ.get(URI)
    if not uri or (client := _client(uri)) is None:
        return
    try:
        use(_MlflowRun(client, last_part(directory.uri), record.run_id))
    except Exception as error:  # noqa: BLE001 - a tracking server is never worth a scan
        logger.warning("MLflow at %s was not told: %s", _without_user(uri), _reason(error))


@cache
def _client(uri: str) -> Any:
    """A client; None, after one warning, where there is none or nobody listens."""
    if importlib.util.find_spec("mlflow") is None:
        logger.warning(
            "%s is set, but the package mlflow-skinny is not installed, so nothing is logged: pip "
            "install -e '.[mlflow]' in the checkout",
            URI,
        )
        return None
    try:
        place = urlsplit(uri)
        if place.scheme in _PORTS:
            port = place.port or _PORTS[place.scheme]
            socket.create_connection((place.hostname or "", port), timeout=_LISTENS_S).close()
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri)
    except Exception as error:  # noqa: BLE001 - a tracking server is never worth a scan
        logger.warning("nothing is logged to MLflow at %s: %s", _without_user(uri), _reason(error))
        return None


def _reason(error: Exception) -> str:
    """What an error says, without secrets, on a line."""
    return _without_user(one_line(error, limit=10_000))[:_LONGEST_REASON]


def _without_user(text: str) -> str:
    """A text in which no address has a name and a password."""
    return _USER.sub("", text)
