"""Jobs of a cluster, against a job server that is played: what a real one does too rarely."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.job_submission import JobStatus

from autoquant_ray.errors import AutoQuantError, ClusterError
from autoquant_ray.jobs import cluster as jobs
from autoquant_ray.jobs.package import make_package

SCAN = {"name": "a-scan", "model": "/m", "data": "/d.txt", "out": "/runs/r", "bits": 6}


class Info:
    """What Ray tells of a job."""

    def __init__(self, status: JobStatus, code: int | None = None, message: str = "") -> None:
        self.submission_id, self.job_id = "a-scan-0", None
        self.status, self.driver_exit_code, self.message = status, code, message
        self.start_time, self.end_time, self.metadata = 1000, None, {}


class Server:
    """A job server.

    Attributes:
        infos: Answers to one question for the job each, the last one for ever; an error is raised.
        logs: What each connection to the log hands over, in pieces; an error breaks it off.
    """

    def __init__(self, infos: list[Any], logs: list[list[Any]]) -> None:
        self.infos, self.logs = infos, logs

    def get_address(self) -> str:
        return "http://played"

    def get_job_info(self, _: str) -> Info:
        info = self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]
        if isinstance(info, Exception):
            raise info
        return info

    def submit_job(self, **_: Any) -> None:
        raise RuntimeError("Request failed with status code 500: ValueError: it already exists.")

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for piece in self.logs.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Jobs of a played server."""

    def build(infos: list[Any], logs: Any = ()) -> jobs.Jobs:
        monkeypatch.setattr(jobs, "connect", lambda _: Server(infos, list(logs)))
        return jobs.Jobs("http://played")

    return build


UNKNOWN = RuntimeError("Request failed with status code 404: Job a-scan-0 does not exist.")


def test_follow_goes_on_where_a_connection_broke(play: Any) -> None:
    running, done = Info(JobStatus.RUNNING), Info(JobStatus.SUCCEEDED, 0)
    broken = RuntimeError("closed unexpectedly")
    there = play([running, running, done], [["one\n", "tw", broken], ["one\nt", "wo\nthree\n"]])
    shown: list[str] = []
    assert there.follow("a-scan-0", shown.append).exit_code == 0
    assert "".join(shown) == "one\ntwo\nthree\n"


def test_follow_ends_when_the_cluster_is_gone(play: Any) -> None:
    gone = ConnectionRefusedError("connection refused")
    there = play([Info(JobStatus.RUNNING), gone], [["one\n", OSError("broken")]])
    with pytest.raises(ClusterError, match="submit the job again: it goes on"):
        there.follow("a-scan-0", lambda _: None)


@pytest.mark.parametrize(
    ("status", "driver", "expected"),
    [
        (JobStatus.RUNNING, None, None),
        (JobStatus.PENDING, None, None),
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, 130),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, 130, 130),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
    ],
)
def test_exit_code_is_the_drivers(
    status: JobStatus, driver: int | None, expected: int | None, play: Any
) -> None:
    assert play([Info(status, driver)]).view("a-scan-0").exit_code == expected


def test_message_is_kept_only_where_the_driver_gave_no_exit_code(play: Any) -> None:
    assert play([Info(JobStatus.FAILED, None, "no node")]).view("a-scan-0").message == "no node"
    assert play([Info(JobStatus.FAILED, 1, "log ...")]).view("a-scan-0").message == ""


def test_submit_finds_the_job_of_a_faster_submitter(play: Any) -> None:
    package = make_package(SCAN, "job.yaml", env={}, wheel=None)
    there = play([UNKNOWN, Info(JobStatus.PENDING)])
    assert there.submit(package).outcome == "running"


def test_submit_tells_why_a_cluster_refused(play: Any) -> None:
    package = make_package(SCAN, "job.yaml", env={}, wheel=None)
    with pytest.raises(AutoQuantError, match="it already exists"):
        play([UNKNOWN]).submit(package)
