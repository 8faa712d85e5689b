"""Columns of the Parquet files of a run directory."""

from __future__ import annotations

import pyarrow as pa

_STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
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
        }
    ),
    "samples": pa.schema({"sample": _INT, "tokens": pa.list_(pa.int32())}),
    "calibration": pa.schema({"module": _STRING, "statistic": _STRING, "value": _FLOAT}),
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
        }
    ),
    "sensitivity": pa.schema(
        {
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

ADDED_COLUMNS = {"elementwise_variance", "token_variance", "sampling_stderr"}
"""Columns that earlier versions did not write; null where they are missing."""
