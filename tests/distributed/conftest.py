"""A local Ray cluster for each test module, and the command line as a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """Four CPUs (whatever the machine has), small object store, no dashboard."""
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def command() -> Any:
    """Arguments of the command line -> arguments of a process."""

    def build(*arguments: Any) -> list[str]:
        return [sys.executable, "-m", "autoquant_ray", *(str(argument) for argument in arguments)]

    return build


@pytest.fixture(scope="session")
def run_command(command: Any) -> Any:
    """Run the command line to its end."""

    def run(*arguments: Any, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        )

    return run


@pytest.fixture(scope="session")
def scan_arguments(model_folder: Any, text_file: Path) -> Any:
    """Arguments of a small scan into a run directory."""

    def build(out: Path, *extra: Any, family: str = "llama") -> list[Any]:
        return [
            "scan",
            model_folder(family),
            "--data",
            text_file,
            "--out",
            out,
            "--formats",
            "wint4_afp16,wint8_aint8",
            "--bits",
            "8",
            "--shard-samples",
            "2",
            "--address",
            "local",
            *extra,
        ]

    return build
