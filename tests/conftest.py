"""The environment of all tests, and small models, samples and files that several folders share.

Nothing heavy is imported here: the process that hands out the tests imports this file too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # files that run at the same time must not meet in Ray
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="aq", dir="/tmp")  # a socket's path is short
with contextlib.suppress(ValueError):  # a shell's background job ignores Ctrl-C, and so would ours
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.pop("RAY_ADDRESS", None)
os.environ["HOME"] = tempfile.mkdtemp(prefix="autoquant-home-")
os.environ["COLUMNS"] = "1000"  # sentences and tables that are not wrapped
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ |= {  # on a busy machine Ray's processes take long to start, and to answer
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_gcs_server_port_wait_time_s": "600",
    "RAY_gcs_server_request_timeout_seconds": "600",
    "RAY_health_check_failure_threshold": "100",
    "RAY_py_gcs_connect_timeout_s": "600",
    "RAY_worker_niceness": "0",  # Ray's 15 leaves workers nothing beside other work
    "RAY_worker_register_timeout_seconds": "600",
}

from pathlib import Path
from typing import Any

import pytest
import yaml
from warm_commands import own_fork_server


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        own_fork_server()


@pytest.fixture(scope="session")
def make_model() -> Any:
    from small_models import small_model

    return small_model


@pytest.fixture(scope="session")
def make_samples() -> Any:
    from small_models import random_samples

    return random_samples


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Save small models with a word tokenizer, once per family."""
    from small_models import make_tokenizer, small_model

    saved: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp(family)
            small_model(family).save_pretrained(saved[family])
            make_tokenizer().save_pretrained(saved[family])
        return saved[family]

    return save


@pytest.fixture
def job_file(tmp_path: Path) -> Any:
    """Write a job file."""

    def write(values: dict[str, Any], name: str = "job.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, make_samples: Any) -> Path:
    """Twelve lines of 6 to 40 words."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    lengths = [12, 40, 6, 23, 31, 17, 28, 9, 35, 14, 20, 26]
    lines = [" ".join(f"w{token}" for token in sample) for sample in make_samples(lengths)]
    path.write_text("\n".join(lines) + "\n")
    return path
