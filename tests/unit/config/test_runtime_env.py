"""``runtime_env`` of a job file: what of Ray's is taken, and that it holds no secret."""

from __future__ import annotations

from typing import Any

import pytest

from autoquant_ray.errors import ConfigError
from autoquant_ray.jobs.file import make_job

SCAN = {"name": "a-scan", "model": "/m", "data": "/d.txt", "out": "/runs/r", "bits": 6}
SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"conda": "env"}, "unknown key"),
        ({"pip": ["a"], "uv": ["b"]}, "pip and uv exclude each other"),
        ({"env_vars": {"HF_TOKEN": SECRET}}, "HF_TOKEN sounds like a secret"),
        ({"env_vars": {"1": SECRET}}, "entry 1 has no name of an environment variable"),
        ({"working_dir": f"s3://b/c?secret_key={SECRET}"}, "holds credentials"),
    ],
    ids=["unknown", "both installers", "secret", "name", "credentials"],
)
def test_wrong_environment_is_refused_in_a_line(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_job(SCAN | {"runtime_env": values}, "job.yaml")
    assert expected in str(caught.value)
    assert "runtime_env" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) <= 400


def test_environment_is_what_ray_takes() -> None:
    values = {"pip": ["a==1"], "env_vars": {"A": "1"}, "working_dir": "code"}
    config = make_job(SCAN | {"runtime_env": values}, "job.yaml").config()  # type: ignore[call-arg]
    assert config.runtime_env is not None
    assert config.runtime_env.to_ray() == values
