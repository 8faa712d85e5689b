"""Jobs on a Ray cluster: submit, follow, show and stop them through Ray's own job server.

Nothing here runs a scan; the driver on the cluster is ``autoquant-ray run``.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from autoquant_ray.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    AutoQuantError,
    ClusterError,
    ConfigError,
    TokenError,
    one_line,
)
from autoquant_ray.jobs.names import check_run_id
from autoquant_ray.jobs.package import Package, entrypoint
from autoquant_ray.jobs.server import connect
from autoquant_ray.version import VERSION

logger = logging.getLogger(__name__)

STOP_WAIT_S = 120
"""Seconds that Ray gives a stopped driver to exit before it is killed."""
_SETTLE_S = 3.0
"""Ray watches a job by its id for up to 2 s after its end; a resubmitted job has the same id."""
_POLL_S = 0.5
_OURS = "autoquant_ray"
"""Key of a job's metadata that tells our jobs from others'."""
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class JobView:
    """What the cluster reports about a job.

    Attributes:
        run_id: Also the id of Ray's submission.
        state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: Of the job; None until it is over. 130 where it was stopped.
        message: Ray's message on a job whose driver left no exit code; else empty.
        started: Seconds since the epoch.
        ended: The same; None until it is over.
    """

    run_id: str
    state: str
    exit_code: int | None
    message: str
    started: float | None
    ended: float | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _OVER

    @property
    def seconds(self) -> float | None:
        """From its start to its end."""
        if self.started is None or self.ended is None:
            return None
        return self.ended - self.started

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The outcome of a submission.

    Attributes:
        run_id: Of the job.
        outcome: ``submitted``; ``resubmitted`` after one that failed or was stopped; ``running``
            or ``finished`` where the same job was there already.
    """

    run_id: str
    outcome: Literal["submitted", "resubmitted", "running", "finished"]


class Jobs:
    """The jobs of one cluster.

    Args:
        address: ``http://HOST:8265``, of the dashboard.

    Raises:
        ConfigError: Not an address of this form.
        ClusterError: Nothing answers there, or not a Ray dashboard.
        TokenError: It requires a token, or refused the one that it got.
    """

    def __init__(self, address: str) -> None:
        self._client: JobSubmissionClient = connect(address)
        self.address = str(self._client.get_address())

    def submit(self, package: Package) -> Submission:
        """Start a job, unless the same one runs or has succeeded."""
        run_id = package.run_id
        earlier = self.find(run_id)
        if earlier is not None and earlier.state not in ("FAILED", "STOPPED"):
            return Submission(run_id=run_id, outcome="finished" if earlier.is_over else "running")
        with tempfile.TemporaryDirectory(prefix="autoquant-job-") as folder:
            package.unpack(Path(folder))
            request = _request(package, folder)
            if earlier is None:
                return self._submit_first(request)
            time.sleep(_SETTLE_S)
            with self._asking(run_id):
                self._client.delete_job(run_id)
                self._client.submit_job(**request)
        return Submission(run_id=run_id, outcome="resubmitted")

    def _submit_first(self, request: dict[str, Any]) -> Submission:
        run_id = request["submission_id"]
        try:
            with self._asking(run_id):
                self._client.submit_job(**request)
        except AutoQuantError:
            if self.find(run_id) is None:
                raise
            return Submission(run_id=run_id, outcome="running")  # another submitter was faster
        return Submission(run_id=run_id, outcome="submitted")

    def find(self, run_id: str) -> JobView | None:
        """A job; None if the cluster has none with this id."""
        with self._asking(run_id):
            try:
                return _view(self._client.get_job_info(run_id))
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def view(self, run_id: str) -> JobView:
        """A job.

        Raises:
            ConfigError: The cluster has no such job.
        """
        job = self.find(check_run_id(run_id))
        if job is None:
            raise ConfigError(
                f"{self.address} has no job {run_id!r}; 'autoquant-ray jobs list' shows its jobs"
            )
        return job

    def all(self) -> list[JobView]:
        """All jobs on the cluster that this program submitted, oldest first."""
        with self._asking():
            infos = self._client.list_jobs()
        ours = [_view(info) for info in infos if _OURS in (info.metadata or {})]
        return sorted(ours, key=lambda job: job.started or 0.0)

    def logs(self, run_id: str) -> str:
        """What a job's driver has written so far."""
        self.view(run_id)
        with self._asking(run_id):
            return str(self._client.get_job_logs(run_id))

    def follow(self, run_id: str, write: Callable[[str], None]) -> JobView:
        """Pass on a job's log as it grows, until the job is over.

        A broken connection is opened again, and the log continues where it broke off.
        """
        seen = 0
        job = self.view(run_id)
        while True:
            with self._asking(run_id):
                seen = asyncio.run(self._tail(run_id, write, seen))
            job = self.view(run_id)
            if job.is_over:
                return job
            time.sleep(_POLL_S)

    async def _tail(self, run_id: str, write: Callable[[str], None], skip: int) -> int:
        """Pass on the log after its first ``skip`` characters; returns its length so far."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(run_id):
                new = text[max(0, skip - seen) :]
                seen += len(text)
                if new:
                    write(new)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            logger.debug("the log of %s broke off: %s", run_id, error)
        return max(seen, skip)

    def stop(self, run_id: str) -> JobView:
        """Stop a job's driver and wait until it has exited; a job that is over is left alone.

        Finished shards are kept; the same job submitted again continues from them.

        Raises:
            ClusterError: It does not exit.
        """
        job = self.view(run_id)
        last = time.monotonic() + STOP_WAIT_S + 30
        while not job.is_over:
            if time.monotonic() > last:
                raise ClusterError(f"{run_id} does not stop; look at 'autoquant-ray jobs logs'")
            with self._asking(run_id):
                self._client.stop_job(run_id)
            time.sleep(_POLL_S)
            job = self.view(run_id)
        return job

    @contextmanager
    def _asking(self, run_id: str = "") -> Iterator[None]:
        """Turn what Ray raises into our errors."""
        try:
            yield
        except AuthenticationError as error:
            raise TokenError(f"{self.address} refused the request: {one_line(error)}") from None
        except (OSError, aiohttp.ClientError) as error:
            raise ClusterError(
                f"{self.address} does not answer any more ({one_line(error)}); once it is back, "
                "submit the job again: it goes on"
            ) from None
        except RuntimeError as error:
            last = (str(error).strip().splitlines() or [""])[-1]
            raise AutoQuantError(f"{self.address} failed on job {run_id}: {last[:300]}") from None


def _request(package: Package, folder: str) -> dict[str, Any]:
    """Arguments of Ray's ``submit_job``. The driver reserves nothing: the workers compute."""
    runtime_env = package.runtime_env_in(folder)
    stop_wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    return {
        "submission_id": package.run_id,
        "entrypoint": entrypoint(package.command),
        "entrypoint_num_cpus": 0,
        "entrypoint_num_gpus": 0,
        "metadata": {_OURS: VERSION, "kind": package.job.kind},
        "runtime_env": runtime_env | {"env_vars": stop_wait | runtime_env["env_vars"]},
    }


def _view(info: Any) -> JobView:
    state = str(info.status.value)
    return JobView(
        run_id=info.submission_id or info.job_id or "",
        state=state,
        exit_code=_exit_code(state, info.driver_exit_code),
        message=(info.message or "") if info.driver_exit_code is None else "",
        started=None if info.start_time is None else info.start_time / 1000,
        ended=None if info.end_time is None else info.end_time / 1000,
    )


def _exit_code(state: str, code: int | None) -> int | None:
    """The driver's exit code as a shell would report it."""
    if state not in _OVER:
        return None
    if code is None:
        return {"SUCCEEDED": EXIT_DONE, "STOPPED": EXIT_INTERRUPTED}.get(state, EXIT_FAILED)
    return code if code >= 0 else 128 - code
