"""The process that workers are forked from: what is forked, how it ends, where it does nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from autoquant_ray.distributed.this_machine import starts_cluster

DRIVER = """
import contextlib, json, os, subprocess, sys, threading
from autoquant_ray.distributed.forks.workers import forked_workers

{before}
real = sys.executable
with forked_workers(["wave", "numpy"], {there}):
    program = sys.executable
    print(json.dumps({{"driver": os.getpid(), "program": program, "real": real}}), flush=True)
    {inside}
assert sys.executable == real
assert not os.path.exists(os.path.dirname(program)) or program == real
print("ended")
"""
WORKER = """
import json, os, signal, sys
facts = {"pid": os.getpid(), "parent": os.getppid(), "arguments": sys.argv[1:],
         "has": [name for name in ("wave", "chunk", "colorsys") if name in sys.modules],
         "value": os.environ.get("VALUE"), "name": __name__}
print(json.dumps(facts), flush=True)
if sys.argv[1] == "stop":
    signal.pause()
if sys.argv[1] == "raise":
    raise ValueError("wrong")
sys.exit(int(sys.argv[1]))
"""
CALL = "print(subprocess.run([program, {script!r}, {argument!r}], env={env}).returncode)"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Run a driver in a fresh interpreter; returns (facts of the driver, other lines, stderr)."""

    def run_driver(
        inside: str, before: str = "", there: tuple[str, ...] = ("chunk",)
    ) -> tuple[dict[str, Any], list[str], str]:
        code = DRIVER.format(inside=inside, before=before, there=there)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        first, *others, last = done.stdout.splitlines()
        assert last == "ended"
        return json.loads(first), others, done.stderr

    return run_driver


@pytest.fixture
def call(tmp_path: Path) -> Any:
    """Code that runs a script by the program that Ray is given."""

    def code(argument: str, name: str = "default_worker.py") -> str:
        script = tmp_path / name
        script.write_text(WORKER)
        env = "{**os.environ, 'VALUE': 'seven'}"
        return CALL.format(script=str(script), argument=argument, env=env)

    return code


@pytest.fixture(autouse=True)
def _threads_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy has threads, as on every machine with several processors."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")


def test_worker_has_the_modules_and_its_exit_code_arrives(run: Any, call: Any) -> None:
    driver, (line, code), _ = run(call("5"))
    worker = json.loads(line)
    assert driver["program"] != driver["real"]
    assert worker["has"] == ["wave", "chunk"]
    assert worker["arguments"] == ["5"]
    assert worker["value"] == "seven"
    assert worker["name"] == "__main__"
    assert code == "5"
    assert worker["pid"] != driver["driver"]
    assert worker["parent"] not in (driver["driver"], 1)  # the process that it is forked from


def test_error_of_a_worker_is_on_its_stderr(run: Any, call: Any) -> None:
    _, (_, code), stderr = run(call("raise"))
    assert code == "1"
    assert "ValueError: wrong" in stderr


def test_other_scripts_start_as_ever(run: Any, call: Any) -> None:
    _, (line, code), _ = run(call("6", "dashboard.py"))
    assert json.loads(line)["has"] == []
    assert code == "6"


@pytest.mark.parametrize(
    "before",
    [
        "threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "sys.modules['ray'] = sys",
    ],
)
def test_process_that_cannot_be_forked_starts_workers_as_ever(
    before: str, run: Any, call: Any
) -> None:
    driver, (line, code), _ = run(call("4"), before)
    assert driver["program"] == driver["real"]
    assert json.loads(line)["has"] == []
    assert code == "4"


def test_modules_that_start_threads_are_not_forked(run: Any, call: Any, tmp_path: Path) -> None:
    start = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    (tmp_path / "starts_threads.py").write_text(f"import threading; {start}")
    driver, (line, code), stderr = run(call("3"), there=("chunk", "starts_threads"))
    assert driver["program"] != driver["real"]
    assert json.loads(line)["has"] == []
    assert code == "3"
    assert stderr == ""


@pytest.mark.parametrize("victim", ["driver", "worker", "program"])
def test_nothing_is_left_of_what_is_killed(victim: str, tmp_path: Path, call: Any) -> None:
    call("stop")
    popen = f"subprocess.Popen([program, {str(tmp_path / 'default_worker.py')!r}, 'stop'])"
    inside = f"started = {popen}; print(started.pid, flush=True); print(started.wait(), flush=True)"
    code = DRIVER.format(inside=inside, before="", there=("chunk",))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        folder = Path(json.loads(driver.stdout.readline())["program"]).parent
        program = int(driver.stdout.readline())
        worker = json.loads(driver.stdout.readline())
        everything = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(True)]
        assert {worker["pid"], worker["parent"], program} <= {p.pid for p in everything}
        os.kill({"driver": driver.pid, "worker": worker["pid"], "program": program}[victim], 9)
        rest = driver.stdout.read().split()
    _, alive = psutil.wait_procs(everything, timeout=60)
    assert alive == []
    assert not folder.exists()
    assert rest == ([] if victim == "driver" else [str(-signal.SIGKILL), "ended"])


@pytest.mark.parametrize(
    ("address", "variable", "starts"),
    [
        ("local", "", True),
        ("auto", "", True),
        ("local", "10.0.0.1:6379", True),
        ("auto", "10.0.0.1:6379", False),
        ("ray://head:10001", "", False),
    ],
)
def test_who_starts_a_cluster(
    address: str, variable: str, starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert starts_cluster(address) == starts
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    assert starts_cluster(address) == (address == "local")
