"""What MLflow is given: names are those of config fields and of columns.

A solution other than the scan's own has its name before a slash: ``bits-4.50/kl_mean``. Tasks have
theirs: ``arc_easy/acc`` and ``arc_easy/acc_stderr``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoquant_ray.allocate.candidate import SOLUTION
from autoquant_ray.runs.record import RunRecord

_LONGEST = 500
"""Characters of a parameter: what every version of MLflow takes."""
_MEASURED = (
    *("kl_mean", "kl_stderr", "kl_p50", "kl_p95", "kl_p99"),
    *("perplexity", "reference_perplexity", "top1_agreement", "num_tokens"),
)
_OF_NIGHT = ("num_changed", "num_moved", "min_spearman", "exit_code")


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """Fields of the scan's config that have a value; lists and mappings as JSON."""
    return {
        name: (value if isinstance(value, str) else json.dumps(value))[:_LONGEST]
        for name, value in config.items()
        if value not in (None, [], {}, ())
    }


def tags(record: RunRecord) -> dict[str, str]:
    """Who made the run, of what: fingerprints, and versions of packages."""
    facts = {"model": record.model["name"], "dataset": record.dataset.get("name", "")}
    prints = {f"fingerprints/{name}": text for name, text in record.fingerprints.items()}
    versions = {f"versions/{name}": text for name, text in (record.versions or {}).items()}
    return {name: str(text) for name, text in (facts | prints | versions).items()}


def solution_metrics(record: RunRecord, manifest: Mapping[str, Any]) -> dict[str, float]:
    """Size and predicted loss of the scan's own solution, and the seconds of each stage."""
    solution = manifest["solution"]
    values = {
        "effective_bits": solution["effective_bits"],
        "weight_bytes": solution["weight_bytes"],
        "predicted_kl": solution["predicted_kl_nats"],
        "optimality_gap": solution.get("optimality_gap"),
        "num_shards": record.dataset.get("num_shards"),
        "num_tokens": record.dataset.get("num_tokens"),
        "num_quarantined": len(record.quarantined),
    }
    seconds = {f"seconds/{name}": stage.get("seconds") for name, stage in record.stages.items()}
    return _numbers(values | seconds)


def measured_metrics(
    solution: str, rows: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Measured loss of a solution, and its scores in tasks.

    Args:
        solution: Its name; '' for the scan's own.
        rows: Of ``evaluation.parquet``.
        tasks: Of ``tasks.parquet``.
    """
    start = f"{solution}/" if solution else ""
    values: dict[str, Any] = {}
    for row in rows:
        if row["name"] == SOLUTION:
            values |= {f"{start}{name}": row[name] for name in _MEASURED}
    for row in tasks:
        if row["name"] == SOLUTION:
            filter_ = "" if row["filter"] == "none" else f"/{row['filter']}"
            name = f"{start}{row['task']}/{row['metric']}"
            values |= {f"{name}{filter_}": row["value"], f"{name}_stderr{filter_}": row["stderr"]}
            values[f"{name}_difference{filter_}"] = row["difference"]
    return _numbers(values)


def night_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a row of the history that the run alone does not have."""
    return _numbers({name: row.get(name) for name in _OF_NIGHT})


def night_tags(row: Mapping[str, Any]) -> dict[str, str]:
    """Texts of a row of the history."""
    names = ("job", "date", "status", "verdict", "baseline")
    return {name: str(row[name]) for name in names if row.get(name) is not None}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are numbers; MLflow's keys have no other signs than these."""
    return {
        "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
