"""Columns of the Parquet files of a run directory."""

from __future__ import annotations

import pyarrow as pa

_STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_SENSITIVITY = {
    "group": _STRING,
    "format": _STRING,
    "score": _FLOAT,
    "score_stderr": _FLOAT,
    "elementwise": _FLOAT,
    "token": _FLOAT,
    "modelopt_score": _FLOAT,
    "num_tokens": _INT,
    "num_shards": _INT,
    "weight_bits": _FLOAT,
    "weight_bytes": _FLOAT,
    "sampling_stderr": _FLOAT,
    "expert_tokens": pa.list_(_INT),
}
_BUCKET = {
    "bucket": _INT,
    "group": _STRING,
    "format": _STRING,
    "sum": _FLOAT,
    "bucket_tokens": _INT,
}
_TENSOR = {"name": _STRING, "dtype": _STRING, "shape": pa.list_(_INT), "data": pa.binary()}

SCHEMAS: dict[str, pa.Schema] = {
    "plan": pa.schema(
        {
            "group": _STRING,
            "format": _STRING,
            "module_names": pa.list_(_STRING),
            "num_weights": _INT,
            "weight_bits": _FLOAT,
            "weight_bytes": _FLOAT,
            "modelopt_cost": _FLOAT,
            "is_searched": pa.bool_(),
            "kv_bytes_per_token": _FLOAT,
        }
    ),
    "samples": pa.schema(
        {
            "sample": _INT,
            "tokens": pa.list_(pa.int32()),
            "in_loss": pa.list_(pa.bool_()),
            "tensors": pa.list_(pa.struct(_TENSOR)),
        }
    ),
    "calibration": pa.schema({"module": _STRING, "statistic": _STRING, "value": _FLOAT}),
    "channels": pa.schema(
        {
            "module": _STRING,
            "largest": pa.list_(pa.float32()),
            "sum": pa.list_(_FLOAT),
            "num_tokens": _INT,
        }
    ),
    "search": pa.schema({"module": _STRING, "format": _STRING, "alpha": _FLOAT, "loss": _FLOAT}),
    "scores": pa.schema(
        {
            "shard": _INT,
            "group": _STRING,
            "format": _STRING,
            "elementwise_sum": _FLOAT,
            "token_sum": _FLOAT,
            "num_tokens": _INT,
            "num_samples": _INT,
            "seconds": _FLOAT,
            "elementwise_variance": _FLOAT,
            "token_variance": _FLOAT,
            "expert_tokens": pa.list_(_INT),
        }
    ),
    "sensitivity": pa.schema(_SENSITIVITY),
    "domain_sensitivity": pa.schema(_SENSITIVITY | {"domain": _STRING}),
    "domains": pa.schema(
        {"shard": _INT, "domain": _STRING, "num_samples": _INT, "num_tokens": _INT}
    ),
    "divergences": pa.schema(
        {
            "sample": _INT,
            "kl": pa.list_(pa.float32()),
            "loss": pa.list_(pa.float32()),
            "reference_loss": pa.list_(pa.float32()),
            "agrees": pa.list_(pa.bool_()),
        }
    ),
    "evaluation": pa.schema(
        {
            "solution": _STRING,
            "dataset": _STRING,
            "data_key": _STRING,
            "name": _STRING,
            "allocation": _STRING,
            "effective_bits": _FLOAT,
            "weight_bytes": _FLOAT,
            "predicted_kl": _FLOAT,
            "kl_mean": _FLOAT,
            "kl_stderr": _FLOAT,
            "kl_p50": _FLOAT,
            "kl_p95": _FLOAT,
            "kl_p99": _FLOAT,
            "perplexity": _FLOAT,
            "reference_perplexity": _FLOAT,
            "top1_agreement": _FLOAT,
            "kl_above_solution": _FLOAT,
            "kl_above_solution_stderr": _FLOAT,
            "num_tokens": _INT,
            "num_samples": _INT,
        }
    ),
    "audit": pa.schema(
        {
            "solution": _STRING,
            "group": _STRING,
            "format": _STRING,
            "predicted": _FLOAT,
            "predicted_stderr": _FLOAT,
            "measured": _FLOAT,
            "measured_stderr": _FLOAT,
            "ratio": _FLOAT,
            "num_samples": _INT,
            "data_key": _STRING,
        }
    ),
    "resampling": pa.schema(_BUCKET),
    "domain_resampling": pa.schema({"domain": _STRING} | _BUCKET),
    "frontier": pa.schema(
        {
            "effective_bits": _FLOAT,
            "weight_bytes": _FLOAT,
            "predicted_kl": _FLOAT,
            "is_knee": pa.bool_(),
        }
    ),
    "manifest": pa.schema(
        {
            "module": _STRING,
            "group": _STRING,
            "format": _STRING,
            "weight_bits": _FLOAT,
            "weight_bytes": _FLOAT,
            "score": _FLOAT,
        }
    ),
    "history": pa.schema(
        {
            "job": _STRING,
            "run": _STRING,
            "run_id": _STRING,
            "date": _STRING,
            "started": _STRING,
            "finished": _STRING,
            "status": _STRING,
            "verdict": _STRING,
            "baseline": _STRING,
            "predicted_kl_nats": _FLOAT,
            "effective_bits": _FLOAT,
            "weight_bytes": _INT,
            "num_changed": pa.int32(),
            "num_moved": pa.int32(),
            "min_spearman": _FLOAT,
            "num_shards": pa.int32(),
            "seconds": _FLOAT,
            "exit_code": pa.int32(),
            "error": _STRING,
        }
    ),
}
"""Columns of every Parquet file of a run, and of the history of a folder of runs; part folders use
the schema of their name."""

ADDED_COLUMNS = {
    "elementwise_variance",
    "token_variance",
    "sampling_stderr",
    "bucket_tokens",
    "expert_tokens",
    "in_loss",
    "tensors",
    "kv_bytes_per_token",
}
"""Columns that earlier versions, or samples of plain text, do not have; null where they are
missing."""
