"""A scored run of a model of any size, made by hand: no model, no Ray, numbers from a seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.formats.stored_size import stored_bits
from autoquant_ray.report.sources import read_sources
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import EVALUATION_FILE
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.runs.state import RunState

FORMATS = tuple(f"w{w}_a{a}" for w in ("int4", "fp8", "int8") for a in ("fp16", "fp8", "int8"))
METHODS = {"mse": 1.25, "weighted": 0.5}
"""Method of rounding -> loss of weights over that of plain rounding, about: scores have noise."""
NUM_TOKENS = 131_072
_HIDDEN, _INNER, _KEYS, _VOCABULARY = 2048, 6144, 512, 32_000
_BLOCKS = {
    "self_attn.q_proj": {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (_KEYS, _HIDDEN),
        "self_attn.v_proj": (_KEYS, _HIDDEN),
    },
    "self_attn.o_proj": {"self_attn.o_proj": (_HIDDEN, _HIDDEN)},
    "mlp.gate_proj": {"mlp.gate_proj": (_INNER, _HIDDEN), "mlp.up_proj": (_INNER, _HIDDEN)},
    "mlp.down_proj": {"mlp.down_proj": (_HIDDEN, _INNER)},
}
_VERSIONS = {"python": "3.11.7", "autoquant-ray": "0.1.0", "ray": "2.60.0", "torch": "2.13.0"}

Modules = dict[str, tuple[int, int]]


def put_scored_run(
    folder: Path,
    *,
    num_layers: int = 4,
    num_shards: int = 16,
    formats: tuple[str, ...] = FORMATS,
    model: str = "org/some-model",
    first_layer: str = "model.layers",
    noise: float = 0.3,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> RunDirectory:
    """Write what a scan leaves before a budget is solved.

    Args:
        folder: Where to.
        num_layers: Decoder layers of four groups each; the head is one more group, and a vision
            tower's module is not searched.
        num_shards: Shards that were scored; one is too few for error bars.
        formats: The menu.
        model: Its name.
        first_layer: What stands before a layer's number in names of modules.
        noise: Relative spread of a score over the shards.
        config: Fields of the config that differ.
        changes: Entries of ``run.json`` that differ.
    """
    groups: dict[str, Modules] = {}
    for layer in range(num_layers):
        for name, modules in _BLOCKS.items():
            start = f"{first_layer}.{layer}."
            groups[start + name] = {start + module: shape for module, shape in modules.items()}
    groups["lm_head"] = {"lm_head": (_VOCABULARY, _HIDDEN)}
    groups["visual.blocks.0.attn.qkv"] = {"visual.blocks.0.attn.qkv": (3 * _HIDDEN, _HIDDEN)}
    unsearched = {"visual.blocks.0.attn.qkv": "the data holds no images"}
    menu = resolve_formats(formats, device="cpu")
    directory = RunDirectory(str(folder))
    plan = [
        row
        for name, modules in groups.items()
        for row in _plan_rows(name, modules, [] if name in unsearched else menu)
    ]
    directory.write_table("plan.parquet", plan)
    searched = [row for row in plan if row["is_searched"] and row["format"] != NONE]
    _write_scores(directory, searched, num_shards, noise)
    values = {
        "schema_version": 1,
        "run_id": "some-run-20261101T020000Z",
        "created": "2026-11-01T02:00:00Z",
        "versions": _VERSIONS,
        "stages": {"score": {"state": "done", "seconds": 61.5}, "aggregate": {"state": "done"}},
        "quarantined": [],
        "config": _config(formats, model) | (config or {}),
        "model": {"name": model, "fingerprint": "3f" * 16},
        "dataset": _dataset(num_shards),
        "fingerprints": {"model": "3f" * 16, "data": "a7" * 16},
        "plan": {
            "formats": [entry.to_json() for entry in menu],
            "modules": {
                module: {"prefixes": [""], "shapes": [list(shape)]}
                for modules in groups.values()
                for module, shape in modules.items()
            },
            "unsearched": unsearched,
            "tied_groups": [],
            "other_bytes": 2 * _VOCABULARY * _HIDDEN,
            "other_modules": {},
            "flops_per_token": 1,
        },
    }
    directory.write_json("run.json", values | changes)
    return directory


def evaluation_row(directory: RunDirectory, **changes: Any) -> dict[str, Any]:
    """What ``evaluate`` would have written of the run's own solution."""
    sources = read_sources(ScoredRun.read(RunState.open(directory)), "")
    solution = sources.manifest["solution"]
    row = dict.fromkeys(SCHEMAS[EVALUATION_FILE].names, 0.0) | {
        "solution": "",
        "dataset": "held-out.jsonl",
        "data_key": "d",
        "name": "solution",
        "allocation": sources.key,
        "effective_bits": solution["effective_bits"],
        "weight_bytes": solution["weight_bytes"],
        "predicted_kl": solution["score"],
        "kl_mean": 2 * solution["score"],
        "kl_stderr": 0.1 * solution["score"],
        "num_tokens": 4096,
        "num_samples": 8,
    }
    return row | changes


def _plan_rows(name: str, modules: Modules, menu: Any) -> list[dict[str, Any]]:
    weights = sum(rows * columns for rows, columns in modules.values())
    sizes = {NONE: 16.0 * weights}
    for entry in menu:
        sizes[entry.name] = sum(stored_bits(entry.weight, shape) for shape in modules.values())
    return [
        {
            "group": name,
            "format": format_,
            "module_names": list(modules),
            "num_weights": weights,
            "weight_bits": bits / weights,
            "weight_bytes": bits / 8,
            "modelopt_cost": bits / 16,
            "is_searched": bool(menu),
        }
        for format_, bits in sizes.items()
    ]


def _write_scores(
    directory: RunDirectory, rows: list[dict[str, Any]], num_shards: int, noise: float
) -> None:
    """Scores fall with the bits; early and late layers and the head are more sensitive."""
    generator = np.random.default_rng(0)
    scales: dict[str, float] = {}
    for row in rows:
        is_special = "down_proj" in row["group"] or row["group"] == "lm_head"
        mean = 1.5 if is_special else 0.0
        scales.setdefault(row["group"], math.exp(generator.normal(mean, 1.0)))
    tokens = NUM_TOKENS // num_shards * num_shards
    sensitivity, buckets = [], []
    for row in rows:
        inputs, _, method = row["format"].rpartition("_a")[2].partition(":")
        input_loss = {"fp16": 0.0, "int8": 6e-4}.get(inputs, 2e-4)
        weight_loss = 0.9 * 2.0 ** (-2 * row["weight_bits"]) * METHODS.get(method, 1.0)
        score = scales[row["group"]] * (weight_loss + input_loss)
        shares = generator.gamma(1 / noise**2, noise**2, num_shards)
        sums = 2 * tokens / num_shards * score * shares
        mean, spread = sums.sum() / tokens / 2, float(np.var(sums / 2, ddof=1))
        error = math.sqrt(num_shards * spread) / tokens if num_shards > 1 else None
        total = float(sums.sum())
        sensitivity.append(
            {
                "group": row["group"],
                "format": row["format"],
                "score": float(mean),
                "score_stderr": error,
                "elementwise": total,
                "token": total,
                "modelopt_score": total,
                "num_tokens": tokens,
                "num_shards": num_shards,
                "weight_bits": row["weight_bits"],
                "weight_bytes": row["weight_bytes"],
                "sampling_stderr": 0.0,
            }
        )
        buckets.append(sums)
    directory.write_table("sensitivity.parquet", sensitivity)
    resampling = [
        {
            "bucket": shard,
            "group": row["group"],
            "format": row["format"],
            "sum": float(sums[shard]),
            "bucket_tokens": tokens // num_shards,
        }
        for shard in range(num_shards)
        for row, sums in zip(rows, buckets, strict=True)
    ]
    directory.write_table("resampling.parquet", resampling)


def _dataset(num_shards: int) -> dict[str, Any]:
    return {
        "name": "calibration.jsonl",
        "max_samples": 8 * num_shards,
        "seq_len": 1024,
        "counts": {"read": 8 * num_shards, "used": 8 * num_shards, "empty": 0, "too_short": 0}
        | {"cut": 3},
        "num_samples": 8 * num_shards,
        "num_tokens": NUM_TOKENS,
        "num_shards": num_shards,
    }


def _config(formats: tuple[str, ...], model: str) -> dict[str, Any]:
    """What a scan of the command line would have."""
    return {
        "model": model,
        "formats": list(formats),
        "custom_formats": {},
        "disable": [],
        "device": "cpu",
        "trust_remote_code": False,
        "data": "calibration.jsonl",
        "out": "runs/some-run",
        "text_field": "text",
        "split": "train",
        "pack": False,
        "samples": 128,
        "data_seed": 7,
        "seq_len": 1024,
        "step_tokens": 2048,
        "shard_samples": 8,
        "stop_when_stable": None,
        "bits": 6.0,
        "bytes": None,
        "bits_over": "searched",
        "cost": "storage",
        "max_formats": None,
        "estimator": "elementwise",
        "labels": "model",
        "label_draws": 1,
        "sample_rows": 1.0,
        "seed": 3,
        "dtype": "float32",
        "placement": "auto",
        "weight_cache_gib": "auto",
        "activation_cache_gib": 1.0,
        "workers": "auto",
        "gpus_per_worker": None,
        "cpus_per_worker": 1,
        "grace_s": 20.0,
        "address": "auto",
    }
