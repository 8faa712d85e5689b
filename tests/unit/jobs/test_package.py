"""Submission: what is refused before anything travels, what travels, and how clusters fail us."""

from __future__ import annotations

import http.server
import shlex
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from autoquant_ray.cli.main import main
from autoquant_ray.errors import ConfigError
from autoquant_ray.jobs.file import make_job
from autoquant_ray.jobs.package import entrypoint, make_package

SCAN = {"name": "a-scan", "model": "/m", "data": "/d.txt", "out": "/runs/r", "bits": 6}
SECRET = "hf-s3cr3t"


def run(*arguments: Any) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def one_line(result: Result, exit_code: int = 2) -> str:
    """The line with which a command refused; its exit code is checked."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture(scope="module")
def closed_address() -> str:
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


class Stranger(http.server.BaseHTTPRequestHandler):
    """A web server that is no Ray dashboard."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def strange_address() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def package(values: dict[str, Any], env: Any = (), wheel: str | None = None) -> Any:
    return make_package(values, "job.yaml", env=dict(env), wheel=wheel)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (SCAN | {"out": "runs/r"}, "out: runs/r would be looked for on the cluster"),
        (SCAN | {"out": "~/r"}, "out: ~/r would be"),
        (
            SCAN | {"model": "./m"},
            "model: ./m would be looked for on the cluster; give an absolute path that its "
            "nodes share, or a hub id",
        ),
        (SCAN | {"model": "s3://b/m"}, "model: s3://b/m cannot be read from there"),
        (SCAN | {"data": "gs://b/d"}, "data: gs://b/d cannot be read from there"),
        (SCAN | {"data": "../d.txt"}, "data: ../d.txt would be"),
        (SCAN | {"out": f"s3://key:{SECRET}@bucket/r"}, "out: s3://bucket/... holds credentials"),
        (SCAN | {"nmae": "x"}, "nmae: unknown key; closest: name"),
    ],
)
def test_package_of_a_job_that_cannot_travel_is_refused(
    values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        package(values)
    assert expected in str(caught.value)
    assert SECRET not in str(caught.value)


def test_package_of_a_sweep_looks_at_every_model() -> None:
    sweep = {"kind": "sweep", "name": "s", "models": ["/a", "./b"], "budgets": [6], "out": "/r"}
    with pytest.raises(ConfigError, match=r"model: \./b would be looked for"):
        package(sweep | {"data": "pydoc"})


def test_package_refuses_a_relative_path_that_exists_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert package(SCAN | {"model": "org/model"}).job.config().model == "org/model"
    (tmp_path / "org" / "model").mkdir()
    with pytest.raises(ConfigError, match="model: org/model would be"):
        package(SCAN | {"model": "org/model"})


NIGHTLY = {key: value for key, value in SCAN.items() if key != "out"} | {"kind": "nightly"}


def test_night_is_named_by_its_date_and_read_back_by_our_own_command_line() -> None:
    runs = "/runs; touch /tmp/x"
    made = make_package(NIGHTLY, "job.yaml", env={}, wheel=None, runs=runs)
    command, job_file, *rest = shlex.split(entrypoint(made.command))[3:]
    parsed = main.commands[command].make_context(command, [job_file, *rest])
    assert (command, job_file) == ("nightly", "job.yaml")
    assert parsed.params["runs"] == runs
    assert made.run_id == f"{NIGHTLY['name']}-{parsed.params['date']}"
    assert parsed.params["date"] == time.strftime("%Y-%m-%d", time.gmtime())


@pytest.mark.parametrize(
    ("values", "runs", "message"),
    [
        (NIGHTLY, None, "give the folder of its runs with `runs` DIR"),
        (NIGHTLY, "runs", "--runs: runs would be looked for on the cluster"),
        (SCAN, "/runs", "`runs` is for nightly jobs"),
    ],
)
def test_folder_of_runs_belongs_to_nightly_jobs(
    values: dict[str, Any], runs: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_package(values, "job.yaml", env={}, wheel=None, runs=runs)


def test_package_never_holds_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError) as caught:
        package(SCAN | {"secrets": ["MINE"]}, {"MINE": SECRET})
    assert "--env MINE: it is a secret" in str(caught.value)
    package(SCAN, {"HF_TOKEN": SECRET})
    assert "--env HF_TOKEN: Ray's dashboard shows its value" in caplog.text
    assert SECRET not in str(caught.value) + caplog.text


def test_package_unpacks_the_job_and_only_the_package(tmp_path: Path) -> None:
    wheel = tmp_path / "autoquant_ray-0.1.0-py3-none-any.whl"
    inside = {"autoquant_ray/__main__.py", "autoquant_ray-0.1.0.dist-info/METADATA"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in inside | {"weights.bin", "job.yaml", "../escaped", "autoquant_ray-x.bin"}:
            archive.writestr(name, "content")
    folder = tmp_path / "folder"
    folder.mkdir()
    package(SCAN, wheel=str(wheel)).unpack(folder)
    unpacked = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert unpacked == inside | {"job.yaml"}
    sent = make_job(yaml.safe_load((folder / "job.yaml").read_text()), "job.yaml")
    assert sent == package(SCAN).job


def test_package_sends_what_the_job_brings(tmp_path: Path) -> None:
    code, folder = tmp_path / "code", tmp_path / "folder"
    code.mkdir()
    folder.mkdir()
    (code / "mine.py").write_text("x = 1")
    brings = {"pip": ["a==1"], "env_vars": {"A": "1", "B": "2"}, "working_dir": str(code)}
    made = package(SCAN | {"runtime_env": brings}, env={"B": "3"})
    assert made.runtime_env_in("F") == {
        "pip": ["a==1"],
        "env_vars": {"A": "1", "B": "3"},
        "working_dir": "F",
    }
    made.unpack(folder)
    assert (folder / "mine.py").read_text() == "x = 1"
    assert yaml.safe_load((folder / "job.yaml").read_text()) == SCAN
    assert made.run_id != package(SCAN).run_id


@pytest.mark.parametrize(
    ("folder", "expected"), [("none", "is no folder of this machine"), ("code", "holds a job.yaml")]
)
def test_package_refuses_a_working_directory_that_cannot_be_sent(
    folder: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "job.yaml").write_text("")
    with pytest.raises(ConfigError, match=expected):
        package(SCAN | {"runtime_env": {"working_dir": str(tmp_path / folder)}})


@pytest.mark.parametrize("content", [None, "text", {"other/__main__.py": ""}])
def test_package_refuses_what_is_no_wheel_of_ours(tmp_path: Path, content: Any) -> None:
    wheel = tmp_path / "x.whl"
    if isinstance(content, str):
        wheel.write_text(content)
    elif content is not None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(*next(iter(content.items())))
    with pytest.raises(ConfigError, match=r"--wheel .*x\.whl"):
        package(SCAN, wheel=str(wheel))


def test_entrypoint_is_read_back_by_our_own_command_line() -> None:
    python, dash_m, module, command, *rest = shlex.split(entrypoint(package(SCAN).command))
    assert (python, dash_m, module) == ("python", "-m", "autoquant_ray")
    parsed = main.commands[command].make_context(command, rest)
    assert parsed.params["run_id"] == package(SCAN).run_id
    assert (parsed.params["job_file"], parsed.params["address"]) == ("job.yaml", "auto")


# --- clusters that are not there


def test_submit_to_nobody_is_refused(job_file: Any, closed_address: str) -> None:
    line = one_line(run("submit", job_file(SCAN), "--address", closed_address))
    assert f"{closed_address} cannot be reached" in line
    assert "http://HOST:8265" in line


def test_submit_to_a_stranger_is_refused(job_file: Any, strange_address: str) -> None:
    line = one_line(run("submit", job_file(SCAN), "--address", strange_address))
    assert "answers, but not as a Ray dashboard" in line


@pytest.mark.parametrize(
    "address", ["auto", "host:8265", "ray://host:10001", "http://", "http://["]
)
def test_submit_to_another_kind_of_address_is_refused(job_file: Any, address: str) -> None:
    line = one_line(run("submit", job_file(SCAN), "--address", address))
    assert "is not the address of a Ray dashboard" in line


def test_submit_does_not_repeat_a_password_of_an_address(job_file: Any) -> None:
    line = one_line(run("submit", job_file(SCAN), "--address", f"http://me:{SECRET}@host:1"))
    assert SECRET not in line


def test_submit_without_an_address_is_refused(
    job_file: Any, monkeypatch: pytest.MonkeyPatch, closed_address: str
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert "--address" in one_line(run("submit", job_file(SCAN)))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", closed_address)
    assert closed_address in one_line(run("submit", job_file(SCAN)))


def test_submit_refuses_a_wrong_job_before_it_connects(job_file: Any, closed_address: str) -> None:
    line = one_line(run("submit", job_file(SCAN | {"bits": "x"}), "--address", closed_address))
    assert "bits: " in line
    assert closed_address not in line


@pytest.mark.parametrize("text", [SECRET, f"={SECRET}", f"1A={SECRET}"])
def test_submit_does_not_repeat_a_wrong_env(text: str, job_file: Any, closed_address: str) -> None:
    line = one_line(run("submit", job_file(SCAN), "--address", closed_address, "--env", text))
    assert "number 1 is not of the form NAME=VALUE" in line
    assert SECRET not in line


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_jobs_refuses_a_run_id_that_is_a_path(command: str, closed_address: str) -> None:
    line = one_line(run("jobs", command, "../x", "--address", closed_address))
    assert "'../x' is not a run id" in line
