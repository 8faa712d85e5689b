"""The files under jobs/ are read by what they are written for."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoquant_ray.config import ScanConfig
from autoquant_ray.config_file import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_job_file_is_a_valid_scan(path: Path) -> None:
    config = load_config(ScanConfig, str(path), {})
    assert isinstance(config, ScanConfig)
    assert config.bits == 6
