"""Our sums against the scores of ModelOpt's ``mtq.auto_quantize`` on the same batches."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch

from autoquant_ray.calibration import merge_statistics, to_maxima

FORMATS = (
    "INT8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)


def modelopt_scores(model: Any, batches: list[torch.Tensor], preset: str) -> dict[str, float]:
    """Scores of one format, searched alone so that ModelOpt's clamp cannot act."""

    def forward_step(model: Any, ids: torch.Tensor) -> Any:
        return model(input_ids=ids, use_cache=False)

    def loss_func(output: Any, ids: torch.Tensor) -> torch.Tensor:
        logits = output.logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            copy.deepcopy(model),
            constraints={"effective_bits": 15.0},
            quantization_formats=[getattr(mtq, preset)],
            data_loader=batches,
            forward_step=forward_step,
            loss_func=loss_func,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            disabled_layers=["*visual*"],
            verbose=False,
        )
    return {
        name.removesuffix(".quant_recipe"): stats["scores"][0]
        for name, stats in state["candidate_stats"].items()
        if len(stats["scores"]) == 2
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "qwen3_vl"])
def test_scores_one_step_per_shard_equal_modelopt(
    family: str, make_engine: Any, make_samples: Any
) -> None:
    prepared = make_engine(family, FORMATS)
    shards = [make_samples([24, 24, 24], seed=1), make_samples([17, 17], seed=2)]
    maxima = to_maxima(merge_statistics(prepared.engine.calibrate(shard) for shard in shards))
    ours = np.zeros((len(prepared.names), len(FORMATS)))
    for shard in shards:
        scores = prepared.engine.score(shard, 0, maxima)
        ours += scores.sums.elementwise_GF / scores.num_tokens**2

    batches = [torch.tensor(shard) for shard in shards]
    for index, preset in enumerate(FORMATS):
        theirs = modelopt_scores(prepared.model, batches, preset)
        assert set(theirs) == set(prepared.names)
        for group, name in enumerate(prepared.names):
            tolerance = 1e-3 if name.endswith("experts") else 1e-4
            assert ours[group, index] == pytest.approx(theirs[name], rel=tolerance), (name, preset)
