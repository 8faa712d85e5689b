"""Tokens of routed experts: counted, kept, added up, and named where they are few."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.plan.silent_experts import experts_with_few_tokens
from autoquant_ray.quantize.calibration import Calibration, calibration_of_maxima
from autoquant_ray.runs.names import SCORES
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.solve import rewrite_reports, solve_run
from autoquant_ray.stages.aggregate import aggregate_parts, score_part

EXPERTS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


@pytest.fixture(scope="module")
def prepared(make_scorer: Any) -> Any:
    return make_scorer("qwen3_moe", ("wint8_aint8", "wint4_afp16:max"))


@pytest.fixture(scope="module")
def scored(prepared: Any, make_samples: Any) -> Any:
    """Two shards, the second with padding, and their scores."""
    shards = [make_samples([24, 24], seed=1), make_samples([17, 9, 5], seed=2)]
    calibration = calibration_of_maxima(dict.fromkeys(_maxima(prepared), 8.0))
    return shards, [prepared.scorer.score(shard, 0, calibration) for shard in shards]


def _maxima(prepared: Any) -> list[tuple[str, str]]:
    return [
        (module.name, f"{prefix}input_amax")
        for group in prepared.plan.searched
        for module in group.modules
        for prefix in module.quantizer_prefixes
    ]


def test_counts_are_those_of_the_routers_on_predicting_tokens(prepared: Any, scored: Any) -> None:
    for samples, scores in zip(*scored, strict=True):
        expected = {name: torch.zeros(8, dtype=torch.long) for name in EXPERTS}
        for sample in samples:
            for name, routes_TK in _routes(prepared.model, sample).items():
                # The last token predicts nothing, so nothing of it reaches the loss.
                expected[name] += torch.bincount(routes_TK[:-1].flatten(), minlength=8)
        counts = scores.sums.expert_tokens
        assert counts == {name: tokens.tolist() for name, tokens in expected.items()}
        assert sum(counts[EXPERTS[0]]) == 2 * scores.num_tokens  # two experts per token


def _routes(model: Any, sample: list[int]) -> dict[str, torch.Tensor]:
    """Experts ``(T, K)`` of each token, by the routers themselves."""
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name.replace("experts", "gate")).register_forward_hook(
            lambda _, __, out, name=name: outputs.update({name: out[-1]})
        )
        for name in EXPERTS
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def test_counts_do_not_depend_on_drawn_rows(scored: Any, make_scorer: Any) -> None:
    shards, scores = scored
    drawn = make_scorer("qwen3_moe", ("wint4_afp16:max",), row_share=0.3)
    expert_tokens = drawn.scorer.score(shards[1], 0, Calibration()).sums.expert_tokens
    assert expert_tokens == scores[1].sums.expert_tokens


def test_counts_add_up_over_shards_and_are_unknown_where_a_part_does_not_say(
    prepared: Any, scored: Any
) -> None:
    _, scores = scored
    formats = [format_.name for format_ in prepared.plan.formats]
    parts = [
        score_part(n, prepared.plan.score_keys, formats, shard_scores)
        for n, shard_scores in enumerate(scores)
    ]
    rows = aggregate_parts(parts, prepared.plan.rows(), "elementwise").rows
    for row in rows:
        counts = [shard_scores.sums.expert_tokens.get(row["group"]) for shard_scores in scores]
        is_experts = row["group"] in EXPERTS
        assert row["expert_tokens"] == (np.sum(counts, axis=0).tolist() if is_experts else None)
    nothing = {"expert_tokens": [None] * parts[0].num_rows}
    old = parts[0].drop_columns("expert_tokens").to_pydict() | nothing
    older = type(parts[0]).from_pydict(old, schema=SCHEMAS[SCORES])
    rows = aggregate_parts([older, parts[1]], prepared.plan.rows(), "elementwise").rows
    assert all(row["expert_tokens"] is None for row in rows)


def test_experts_with_few_tokens_are_found_once_per_group() -> None:
    rows = [
        {"group": group, "format": format_, "expert_tokens": tokens}
        for group, tokens in (("a", [40, 3, 0]), ("b", [32, 90, 33]), ("c", None))
        for format_ in ("x", "y")
    ]
    (few,) = experts_with_few_tokens(rows, 32)
    assert dataclasses.astuple(few) == ("a", (1, 2), 0, 3)
    assert experts_with_few_tokens(rows, 0) == []


def test_report_names_experts_with_few_tokens(make_run: Any) -> None:
    directory = make_run("qwen3_moe")
    rows = directory.read_table("sensitivity.parquet").to_pylist()
    for row in rows:
        row["expert_tokens"] = [50, 2, 31] if row["group"] == EXPERTS[1] else None
    directory.write_table("sensitivity.parquet", rows)
    solve_run(directory, SolveOptions(bits=8), folder="")
    report = directory.read_bytes("report.md").decode()
    said = "2 routed experts of 1 group saw fewer than 32 tokens, the fewest 2 in"
    assert f"{said} {EXPERTS[1]}" in report
    run = directory.read_json("run.json")
    run["config"]["min_expert_tokens"] = 2
    directory.write_json("run.json", run)
    rewrite_reports(directory)
    assert said not in directory.read_bytes("report.md").decode()
