"""Nights whose scans have made-up scores and take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoquant_ray.allocate.options import solve_options
from autoquant_ray.compare.history import read_history
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.scoring import SensitivitySums, ShardScores
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.jobs.file import NightlyJob, make_job
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import Mode, RunState
from autoquant_ray.solve import solve_run

NUM_SHARDS = 8
MOVED = "model.layers.1.mlp.down_proj"


class Scans:
    """Makes runs as a scan would, remembers what it was asked for."""

    def __init__(self, make_model: Any, write_run: Any) -> None:
        self._make_model = make_model
        self._write_run = write_run
        self.modes: list[Mode] = []

    def __call__(self, config: ScanConfig, mode: Mode) -> None:
        self.run(config, mode)

    def run(
        self,
        config: ScanConfig,
        mode: Mode,
        *,
        seed: int = 0,
        factors: dict[str, float] | None = None,
        quarantined: bool = False,
    ) -> None:
        """Write a whole run; the scores of some groups are multiplied by factors."""
        self.modes.append(mode)
        config = config.model_copy(update={"device": "cpu", "dtype": "float32"})
        plan = build_plan(
            self._make_model("llama"), resolve_formats(config.formats, device="cpu"), config.disable
        )
        draw = np.random.default_rng(seed)
        scale_G = np.array([(factors or {}).get(g.name, 1.0) for g in plan.searched])
        base_GF = scale_G[:, None] * np.outer(
            1 + np.arange(len(plan.searched)), 4.0 ** -np.arange(1, 1 + len(plan.formats))
        )
        scores = [shard_scores(base_GF * draw.uniform(0.9, 1.1)) for _ in range(NUM_SHARDS)]
        identity = make_identity("changed" if factors else "model")
        directory = self._write_run(config, plan, identity, scores, mode)
        if quarantined:
            RunState.open(directory).quarantine(7, "score", "it killed three workers")
        elif mode == "resume":
            state = RunState.open(directory)
            state.record.quarantined = []
            state.save()
        solve_run(directory, solve_options(config), folder="")


def shard_scores(sums_GF: Any) -> ShardScores:
    zeros_GF = np.zeros_like(sums_GF)
    sums = SensitivitySums(
        elementwise_GF=sums_GF,
        token_GF=sums_GF,
        elementwise_variance_GF=zeros_GF,
        token_variance_GF=zeros_GF,
        num_rows_G=np.full(len(sums_GF), 10),
    )
    return ShardScores(
        sums=sums,
        num_tokens=50,
        num_samples=4,
        loss=1.0,
        seconds=0.1,
        row_shares_GF=np.ones_like(zeros_GF),
    )


def make_identity(fingerprint: str) -> dict[str, Any]:
    counts = {"read": 8, "used": 8, "empty": 0, "too_short": 0, "cut": 0}
    return {
        "model": {"name": "llama", "fingerprint": fingerprint},
        "dataset": {
            "name": "made-up.txt",
            "max_samples": 128,
            "seq_len": 512,
            "counts": counts,
            "num_samples": 4 * NUM_SHARDS,
            "num_tokens": 54 * NUM_SHARDS,
            "num_shards": NUM_SHARDS,
        },
        "fingerprints": {"model": fingerprint, "data": "data"},
    }


JOB = {
    "kind": "nightly",
    "name": "demo",
    "model": "llama",
    "data": "made-up.txt",
    "formats": ["wint8_aint8", "wint4_afp16"],
    "disable": ["lm_head"],
    "bits": 7,
}


def make_nightly(**changes: Any) -> NightlyJob:
    job = make_job(JOB | changes, "job.yaml")
    assert isinstance(job, NightlyJob)
    return job


def no_scan(config: ScanConfig, mode: Mode) -> None:
    pytest.fail("a finished night was scanned again")


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return read_history(RunDirectory(str(tmp_path / "runs")))


def markdown(tmp_path: Path, day: int) -> str:
    return (tmp_path / "runs" / f"demo-2026-11-{day:02d}" / "drift.md").read_text()


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
