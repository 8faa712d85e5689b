"""The files under jobs/ are read by what they are written for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoquant_ray.config import ScanConfig
from autoquant_ray.config_file import load_config
from autoquant_ray.job import load_job

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_job_file_is_a_valid_job_of_its_kind(path: Path) -> None:
    assert load_job(str(path)).kind == path.stem


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_job_file_explains_every_field(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if re.match(r"[a-z_]+:", line) and not line.endswith(":"):
            assert "#" in line, f"{path.name}:{number}: {line}"


def test_job_file_of_a_scan_serves_the_scan_command() -> None:
    config = load_config(ScanConfig, str(ROOT / "jobs" / "scan.yaml"), {})
    assert isinstance(config, ScanConfig)
    assert config.bits == 6
