"""A folder of runs as scans and nightly jobs leave it, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from autoquant_ray.runs.directory import RunDirectory

EVIL = '<script>document.title = "hacked"</script>'
NUM_GROUPS = 40

HISTORY_SCHEMA = pa.schema(
    [
        ("job", pa.string()),
        ("run", pa.string()),
        ("run_id", pa.string()),
        ("date", pa.string()),
        ("started", pa.string()),
        ("finished", pa.string()),
        ("status", pa.string()),
        ("verdict", pa.string()),
        ("baseline", pa.string()),
        ("predicted_kl_nats", pa.float64()),
        ("effective_bits", pa.float64()),
        ("weight_bytes", pa.int64()),
        ("num_changed", pa.int32()),
        ("num_moved", pa.int32()),
        ("min_spearman", pa.float64()),
        ("num_shards", pa.int32()),
        ("seconds", pa.float64()),
        ("exit_code", pa.int32()),
        ("error", pa.string()),
    ]
)
"""The contract with the nightly jobs, written out here so that a renamed column fails."""


def put_run(
    folder: Path,
    name: str,
    *,
    model: str = "org/model",
    fingerprint: str | None = None,
    created: str = "2026-11-01T02:00:00Z",
    formats: list[str] | None = None,
    stages: dict[str, Any] | None = None,
    quarantined: list[dict[str, Any]] | None = None,
    kl: float | None = 0.17,
    report: str | None = "report.html",
) -> None:
    """Write a run: ``run.json``, and the solution where it has formats."""
    directory = RunDirectory(str(folder / name))
    stages = stages or {"score": {"state": "done", "seconds": 60.0}, "aggregate": {"state": "done"}}
    values = {
        "schema_version": 1,
        "run_id": name,
        "created": created,
        "config": {},
        "model": {"name": model, "fingerprint": fingerprint},
        "dataset": {},
        "fingerprints": {},
        "stages": stages,
        "quarantined": quarantined or [],
    }
    directory.write_json("run.json", values)
    if formats is None:
        return
    solution = {"predicted_kl_nats": kl, "effective_bits": 5.0, "weight_bytes": 3.2 * 2**30}
    directory.write_json("manifest.json", {"solution": solution})
    rows = [
        {
            "module": f"layers.{i}",
            "group": f"layers.{i}",
            "format": format_,
            "weight_bits": 4.0,
            "weight_bytes": 10.0,
            "score": 0.01,
        }
        for i, format_ in enumerate(formats)
    ]
    directory.write_table("manifest.parquet", rows)
    if report is not None:
        directory.write_text(report, f"report of {name}")


def night(job: str, date: str, **changes: Any) -> dict[str, Any]:
    """A row of the history; a good night unless something is changed."""
    values = {
        "job": job,
        "run": f"{job}-{date}",
        "run_id": f"{job}-{date}",
        "date": date,
        "started": f"{date}T02:00:00Z",
        "finished": f"{date}T02:34:00Z",
        "status": "done",
        "verdict": "same",
        "baseline": f"{job}-2026-11-01",
        "predicted_kl_nats": 0.1712,
        "effective_bits": 4.998,
        "weight_bytes": round(3.2 * 2**30),
        "num_changed": 0,
        "num_moved": 0,
        "min_spearman": 0.99,
        "num_shards": 64,
        "seconds": 2040.0,
        "exit_code": 0,
        "error": None,
    }
    return values | changes


def failed(**changes: Any) -> dict[str, Any]:
    """What a night without a result has in the history."""
    empty = ("verdict", "baseline", "predicted_kl_nats", "effective_bits", "weight_bytes")
    counts = ("num_changed", "num_moved", "min_spearman", "num_shards")
    return dict.fromkeys((*empty, *counts)) | {"status": "failed", "exit_code": 1} | changes


def put_history(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``history.parquet``."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=HISTORY_SCHEMA), folder / "history.parquet")


def formats_with(num_changed: int) -> list[str]:
    """Formats of all groups, so many of them other than the usual one."""
    return ["wfp8_afp8"] * num_changed + ["wint4_afp16"] * (NUM_GROUPS - num_changed)


def put_everything(folder: Path) -> None:
    """Two nightly jobs with every kind of night, a model's runs, and a hostile name."""
    job = "qwen3-32b"
    kls = [0.1712, 0.1709, 0.1715, 0.1711, None, 0.1713, 0.1718, 0.1954, 0.1949, 0.1951, None]
    kls += [0.1947, 0.1952, 0.195]
    rows = []
    for i, kl in enumerate(kls):
        date = f"2026-11-{i + 1:02d}"
        changes: dict[str, Any] = {"predicted_kl_nats": kl, "seconds": 2040.0 + 7 * i}
        if i == 0:
            changes |= {"verdict": "baseline", "baseline": None, "num_changed": None}
        if i in (2, 5, 11):
            changes |= {"verdict": "noise", "num_changed": 1}
        if i == 7:
            changes |= {"verdict": "drift", "num_changed": 5, "num_moved": 9, "exit_code": 3}
        if i == 12:
            changes |= {"status": "quarantined", "exit_code": 3, "num_changed": 2}
        if kl is None:
            changes |= failed(error="error: 3 of 8 workers lost their node; go on with --resume")
        rows.append(night(job, date, **changes))
        if i >= 9 and kl is not None:
            left_out = [{"shard": 3, "stage": "score", "reason": "a NaN in the loss"}]
            put_run(
                folder,
                f"{job}-{date}",
                model="Qwen/Qwen3-32B",
                created=f"{date}T02:00:00Z",
                formats=formats_with(i % 3),
                kl=kl,
                quarantined=left_out if i == 12 else None,
            )
    put_run(
        folder,
        f"{job}-2026-11-15",
        model="Qwen/Qwen3-32B",
        created="2026-11-15T02:00:00Z",
        stages={"plan": {"state": "done", "seconds": 1.0}, "score": {"state": "running"}},
    )
    rows.append(night("small", "2026-11-14", verdict="baseline", baseline=None, num_changed=None))
    infeasible = failed(status="infeasible", exit_code=4, error="3 bits cannot be met")
    rows.append(night("small", "2026-11-15", **infeasible))
    put_history(folder, rows)
    for i in range(3):
        put_run(
            folder,
            f"{'x' * 60}-{i}",
            model=f"org/{EVIL}",
            created=f"2026-10-0{i + 1}T08:00:00Z",
            formats=formats_with(4 * i),
            kl=0.02 + 0.001 * i,
            report="report.md" if i == 1 else "report.html",
        )
