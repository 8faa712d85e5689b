"""Records of runs that were never made."""

from __future__ import annotations

from typing import Any

from autoquant_ray.runs.record import RunRecord


def make_record(**entries: Any) -> RunRecord:
    """A record with what every ``run.json`` has, and some entries."""
    values = {
        "schema_version": 1,
        "run_id": "some-run",
        "stages": {},
        "quarantined": [],
        "config": {},
        "model": {"name": "model", "fingerprint": "3f"},
        "dataset": {},
        "fingerprints": {},
    }
    return RunRecord.from_json(values | entries, "run.json")
