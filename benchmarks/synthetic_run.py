"""A scored run of any size, written as a scan leaves it: for benchmarks of what comes after it.

Layers have four groups of linears and, if asked for, single experts that are groups of their own.
Scores fall with the bits, with lognormal noise between groups and gamma noise between shards.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa

from autoquant_ray.arrays import Floats
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.formats.stored_size import stored_bits
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    PLAN_FILE,
    RESAMPLING_FILE,
    RUN_FILE,
    SCORES,
    SENSITIVITY_FILE,
    part_name,
)
from autoquant_ray.runs.schemas import schema_of
from autoquant_ray.runs.state import new_record

FORMATS = tuple(
    f"w{name}_afp16"
    for name in (
        *("int3", "int4", "int4_g64", "int4_g32", "int5", "int5_g64"),
        *("int6", "int6_g64", "int8", "fp4", "fp8", "int3_g64"),
    )
)
"""With 16 bits, 13 choices."""
BITS = 6.0
_TOKENS = 8192
_SHAPES = {
    "self_attn.q_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}
_EXPERT_SHAPES = ((768, 1024), (1024, 384))


def write_run(
    folder: str, num_groups: int, num_choices: int, *, num_shards: int, experts_per_layer: int
) -> RunDirectory:
    """Write a run without a solution.

    Args:
        folder: Where to.
        num_groups: Groups, all searched; the last layer may be cut.
        num_choices: Formats of a group, 16 bits among them.
        num_shards: Shards, each with its part.
        experts_per_layer: Experts of a layer, each a group of its own.
    """
    menu = resolve_formats(FORMATS[: num_choices - 1], device="cpu")
    modules = _modules(num_groups, experts_per_layer)
    directory = RunDirectory(folder)
    record = new_record(directory, _entries(folder, modules, menu, num_shards))
    directory.write_json(RUN_FILE, record.to_json())
    costs = {
        shapes: [sum(stored_bits(entry.weight, shape) for shape in shapes) for entry in menu]
        for shapes in {tuple(map(tuple, facts["shapes"])) for facts in modules.values()}
    }
    directory.write_table(PLAN_FILE, _plan_rows(modules, menu, costs))
    bits_GF = np.array([costs[tuple(map(tuple, f["shapes"]))] for f in modules.values()])
    _write_scores(directory, list(modules), [entry.name for entry in menu], bits_GF, num_shards)
    return directory


def _modules(num_groups: int, experts_per_layer: int) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = {}
    layer = 0
    while len(modules) < num_groups:
        start = f"model.layers.{layer}."
        for name, shape in _SHAPES.items():
            modules[start + name] = {"prefixes": [""], "shapes": [list(shape)]}
        for expert in range(experts_per_layer):
            modules[f"{start}mlp.experts.{expert}"] = {
                "prefixes": ["gate_up_proj_", "down_proj_"],
                "shapes": [list(shape) for shape in _EXPERT_SHAPES],
                "expert": expert,
            }
        layer += 1
    return dict(list(modules.items())[:num_groups])


def _num_weights(facts: dict[str, Any]) -> int:
    return sum(math.prod(shape) for shape in facts["shapes"])


def _plan_rows(
    modules: dict[str, dict[str, Any]], menu: Any, costs: dict[Any, list[float]]
) -> pa.Table:
    names = [*(entry.name for entry in menu), NONE]
    columns: dict[str, list[Any]] = {name: [] for name in schema_of(PLAN_FILE).names}
    for group, facts in modules.items():
        weights = _num_weights(facts)
        sizes = [*costs[tuple(map(tuple, facts["shapes"]))], 16.0 * weights]
        count = len(names)
        columns["group"] += [group] * count
        columns["format"] += names
        columns["module_names"] += [[group]] * count
        columns["num_weights"] += [weights] * count
        columns["weight_bits"] += [bits / weights for bits in sizes]
        columns["weight_bytes"] += [bits / 8 for bits in sizes]
        columns["modelopt_cost"] += [bits / 16 for bits in sizes]
        columns["is_searched"] += [True] * count
        columns["kv_bytes_per_token"] += [0.0] * count
    return pa.table(columns, schema=schema_of(PLAN_FILE))


def _write_scores(
    directory: RunDirectory, groups: list[str], menu: list[str], bits_GF: Floats, num_shards: int
) -> None:
    """``sensitivity.parquet``, ``resampling.parquet`` with a bucket per shard, and the parts."""
    generator = np.random.default_rng(0)
    weights_G1 = bits_GF.max(axis=1, keepdims=True)
    scales_G1 = generator.lognormal(0.0, 1.0, (len(groups), 1))
    average_GF = bits_GF / weights_G1 * 8
    score_GF = 1e-10 * weights_G1 * scales_G1 * 4.0**-average_GF
    score_GF = score_GF * generator.lognormal(0.0, 0.5, score_GF.shape)
    sums_SK = generator.gamma(4.0, 0.25, (num_shards, score_GF.size)) * (
        2 * _TOKENS * score_GF.ravel()
    )
    names = {
        "group": pa.array(groups).take(pa.array(np.repeat(np.arange(len(groups)), len(menu)))),
        "format": pa.array(menu * len(groups)),
    }
    count, num_tokens = score_GF.size, _TOKENS * num_shards
    zeros_K = np.zeros(count)
    bits_K, total_K = bits_GF.ravel(), sums_SK.sum(axis=0)
    error_K = 0.5 * np.sqrt(num_shards * sums_SK.var(axis=0, ddof=1)) / num_tokens
    sensitivity = names | {
        "score": 0.5 * total_K / num_tokens,
        "score_stderr": error_K,
        "elementwise": total_K,
        "token": total_K,
        "modelopt_score": total_K / _TOKENS**2,
        "num_tokens": np.full(count, num_tokens),
        "num_shards": np.full(count, num_shards),
        "weight_bits": bits_K / np.repeat(weights_G1, len(menu)),
        "weight_bytes": bits_K / 8,
        "sampling_stderr": zeros_K,
        "expert_tokens": pa.nulls(count, pa.list_(pa.int64())),
        "row_share": np.ones(count),
    }
    _write(directory, SENSITIVITY_FILE, sensitivity)
    for shard, sums_K in enumerate(sums_SK):
        part = {"shard": np.full(count, shard), **names}
        part |= {"elementwise_sum": sums_K, "token_sum": sums_K}
        part |= {"num_tokens": np.full(count, _TOKENS), "num_samples": np.full(count, 8)}
        part |= {"seconds": zeros_K, "elementwise_variance": zeros_K, "token_variance": zeros_K}
        part |= {"row_share": np.ones(count)}
        part |= {
            n: pa.nulls(count, pa.list_(pa.int64())) for n in ("expert_tokens", "sample_tokens")
        }
        part |= {
            n: pa.nulls(count, pa.list_(pa.float64())) for n in ("sample_sums", "drawing_variances")
        }
        _write(directory, part_name(SCORES, shard), part)
    buckets = {
        "bucket": np.repeat(np.arange(num_shards), count),
        "group": pa.concat_arrays([names["group"]] * num_shards),
        "format": pa.concat_arrays([names["format"]] * num_shards),
        "sum": sums_SK.ravel(),
        "bucket_tokens": np.full(count * num_shards, _TOKENS),
    }
    _write(directory, RESAMPLING_FILE, buckets)


def _write(directory: RunDirectory, name: str, columns: dict[str, Any]) -> None:
    directory.write_table(name, pa.table(columns, schema=schema_of(name)))


def _entries(
    folder: str, modules: dict[str, dict[str, Any]], menu: Any, num_shards: int
) -> dict[str, Any]:
    """Entries of ``run.json``."""
    experts = [name for name, facts in modules.items() if "expert" in facts]
    config = ScanConfig(
        model="synthetic",
        data="synthetic.txt",
        out=folder,
        formats=tuple(entry.name for entry in menu),
        bits=BITS,
        device="cpu",
        dtype="float32",
        expert_groups="expert" if experts else "layer",
    )
    num_samples, num_tokens = 8 * num_shards, _TOKENS * num_shards
    counts = dict.fromkeys(("empty", "too_short", "cut"), 0)
    sizes = {"num_samples": num_samples, "num_tokens": num_tokens, "num_shards": num_shards}
    return {
        "config": config.model_dump(mode="json"),
        "model": {"name": "synthetic", "fingerprint": "model"},
        "dataset": {
            "name": "synthetic.txt",
            "max_samples": num_samples,
            "seq_len": 1024,
            "counts": {"read": num_samples, "used": num_samples, **counts},
            **sizes,
        },
        "fingerprints": {"model": "model", "data": "data"},
        "used": sizes,
        "plan": {
            "formats": [entry.to_json() for entry in menu],
            "modules": modules,
            "unsearched": {},
            "tied_groups": [],
            "other_bytes": 2**27,
            "other_modules": {},
            "experts": experts,
            "idle_groups": [],
        },
    }
