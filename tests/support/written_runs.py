"""A scored run directory of any model, written without Ray as the stages of a scan do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import stage_fingerprints
from autoquant_ray.distributed.scoring import SensitivitySums, ShardScores
from autoquant_ray.plan.plan import Plan
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SCORES, part_name
from autoquant_ray.runs.state import Mode, RunState
from autoquant_ray.stages.aggregate import score_part
from autoquant_ray.stages.score import aggregate, write_plan


def made_up_config(
    model: str | Path, out: Path, formats: tuple[str, ...], **more: Any
) -> ScanConfig:
    """The config of a scan on CPU whose data is never read; 16 bits unless more is said."""
    fields: dict[str, Any] = {"bits": 16, "device": "cpu", "dtype": "float32"}
    return ScanConfig(
        model=str(model), data="made-up.txt", out=str(out), formats=formats, **(fields | more)
    )


def write_run(
    config: ScanConfig,
    plan: Plan,
    identity: dict[str, Any],
    scores: list[ShardScores],
    mode: Mode = "new",
    weights: Path | None = None,
    domains: tuple[str, ...] = (),
) -> RunDirectory:
    """Write a scored run.

    Args:
        config: Of the scan.
        plan: Of its model.
        identity: ``model``, ``dataset`` and ``fingerprints`` of ``run.json``.
        scores: Of each shard.
        mode: What to do with an existing run.
        weights: Folder of the model's safetensors files, for their hashes.
        domains: Domain of each shard.
    """
    marks = stage_fingerprints(config, **identity["fingerprints"])
    directory = RunDirectory(config.out)
    state = RunState.start(directory, config, mode, identity)
    state.begin()
    write_plan(state, plan, marks["plan"], weights)
    keys, formats = plan.score_keys, [format_.name for format_ in plan.formats]
    for shard, of_shard in enumerate(scores):
        part = score_part(shard, keys, formats, of_shard)
        directory.write_table(part_name(SCORES, shard), part)
    if domains:
        sizes = {"num_samples": 4, "num_tokens": 54}
        rows = [{"shard": s, "domain": name} | sizes for s, name in enumerate(domains)]
        directory.write_table("domains.parquet", rows)
    aggregate(state, config, marks["aggregate"])
    return directory


def made_up_run(
    config: ScanConfig, plan: Plan, name: str, fingerprint: str, num_shards: int = 2, **more: Any
) -> RunDirectory:
    """Write a run with made-up scores: the finer a format, the smaller its score.

    Args:
        config: Of the scan; its data is never read.
        plan: Of its model.
        name: Of the model.
        fingerprint: Of the model.
        num_shards: Shards that were scored.
        more: Further arguments of :func:`write_run`.
    """
    num_samples = 4 * num_shards
    facts = {
        "counts": {"read": num_samples, "used": num_samples}
        | dict.fromkeys(("empty", "too_short", "cut"), 0),
        "num_samples": num_samples,
        "num_tokens": 54 * num_shards,
        "num_shards": num_shards,
    }
    identity = {
        "model": {"name": name, "fingerprint": fingerprint},
        "dataset": {"name": "made-up.txt", "max_samples": 128, "seq_len": 512} | facts,
        "fingerprints": {"model": fingerprint, "data": "data"},
    }
    scores = [_made_up_scores(plan, shard) for shard in range(num_shards)]
    return write_run(config, plan, identity, scores, **more)


def _made_up_scores(plan: Plan, shard: int) -> ShardScores:
    scales_G1 = np.random.default_rng(shard).uniform(0.5, 20, size=(len(plan.searched), 1))
    firsts = [next(g for g in plan.searched if g.takes(f)) for f in plan.formats]
    bits_F = np.array([g.bits(f) for g, f in zip(firsts, plan.formats, strict=True)])
    sums_GF = scales_G1 * 2.0 ** (-2 * bits_F)
    rows_G = np.full(len(plan.searched), 100)
    zeros_GF = np.zeros_like(sums_GF)
    sums = SensitivitySums(
        elementwise_GF=sums_GF,
        token_GF=2 * sums_GF,
        elementwise_variance_GF=zeros_GF,
        token_variance_GF=zeros_GF,
        num_rows_G=rows_G,
    )
    return ShardScores(
        sums=sums,
        num_tokens=50,
        num_samples=4,
        loss=1.0,
        seconds=0.5,
        row_shares_GF=np.ones_like(sums_GF),
    )
