"""The files under jobs/ and cluster/ are read by what they are written for."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from autoquant_ray.config import ScanConfig
from autoquant_ray.config_file import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.name)
def test_job_file_is_a_valid_scan(path: Path) -> None:
    config = load_config(ScanConfig, str(path), {})
    assert isinstance(config, ScanConfig)
    assert config.bits == 6


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.yaml")), ids=lambda p: p.name)
def test_cluster_file_fits_the_launcher_schema(path: Path) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)
