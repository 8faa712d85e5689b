"""Job files in place, and through the job server of a real head node with token authentication."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import autoquant_ray
from autoquant_ray.jobs.file import make_job

SECRET_NAME, SECRET = "AUTOQUANT_TEST_SECRET", "never-to-be-seen"
SCAN = {"formats": ["wint4_afp16:max", "wint8_aint8"], "bits": 8, "shard_samples": 2, "workers": 1}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A head node with token authentication, and the command line as its user runs it.

    Attributes:
        address: Of its dashboard.
        token: The right one.
        env: Environment of a user whose home has the token.
    """

    address: str
    token: str
    env: dict[str, str]

    def run(self, *arguments: Any, **env: str | None) -> subprocess.CompletedProcess[str]:
        """Run a command against the cluster; keywords set variables, None unsets one."""
        changed = {name: value for name, value in (self.env | env).items() if value is not None}
        return subprocess.run(
            self.arguments(*arguments), capture_output=True, text=True, env=changed
        )

    def arguments(self, *arguments: Any) -> list[str]:
        """Arguments of a process that runs a command against the cluster."""
        words = [*(str(argument) for argument in arguments), "--address", self.address]
        return [sys.executable, "-m", "autoquant_ray", *words]

    def info(self, run_id: str) -> str:
        """What Ray's dashboard tells of a job, as text."""
        request = urllib.request.Request(f"{self.address}/api/jobs/{run_id}")
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request) as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Start a head node with own ports, own folder, and a token in an own home."""
    port = free_port()
    folders = [
        tempfile.mkdtemp(prefix="aq", dir="/tmp") for _ in range(2)
    ]  # a socket's path is short
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "HOME": folders[0],
        "RAY_TMPDIR": folders[1],
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(autoquant_ray.__file__).parents[1]),
    }
    options = {
        "port": 0,
        "dashboard-port": port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "object-store-memory": 150 * 2**20,
        "include-dashboard": "true",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    ray = str(Path(sys.executable).parent / "ray")
    token = subprocess.check_output([ray, "get-auth-token", "--generate"], env=env, text=True)
    with subprocess.Popen(
        [ray, "start", "--head", "--block", *words],
        env=env | {SECRET_NAME: SECRET},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any("--block" in line for line in process.stdout), "ray start failed"
        yield Head(f"http://127.0.0.1:{port}", token, env)
        process.terminate()
        process.wait()


@pytest.fixture
def job(tmp_path: Path, model_folder: Any, text_file: Path) -> Any:
    """Content of a job that scans a small model into ``run``; keywords replace values."""

    def build(**changes: Any) -> dict[str, Any]:
        paths = {"model": str(model_folder("llama")), "data": str(text_file)}
        return SCAN | paths | {"name": "small", "out": str(tmp_path / "run")} | changes

    return build


@pytest.fixture(scope="module")
def expected(run_command: Any, scan_arguments: Any, tmp_path_factory: Any) -> bytes:
    """``sensitivity.parquet`` of the same scan in place."""
    run = tmp_path_factory.mktemp("expected") / "run"
    done = run_command(*scan_arguments(run, "--workers", 1))
    assert done.returncode == 0, done.stderr
    return (run / "sensitivity.parquet").read_bytes()


def one_line(done: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """The line with which a command refused; its exit code is checked."""
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_submit_gives_the_bytes_of_a_scan_and_interprets_nothing(
    head: Head, job: Any, job_file: Any, tmp_path: Path, model_folder: Any, expected: bytes
) -> None:
    model = Path(f"{tmp_path}/m'\"; touch {tmp_path}/pwned; $(touch {tmp_path}/pwned)")
    model.parent.mkdir(parents=True)
    model.symlink_to(model_folder("llama"))
    out = Path(f"{tmp_path}/r'\"; touch {tmp_path}/pwned")
    values = job(model=str(model), out=str(out), secrets=[SECRET_NAME], address="local")
    path, run_id = job_file(values), make_job(values, "").run_id
    done = head.run("submit", path, "--follow", "--env", "COLOUR=blue green")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "effective bits" in done.stdout
    assert done.stderr == f"{run_id}: submitted\n"
    assert (out / "sensitivity.parquet").read_bytes() == expected
    assert not (tmp_path / "pwned").exists()
    noted = json.loads((out / "run.json").read_text())
    assert (noted["run_id"], noted["config"]["address"]) == (run_id, "auto")
    info = head.info(run_id)
    assert SECRET not in info
    assert "blue green" in info
    assert "pwned" not in info

    again = head.run("submit", path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"{run_id}: has finished already\n")
    listed = json.loads(head.run("jobs", "list", "--json").stdout)
    assert [(view["run_id"], view["exit_code"]) for view in listed] == [(run_id, 0)]
    assert f"{run_id}: SUCCEEDED, exit code 0" in head.run("jobs", "status", run_id).stdout
    assert "effective bits" in head.run("jobs", "logs", run_id).stdout


def test_stopped_job_goes_on_when_it_is_submitted_again(
    head: Head, job: Any, job_file: Any, tmp_path: Path, watch: Any, expected: bytes
) -> None:
    path, run = job_file(job()), tmp_path / "run"
    run_id = make_job(job(), "").run_id
    with subprocess.Popen(
        head.arguments("submit", path, "--follow"),
        env=head.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as follower:
        watch.wait_for(lambda: len(watch.scored(run)) >= 2, follower)
        worker = watch.events(run, "worker_ready")[0]["pid"]
        os.kill(worker, signal.SIGSTOP)  # the job cannot end before it is stopped
        follower.send_signal(signal.SIGINT)
        _, stderr = follower.communicate()
    assert follower.returncode == 130
    stop = rf"{run_id} runs on; stop it with: \S+ -m autoquant_ray jobs stop {run_id} --address"
    assert re.search(stop, stderr), stderr
    assert f"{run_id}: is there already and runs" in head.run("submit", path).stdout

    with subprocess.Popen(head.arguments("jobs", "stop", run_id), env=head.env) as stop:
        watch.wait_for(lambda: bool(watch.events(run, "stop_requested")), stop)
        os.kill(worker, signal.SIGCONT)  # the driver waits for the shard in flight
        assert stop.wait() == 0
    assert f"{run_id}: STOPPED, exit code 130" in head.run("jobs", "status", run_id).stdout
    assert not (run / "sensitivity.parquet").exists()
    before = watch.part_times(run)
    assert 2 <= len(before) < 6

    again = head.run("submit", path, "--follow")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{run_id}: submitted again" in again.stderr
    assert (run / "sensitivity.parquet").read_bytes() == expected
    assert before.items() <= watch.part_times(run).items()
    assert json.loads((run / "run.json").read_text())["run_id"] == run_id


def test_submit_ends_with_the_exit_code_of_an_infeasible_job(
    head: Head, job: Any, job_file: Any
) -> None:
    done = head.run("submit", job_file(job(bits=1)), "--follow")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "error: " in done.stdout


def test_submit_ends_with_2_where_the_cluster_lacks_a_secret(
    head: Head, job: Any, job_file: Any, tmp_path: Path
) -> None:
    path = job_file(job(secrets=["NOT_THERE"]))
    done = head.run("submit", path, "--follow", NOT_THERE="set here only")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "job small needs the environment variable NOT_THERE" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refused the token"),
        ({"HOME": "/no/such/home"}, "wants a token"),
        ({"RAY_AUTH_MODE": None}, "wants a token"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["submit", "list"])
def test_cluster_is_closed_without_its_token(
    command: str, env: dict[str, Any], reason: str, head: Head, job: Any, job_file: Any
) -> None:
    words = ["submit", job_file(job())] if command == "submit" else ["jobs", "list"]
    line = one_line(head.run(*words, **env), 1)
    assert reason in line
    assert "RAY_AUTH_TOKEN" in line


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_jobs_refuses_a_job_that_the_cluster_does_not_know(command: str, head: Head) -> None:
    line = one_line(head.run("jobs", command, "small-00000000"), 2)
    assert "has no job 'small-00000000'" in line


def test_address_of_the_command_wins_over_the_environment(head: Head) -> None:
    done = head.run("jobs", "list", RAY_ADDRESS="http://127.0.0.1:9", RAY_API_SERVER_ADDRESS="x")
    assert done.returncode == 0, done.stderr


def test_sweep_goes_on_after_a_failed_model_and_is_shown_in_place(
    head: Head,
    job: Any,
    job_file: Any,
    tmp_path: Path,
    model_folder: Any,
    expected: bytes,
    run_command: Any,
    cluster_address: str,
) -> None:
    values = {key: value for key, value in job().items() if key not in ("model", "bits")}
    models = [str(tmp_path / "missing"), str(model_folder("llama"))]
    values |= {"kind": "sweep", "models": models, "budgets": [1, 8, 6, "1MB"]}
    path, run_id = job_file(values), make_job(values, "").run_id
    done = head.run("submit", path, "--follow")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "does not exist" in done.stdout
    assert "bits 6" in done.stdout
    run = next((tmp_path / "run").iterdir())
    assert (run / "sensitivity.parquet").read_bytes() == expected
    assert json.loads((run / "run.json").read_text())["run_id"] == f"{run_id}-{run.name}"
    solutions = sorted(folder.name for folder in (run / "solutions").iterdir())
    assert solutions == ["bits-6.00", "bytes-1000000"]
    written = (run / "sensitivity.parquet").stat().st_mtime_ns

    again = run_command("run", path, "--address", cluster_address, "--json")
    assert again.returncode == 2, again.stderr
    shown = json.loads(again.stdout)
    assert shown["run_id"] == run_id
    assert [row["exit_code"] for row in shown["rows"]] == [2, 2, 2, 2, 4, 0, 0, 0]
    for row, bits in zip(shown["rows"][5:7], (8, 6), strict=True):
        assert row["effective_bits"] <= bits
        assert json.loads(Path(row["manifest"]).read_text())["budget"]["bits"] == bits
    assert shown["rows"][7]["weight_bytes"] <= 10**6
    assert (run / "sensitivity.parquet").stat().st_mtime_ns == written
