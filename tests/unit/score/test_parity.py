"""Our sums against the scores of ModelOpt's ``mtq.auto_quantize`` on the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modelopt_scores import modelopt_scores, of_text, summed_by_step

from autoquant_ray.quantize.calibration import merge_calibrations

FORMATS = (
    "INT8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "qwen3_vl"])
def test_scores_one_step_per_shard_equal_modelopt(
    family: str, make_scorer: Any, make_samples: Any
) -> None:
    prepared = make_scorer(family, FORMATS, is_modelopt_form=True)
    shards = [make_samples([24, 24, 24], seed=1), make_samples([17, 17], seed=2)]
    calibration = merge_calibrations(prepared.scorer.calibrate(shard) for shard in shards)
    ours = summed_by_step(prepared.scorer, shards, calibration)

    batches = [of_text(torch.tensor(shard)) for shard in shards]
    theirs = modelopt_scores(prepared.model, batches, FORMATS)
    assert set(theirs) == set(prepared.names)
    for name, scores_F in zip(prepared.names, ours, strict=True):
        tolerance = 1e-3 if name.endswith("experts") else 1e-4
        expected = [theirs[name][preset] for preset in FORMATS]
        assert scores_F == pytest.approx(expected, rel=tolerance), name
