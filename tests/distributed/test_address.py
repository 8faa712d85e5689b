"""Which Ray ``--address auto`` means: what was started to be shared, no other program's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PRIVATE = """
import sys, ray
ray.init(address="local", num_cpus=1, object_store_memory=150 * 2**20, include_dashboard=False)
print("at", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
JOINED = """
import logging, ray
logging.basicConfig(level=logging.INFO)
from autoquant_ray.config.latency_measurement import LatencyMeasurement
from autoquant_ray.distributed.placement import connected
with connected(LatencyMeasurement(model="m")):
    print("at", ray.get_runtime_context().gcs_address, flush=True)
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Variables under which no Ray of this machine is found but those of the test."""
    folder = tempfile.mkdtemp(prefix="aq")  # short: sockets lie in it
    yield {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


def address_in(line: str) -> str:
    """What a program says that it is connected to."""
    word, _, address = line.strip().partition(" ")
    assert word == "at", line
    return address


def joined(environment: dict[str, str], *, starts: bool) -> str:
    """The Ray that ``auto`` takes; a line that says that it was started is checked."""
    done = subprocess.run(
        [sys.executable, "-c", JOINED], env=environment, check=True, capture_output=True, text=True
    )
    line = "Ray: no cluster runs on this machine; this command starts its own"
    assert (line in done.stderr) == starts, done.stderr
    return address_in(done.stdout)


def test_private_ray_of_another_program_is_left_alone(environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRIVATE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        address = address_in(other.stdout.readline())
        mine = joined(environment, starts=True)
        other.communicate()
    assert mine != address


def test_ray_that_was_started_for_the_machine_is_joined(environment: dict[str, str]) -> None:
    ray = Path(sys.executable).with_name("ray")
    command = [ray, "start", "--head", "--port=0", "--num-cpus=1", "--include-dashboard=false"]
    command += ["--object-store-memory=157286400", "--block"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        for line in started.stdout:
            if "--block" in line:
                break
        file = Path(environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
        address = file.read_text().strip()
        try:
            assert joined(environment, starts=False) == address
        finally:
            started.terminate()
            started.communicate()


def test_ray_that_is_gone_is_not_waited_for(environment: dict[str, str]) -> None:
    file = Path(environment["RAY_TMPDIR"], "ray", "ray_current_cluster")
    file.parent.mkdir(parents=True)
    file.write_text("127.0.0.1:1")
    assert joined(environment, starts=True) != "127.0.0.1:1"


def test_doctor_starts_a_ray_and_finds_nothing_wrong(environment: dict[str, str]) -> None:
    words = ("doctor", "--address", "local", "--data", "pydoc", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "autoquant_ray", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["check"]: row for row in json.loads(done.stdout)}
    assert rows["Ray"]["state"] == "ok"
    assert "local answers: 1 node, " in rows["Ray"]["text"]
    assert rows["Data"]["text"] == "pydoc can be read; first sample: a text"
