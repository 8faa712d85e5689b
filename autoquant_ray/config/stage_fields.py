"""Which stage a config's field belongs to, and a hash per stage, by which resume goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.formats.algorithms import FITTED_BY_EXPERT, WEIGHTED
from autoquant_ray.formats.menu import WEIGHTED_BY_DEFAULT

STAGE_FIELDS: dict[str, tuple[str, ...]] = {
    "plan": (
        "model",
        "formats",
        "custom_formats",
        "disable",
        "device",
        "trust_remote_code",
        "coverage",
        "expert_groups",
        "search_routers",
    ),
    "shards": (
        "data",
        "read_as",
        "text_field",
        "split",
        "pack",
        "samples",
        "hold_out",
        "seq_len",
        "shard_samples",
        "data_seed",
        "domain_field",
        "loss_on",
        "skip_bad_samples",
    ),
    "calibrate": ("dtype", "placement", "step_tokens", "cpus_per_worker", "min_expert_tokens"),
    "score": (
        "labels",
        "label_draws",
        "sample_rows",
        "difference_dtype",
        "seed",
        "stop_when_stable",
    ),
    "aggregate": ("estimator",),
    "allocate": (
        "bits",
        "bytes",
        "bits_over",
        "cost",
        "max_formats",
        "engine",
        "gpu",
        "kv_bytes_per_token",
    ),
}
"""Fields that each stage's result depends on, in the order of the stages."""

ADDED_FIELDS: dict[str, Any] = {
    "data_seed": None,
    "domain_field": None,
    "engine": None,
    "gpu": None,
    "kv_bytes_per_token": None,
    "coverage": "lm",
    "loss_on": "all",
    "skip_bad_samples": False,
    "read_as": None,
    "expert_groups": "layer",
    "search_routers": False,
    "hold_out": "auto",
    "difference_dtype": None,
}
"""Fields that earlier versions did not have -> the value that means what those versions did."""


Menu = Iterable[Mapping[str, Any]]
"""Formats as ``run.json`` has them."""


def stage_fingerprints(
    config: ScanConfig, model: str, data: str, menu: Menu | None = None
) -> dict[str, str]:
    """Hash each stage's own fields together with the fingerprint of the stage before.

    A scan that stops when it is stable scores shards for its own budget, so that its score stage
    depends on the fields of the allocation too. Shares of rows are chosen for the sums of the run's
    estimator, and sums over sequences are made where they are asked for.

    Args:
        config: Resolved config (no ``auto`` left in fields that change numbers).
        model: Fingerprint of the model's files.
        data: Fingerprint of the token shards, or of the source before they exist.
        menu: What the formats of a run are; None: what their names mean now.

    Returns:
        Stage name -> hexadecimal digest of 16 characters.
    """
    values = config.model_dump(mode="json")
    digests: dict[str, str] = {}
    previous = model
    unused = _unused_fields(config, menu)
    for stage, fields in STAGE_FIELDS.items():
        inputs = {
            name: values[name]
            for name in fields
            if name not in unused
            and (name not in ADDED_FIELDS or values[name] != ADDED_FIELDS[name])
        }
        if stage == "shards":
            inputs["data_fingerprint"] = data
        if stage == "score" and (config.sample_rows == "auto" or config.estimator == "sequence"):
            inputs["estimator"] = values["estimator"]
        if stage == "score" and config.stop_when_stable is not None:
            later = (*STAGE_FIELDS["aggregate"], *STAGE_FIELDS["allocate"])
            inputs |= {
                name: values[name]
                for name in later
                if name not in ADDED_FIELDS or values[name] != ADDED_FIELDS[name]
            }
        text = json.dumps([previous, inputs], sort_keys=True)
        previous = hashlib.sha256(text.encode()).hexdigest()[:16]
        digests[stage] = previous
    return digests


def changed_fields(
    before: dict[str, Any], after: ScanConfig, menu: Menu | None = None
) -> list[str]:
    """Name the result-changing fields in which two configs differ, as ``name: old -> new``.

    Args:
        before: Config of a run.
        after: The other config.
        menu: What the formats of the run are; None: what their names mean now.
    """
    values = after.model_dump(mode="json")
    unused = _unused_fields(after, menu)
    names = [name for fields in STAGE_FIELDS.values() for name in fields if name not in unused]
    earlier = ADDED_FIELDS | before
    return [
        f"{name}: {earlier[name]} -> {values[name]}"
        for name in names
        if name in earlier and earlier[name] != values[name]
    ]


def _unused_fields(config: ScanConfig, menu: Menu | None) -> set[str]:
    """Fields that no number depends on: without a format whose weights are fitted to the tokens
    that each expert saw, how many are few matters to the report alone."""
    algorithms = _algorithms(config) if menu is None else [f.get("algorithm") for f in menu]
    methods = {a.get("method") if isinstance(a, Mapping) else a for a in algorithms}
    return {"min_expert_tokens"} if methods.isdisjoint(FITTED_BY_EXPERT) else set()


def _algorithms(config: ScanConfig) -> list[Any]:
    """What the names of the formats say; presets have no algorithm that matters here."""
    custom = config.custom_formats
    return [
        custom[name].get("algorithm")
        if name in custom
        else WEIGHTED
        if name in WEIGHTED_BY_DEFAULT
        else name.rpartition(":")[2]
        for name in config.formats
    ]
