"""``evaluate --against modelopt-shapley``: ModelOpt's own scores, solved under our budget."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import modelopt
import modelopt.torch.quantization as mtq
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from packaging.version import Version

from autoquant_ray.allocate.candidate import make_candidate
from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.state import RunState

pytestmark = pytest.mark.skipif(
    Version(modelopt.__version__) < Version("0.48rc1"), reason="ModelOpt 0.47 has no such scores"
)

PRESETS = {
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "wint4_afp16:max",
    "INT8_DEFAULT_CFG": "wint8_aint8",
    "NONE": "none",
}
EVALUATE = ("--against", "modelopt-shapley", "--workers", "1", "--samples")


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> Path:
    run: Path = tmp_path_factory.mktemp("evaluated") / "run"
    extra = ("--samples", "6", "--workers", "1", "--bits", "6", "--disable", "lm_head")
    done = run_command(*scan_arguments(run, *extra))
    assert done.returncode == 0, done.stderr
    done = run_command("evaluate", run, *EVALUATE, "3")
    assert done.returncode == 0, done.stderr
    return run


def test_the_allocation_is_the_best_by_modelopts_scores(evaluated: Path, model_folder: Any) -> None:
    """Scores of a search that is called directly, all allocations tried."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    samples = [
        torch.tensor([tokens])
        for path in sorted((evaluated / "samples").iterdir())
        for tokens in pq.read_table(path)["tokens"].to_pylist()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": 12.0},
            quantization_formats=[getattr(mtq, preset) for preset in PRESETS if preset != "NONE"],
            data_loader=samples,
            forward_step=lambda m, ids: m(input_ids=ids, use_cache=False).logits[:, :-1],
            num_calib_steps=len(samples),
            num_score_steps=len(samples),
            disabled_layers=["*lm_head*"],
            method="aumann_shapley",
            verbose=False,
        )
    theirs = {
        (name.removesuffix(".quant_recipe"), PRESETS[str(recipe).partition("(")[0]]): score
        for name, stats in state["candidate_stats"].items()
        for recipe, score in zip(stats["formats"], stats["scores"], strict=True)
        if len(stats["formats"]) > 1
    }
    (part,) = (evaluated / "evaluation").glob("*/shapley/*.parquet")
    rows = pq.read_table(part).to_pylist()
    assert all(row["is_valid"] for row in rows)
    assert {(row["group"], row["format"]): row["score"] for row in rows} == pytest.approx(
        {pair: score for pair, score in theirs.items() if pair[1] != "none"}, rel=1e-5
    )

    plan = pq.read_table(evaluated / "plan.parquet").to_pylist()
    stored = {(r["group"], r["format"]): r["weight_bytes"] for r in plan if r["is_searched"]}
    weights = {r["group"]: r["num_weights"] for r in plan if r["is_searched"]}
    most = 6 * sum(weights.values()) / 8
    best = min(
        (
            dict(zip(weights, formats, strict=True))
            for formats in itertools.product(PRESETS.values(), repeat=len(weights))
            if math.fsum(stored[pair] for pair in zip(weights, formats, strict=True)) <= most
        ),
        key=lambda chosen: math.fsum(theirs[pair] for pair in chosen.items()),
    )
    run = ScoredRun.read(RunState.open(RunDirectory(str(evaluated))))
    measured = {r["name"]: r for r in pq.read_table(evaluated / "evaluation.parquet").to_pylist()}
    expected = make_candidate(run.problem, run.scores, "modelopt-shapley", best)
    assert measured["modelopt-shapley"]["allocation"] == expected.key
    assert measured["modelopt-shapley"]["kl_mean"] > 0


def test_other_data_is_measured_without_scoring_again(
    evaluated: Path, run_command: Any, watch: Any
) -> None:
    def scored() -> int:
        return sum(event["stage"] == "shapley" for event in watch.events(evaluated, "shard_done"))

    assert scored() == 1
    done = run_command("evaluate", evaluated, *EVALUATE, "2")
    assert done.returncode == 0, done.stderr
    assert scored() == 1
    rows = pq.read_table(evaluated / "evaluation.parquet").to_pylist()
    assert [row["name"] for row in rows].count("modelopt-shapley") == 2
