"""``benchmarks/gpu.py`` on the CPU, so that it does not fail on a GPU that is lent for minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(out: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--out", str(out)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out / "gpu.json")
    results: dict[str, Any] = json.loads((out / "gpu.json").read_text())["steps"]
    return results


def test_steps_of_every_kind_run_on_the_cpu(tmp_path: Path) -> None:
    steps = run(tmp_path, "--steps", "parity", "integers", "gptq")
    assert list(steps) == ["parity", "integers", "gptq"]
    assert steps["parity"]["sides"]["core"]["largest_relative_score_difference"] < 1e-4
    errors = steps["integers"]["largest_relative_error"]
    assert 0 < errors["int8+float32"] < 1e-4
    assert errors["bfloat16"] > 10 * errors["int8+bfloat16"]
    assert set(steps["integers"]["matmul_rates"]) == {"float32", "bfloat16", "int8"}
    assert steps["gptq"]["equal_to_the_cpu"] == 1.0
    assert steps["gptq"]["integers"] > 1000


def test_no_step_starts_when_the_time_is_up(tmp_path: Path) -> None:
    steps = run(tmp_path, "--minutes", "0")
    assert {step["not_run"] for step in steps.values()} == {"no time was left"}
    assert len(steps) == 10
