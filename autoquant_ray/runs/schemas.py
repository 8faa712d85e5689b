"""Columns of the Parquet files of a run directory."""

from __future__ import annotations

import pyarrow as pa

from autoquant_ray.runs.names import (
    ANSWERS,
    AUDIT_FILE,
    CALIBRATION,
    CALIBRATION_FILE,
    CHANNELS,
    CHANNELS_FILE,
    DOMAIN_RESAMPLING_FILE,
    DOMAIN_SCORES_FILE,
    DOMAINS_FILE,
    EVALUATION,
    EVALUATION_FILE,
    FLIPS,
    FRONTIER_FILE,
    HISTORY_FILE,
    MANIFEST_TABLE,
    PLAN_FILE,
    RESAMPLING_FILE,
    ROUNDING,
    ROUNDING_FILE,
    SAMPLES,
    SCORES,
    SEARCH,
    SEARCH_FILE,
    SENSITIVITY_FILE,
    SHAPLEY,
    TASKS_FILE,
    is_part,
)

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
    "row_share": _FLOAT,
}
_BUCKET = {
    "bucket": _INT,
    "group": _STRING,
    "format": _STRING,
    "sum": _FLOAT,
    "bucket_tokens": _INT,
}
_TENSOR = {"name": _STRING, "dtype": _STRING, "shape": pa.list_(_INT), "data": pa.binary()}
_CALIBRATION = pa.schema({"module": _STRING, "statistic": _STRING, "value": _FLOAT})
_CHANNELS = pa.schema(
    {
        "module": _STRING,
        "largest": pa.list_(pa.float32()),
        "sum": pa.list_(_FLOAT),
        "num_tokens": _INT,
        "square_sum": pa.list_(_FLOAT),
        "part": _STRING,
    }
)
_SEARCH = pa.schema({"module": _STRING, "format": _STRING, "alpha": _FLOAT, "loss": _FLOAT})
_ROUNDING = pa.schema(
    {
        "module": _STRING,
        "part": _STRING,
        "format": _STRING,
        "multipliers": pa.large_binary(),
        "damping": _FLOAT,
        "codes": pa.large_binary(),
        "codes_by_unseen_half": pa.list_(pa.large_binary()),
    }
)

SCHEMAS: dict[str, pa.Schema] = {
    PLAN_FILE: pa.schema(
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
    SAMPLES: pa.schema(
        {
            "sample": _INT,
            "tokens": pa.list_(pa.int32()),
            "in_loss": pa.list_(pa.bool_()),
            "tensors": pa.list_(pa.struct(_TENSOR)),
        }
    ),
    CALIBRATION: _CALIBRATION,
    CALIBRATION_FILE: _CALIBRATION,
    CHANNELS: _CHANNELS,
    CHANNELS_FILE: _CHANNELS,
    SEARCH: _SEARCH,
    SEARCH_FILE: _SEARCH,
    ROUNDING: _ROUNDING,
    ROUNDING_FILE: _ROUNDING,
    SCORES: pa.schema(
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
            "row_share": _FLOAT,
            "sample_sums": pa.list_(_FLOAT),
            "sample_tokens": pa.list_(_INT),
            "drawing_variances": pa.list_(_FLOAT),
            "sequence_sum": _FLOAT,
        }
    ),
    SENSITIVITY_FILE: pa.schema(_SENSITIVITY),
    DOMAIN_SCORES_FILE: pa.schema(_SENSITIVITY | {"domain": _STRING}),
    DOMAINS_FILE: pa.schema(
        {"shard": _INT, "domain": _STRING, "num_samples": _INT, "num_tokens": _INT}
    ),
    EVALUATION: pa.schema(
        {
            "sample": _INT,
            "kl": pa.list_(pa.float32()),
            "loss": pa.list_(pa.float32()),
            "reference_loss": pa.list_(pa.float32()),
            "agrees": pa.list_(pa.bool_()),
        }
    ),
    FLIPS: pa.schema(
        {
            "group": _STRING,
            "format": _STRING,
            "partner": _STRING,
            "partner_format": _STRING,
            "slope": _FLOAT,
            "curvature": _FLOAT,
            "interaction": _FLOAT,
            "kl": _FLOAT,
            "num_tokens": _INT,
        }
    ),
    EVALUATION_FILE: pa.schema(
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
            "kl_above_equal": _FLOAT,
            "kl_above_equal_stderr": _FLOAT,
            "num_tokens": _INT,
            "num_samples": _INT,
        }
    ),
    AUDIT_FILE: pa.schema(
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
    ANSWERS: pa.schema(
        {"request": _INT, "log_likelihood": _FLOAT, "is_greedy": pa.bool_(), "text": _STRING}
    ),
    SHAPLEY: pa.schema(
        {"group": _STRING, "format": _STRING, "score": _FLOAT, "is_valid": pa.bool_()}
    ),
    TASKS_FILE: pa.schema(
        {
            "solution": _STRING,
            "name": _STRING,
            "allocation": _STRING,
            "effective_bits": _FLOAT,
            "weight_bytes": _FLOAT,
            "task": _STRING,
            "task_version": _STRING,
            "num_fewshot": _INT,
            "metric": _STRING,
            "filter": _STRING,
            "higher_is_better": pa.bool_(),
            "value": _FLOAT,
            "stderr": _FLOAT,
            "num_samples": _INT,
            "difference": _FLOAT,
            "difference_stderr": _FLOAT,
        }
    ),
    RESAMPLING_FILE: pa.schema(_BUCKET),
    DOMAIN_RESAMPLING_FILE: pa.schema({"domain": _STRING} | _BUCKET),
    FRONTIER_FILE: pa.schema(
        {
            "effective_bits": _FLOAT,
            "weight_bytes": _FLOAT,
            "predicted_kl": _FLOAT,
            "is_knee": pa.bool_(),
        }
    ),
    MANIFEST_TABLE: pa.schema(
        {
            "module": _STRING,
            "group": _STRING,
            "format": _STRING,
            "weight_bits": _FLOAT,
            "weight_bytes": _FLOAT,
            "score": _FLOAT,
        }
    ),
    HISTORY_FILE: pa.schema(
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
"""Columns of every Parquet file of a run, and of the history of a folder of runs, by the name of
the file; of parts by the name of their folder."""

ADDED_COLUMNS = {
    "elementwise_variance",
    "token_variance",
    "sampling_stderr",
    "bucket_tokens",
    "expert_tokens",
    "row_share",
    "sample_sums",
    "sample_tokens",
    "drawing_variances",
    "sequence_sum",
    "square_sum",
    "part",
    "in_loss",
    "tensors",
    "kv_bytes_per_token",
    "kl_above_equal",
    "kl_above_equal_stderr",
}
"""Columns that earlier versions, or samples of plain text, do not have; null where they are
missing."""


def schema_of(name: str) -> pa.Schema:
    """Columns of a file of a run, or of a folder of runs.

    Args:
        name: Path inside the run. A solution's files have the columns of the scan's own; samples
            that an evaluation reads lie below its folder, beside what it measured.
    """
    *folders, file = name.split("/")
    if not is_part(file):
        return SCHEMAS[file]
    return SCHEMAS[folders[-1] if folders[-1] in SCHEMAS else folders[0]]
