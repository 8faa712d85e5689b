"""A scan of GGUF's types: the same bytes by any number of workers, and the recipe says them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import autoquant_ray
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.formats.gguf_types import DISTRIBUTION, library_file
from autoquant_ray.scan import run_search

pytestmark = pytest.mark.skipif(library_file() is None, reason=f"needs {DISTRIBUTION}")
FORMATS = ("q4_k", "q8_0", "iq4_nl", "q2_k")
FAMILY = "qwen3_moe"


def test_scan_any_number_of_workers_gives_identical_bytes_and_the_recipe_says_the_types(
    ray_local: None, tmp_path: Path, model_folder: Any, text_file: Path, run_command: Any
) -> None:
    runs = []
    for workers in (1, 2):
        config = ScanConfig(
            model=str(model_folder(FAMILY)),
            data=str(text_file),
            out=str(tmp_path / f"run-{workers}"),
            formats=FORMATS,
            bits=5.2,
            shard_samples=4,
            samples=8,
            workers=workers,
        )
        run_search(config)
        runs.append(autoquant_ray.Run.open(config.out))
    first, second = ((Path(run.path) / "sensitivity.parquet").read_bytes() for run in runs)
    assert first == second
    scores = runs[0].sensitivity.to_pylist()
    assert {row["format"] for row in scores} == set(FORMATS)
    assert all(row["score"] > 0 for row in scores)

    recipe = tmp_path / "recipe"
    words = ("--format", "recipe", "--tool", "llama.cpp", "--out", recipe)
    done = run_command("export", runs[0].path, *words)
    assert done.returncode == 0, done.stderr
    pairs = [word.split("=", 1) for word in shlex.split(recipe.read_text()) if "=" in word]
    assert {type_ for _, type_ in pairs} <= {"q5_0", "q8_0", "iq4_nl", "q4_0", "bf16"}
