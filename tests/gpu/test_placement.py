"""Offloaded layers on one GPU, and a model split over two: the scores of a resident model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scoring_specs import scoring_spec

from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.score.scorer import Scorer

NUM_GPUS = torch.cuda.device_count()

pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="needs a CUDA device")


def make_scorer(
    folder: Path, placement: str, labels: str = "model", graph_bytes: int | None = 0
) -> Scorer:
    ref = find_model(str(folder))
    formats = resolve_formats(("wint4_afp16:max", "wfp8_afp8", "wint8_aint8"), device="cuda")
    plan = build_plan(build_skeleton(ref), formats)
    fields = {"labels": labels, "placement": placement, "graph_bytes": graph_bytes}
    return Scorer(scoring_spec(plan, model=ref, device="cuda", step_tokens=64, **fields))


def elementwise(scorer: Scorer, samples: Any) -> Any:
    calibration = scorer.calibrate(samples)
    return scorer.score(samples, 0, calibration).sums.elementwise_GF


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scores_offloaded_on_cuda_equal_resident(
    model_folder: Any, make_samples: Any, family: str
) -> None:
    samples = make_samples([24, 17, 31])
    resident = elementwise(make_scorer(model_folder(family), "resident"), samples)
    scorer = make_scorer(model_folder(family), "offload")
    offloaded = elementwise(scorer, samples)
    np.testing.assert_allclose(offloaded, resident, rtol=1e-6)
    assert (resident > 0).any()


@pytest.mark.parametrize("placement", ["resident", "offload"])
def test_scores_with_graphs_in_what_cuda_has_free_equal_those_without(
    model_folder: Any, make_samples: Any, placement: str
) -> None:
    samples, results = make_samples([24, 17, 31]), []
    for room in (0, None):
        scorer = make_scorer(model_folder("qwen3_moe"), placement, graph_bytes=room)
        calibration = scorer.calibrate(samples, 0)
        results.append([scorer.score(samples, 0, calibration, 0).sums.token_GF for _ in range(2)])
    assert scorer.product_room.nbytes > 2**20
    assert np.array_equal(results[0], results[1])


def test_offloaded_model_holds_two_layers_of_many(tmp_path: Path, make_samples: Any) -> None:
    save_deep_model(tmp_path, hidden_size=512, num_hidden_layers=16)
    samples = make_samples([24])
    peaks = {}
    for placement in ("offload", "resident"):
        torch.cuda.reset_peak_memory_stats()
        scorer = make_scorer(tmp_path, placement)
        elementwise(scorer, samples)
        peaks[placement] = torch.cuda.max_memory_allocated()
        layer = sum(p.numel() for p in scorer.model.model.layers[0].parameters()) * 4
        del scorer
    assert peaks["resident"] - peaks["offload"] > 10 * layer


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("labels", ["model", "data"])
def test_scores_of_a_split_model_equal_resident(
    tmp_path: Path, make_samples: Any, labels: str
) -> None:
    save_deep_model(tmp_path, hidden_size=64, num_hidden_layers=8)
    samples = make_samples([24, 17, 31])
    resident = elementwise(make_scorer(tmp_path, "resident", labels), samples)
    scorer = make_scorer(tmp_path, "split", labels)
    assert scorer.is_layerwise
    assert len({parameter.device for parameter in scorer.model.parameters()}) > 1
    np.testing.assert_allclose(elementwise(scorer, samples), resident, rtol=1e-6)


def save_deep_model(folder: Path, **sizes: int) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **sizes,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
