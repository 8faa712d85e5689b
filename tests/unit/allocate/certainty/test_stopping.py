"""When a scan stops: fixed numbers of shards, decided in the order of the shards."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from records import make_record

from autoquant_ray.allocate.allocation import Allocation
from autoquant_ray.allocate.certainty.resampling import assess
from autoquant_ray.allocate.certainty.stopping import (
    StoppingRule,
    budget_knapsack,
    check_counts,
    describe_stopping,
    part_sums,
)
from autoquant_ray.allocate.manifest import solution_summary
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import STAGE_FIELDS, stage_fingerprints
from autoquant_ray.config.values import parse_share
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.runs.names import SCORES
from autoquant_ray.runs.schemas import SCHEMAS

FORMATS = ("wint4_afp16", "wint8_aint8")


@pytest.fixture(scope="module")
def plan(make_model: Any) -> Any:
    return build_plan(make_model("llama"), resolve_formats(FORMATS, device="cpu"))


@pytest.fixture
def make_rule(plan: Any) -> Any:
    """A rule for the small Llama at 7 bits; keywords replace its arguments."""

    def build(**changes: Any) -> StoppingRule:
        problem = Problem.from_plan(plan.rows(), plan.summary())
        arrays = budget_knapsack(problem, SolveOptions(bits=7), FORMATS)
        values = {"threshold": 0.01, "num_shards": 30, "seed": 0} | changes
        return StoppingRule(arrays, **values)

    return build


def made_up_sums(plan: Any, num_shards: int, shape: float, seed: int = 0) -> list[Any]:
    """Sums of each shard; the smaller ``shape``, the noisier."""
    rng = np.random.default_rng(seed)
    truth_GF = rng.uniform(0.5, 20, size=(len(plan.searched), 1)) * [1.0, 2.0**-8]
    noise_SGF = rng.gamma(shape, 1 / shape, size=(num_shards, *truth_GF.shape))
    return list((noise_SGF * truth_GF).reshape(num_shards, -1))


@pytest.mark.parametrize(
    ("num_shards", "counts"),
    [
        (1, [1]),
        (7, [7]),
        (8, [8]),
        (9, [8, 9]),
        (12, [8, 12]),
        (13, [8, 12, 13]),
        (100, [8, 12, 18, 27, 40, 60, 90, 100]),
    ],
)
def test_check_counts(num_shards: int, counts: list[int]) -> None:
    assert check_counts(num_shards) == counts


def test_rule_identical_shards_stop_at_the_first_check(make_rule: Any, plan: Any) -> None:
    rule = make_rule()
    sums_K = made_up_sums(plan, 1, 1.0)[0]
    assert [rule.add(shard, sums_K) for shard in range(8)] == [False] * 7 + [True]
    summary = rule.summary()
    assert (summary["shards_used"], summary["shards_total"], summary["is_stable"]) == (8, 30, True)
    assert summary["expected_regret"] == 0
    assert summary["checks"] == [{"shards": 8, "expected_regret": 0.0}]


def test_rule_very_noisy_shards_do_not_stop(make_rule: Any, plan: Any) -> None:
    rule = make_rule()
    sums = made_up_sums(plan, 30, 0.02)
    assert not any(rule.add(shard, sums_K) for shard, sums_K in enumerate(sums))
    summary = rule.summary()
    assert summary["shards_used"] == 30
    assert [check["shards"] for check in summary["checks"]] == [8, 12, 18, 27, 30]
    assert summary["expected_regret"] > 0.01


def test_rule_stops_where_the_regret_falls_below_the_threshold(make_rule: Any, plan: Any) -> None:
    """The regret of each check is that of the first shards alone."""
    sums = made_up_sums(plan, 30, 0.3)
    patient = make_rule(threshold=1e-9)
    for shard, sums_K in enumerate(sums):
        patient.add(shard, sums_K)
    regrets = {check.shards: check.expected_regret for check in patient.checks}
    assert regrets[12] < regrets[8]
    knapsack = make_rule()._knapsack
    first_SGF = np.stack(sums[:12]).reshape(12, len(plan.searched), 2)
    alone = assess(knapsack, np.pad(first_SGF, ((0, 0), (0, 0), (0, 1))), (0, 12))
    assert alone is not None
    assert regrets[12] == alone.expected_regret
    rule = make_rule(threshold=(regrets[12] + regrets[8]) / 2)
    added = [rule.add(shard, sums_K) for shard, sums_K in enumerate(sums)]
    assert added == [False] * 11 + [True] * 19
    assert rule.end == 12
    assert rule.summary()["shards_used"] == 12


def test_rule_any_order_of_arrival_gives_the_same_decision(make_rule: Any, plan: Any) -> None:
    sums: list[Any] = made_up_sums(plan, 30, 0.3)
    sums[3] = sums[14] = sums[20] = None
    patient = make_rule(threshold=1e-9)
    for shard in range(30):
        patient.add(shard, sums[shard])
    threshold = 1.01 * patient.checks[1].expected_regret
    summaries, ends = [], []
    rng = np.random.default_rng(0)
    orders = [list(range(30)), list(range(30))[::-1], *(rng.permutation(30) for _ in range(10))]
    for order in orders:
        rule = make_rule(threshold=threshold)
        for shard in order:
            rule.add(int(shard), sums[shard])
        summaries.append(rule.summary())
        ends.append(rule.end)
    assert summaries == [summaries[0]] * len(orders)
    assert ends == [ends[0]] * len(orders)
    assert 8 < ends[0] < 30


def test_rule_left_out_shards_do_not_count(make_rule: Any, plan: Any) -> None:
    sums_K = made_up_sums(plan, 1, 1.0)[0]
    rule = make_rule()
    added = [rule.add(shard, None if shard in (2, 5) else sums_K) for shard in range(10)]
    assert added == [False] * 9 + [True]
    assert rule.end == 10
    assert rule.summary()["shards_used"] == 8


def test_rule_last_shard_left_out_still_gives_a_last_check(make_rule: Any, plan: Any) -> None:
    rule = make_rule(num_shards=6)
    sums = made_up_sums(plan, 6, 0.02)
    for shard in range(5):
        rule.add(shard, sums[shard])
    assert rule.checks == []
    rule.add(5, None)
    assert [check.shards for check in rule.checks] == [5]


def test_rule_every_shard_left_out_has_no_check(make_rule: Any) -> None:
    rule = make_rule(num_shards=3)
    assert not any(rule.add(shard, None) for shard in range(3))
    assert rule.summary()["expected_regret"] is None


def test_rule_group_without_a_score_is_not_stable(make_rule: Any, plan: Any) -> None:
    """Zeros for what no shard has seen would look like certainty."""
    sums = np.array(made_up_sums(plan, 1, 1.0) * 12).reshape(12, len(plan.searched), 2)
    sums[:9, 1] = np.nan
    rule = make_rule()
    added = [rule.add(shard, sums_GF.reshape(-1)) for shard, sums_GF in enumerate(sums)]
    assert not any(added[:11])
    assert [check.shards for check in rule.checks] == [8, 12]
    assert rule.checks[0].expected_regret is None
    assert rule.checks[1].expected_regret is not None


def test_rule_seed_changes_the_resamples_alone(make_rule: Any, plan: Any) -> None:
    regrets = []
    for seed in (0, 0, 1):
        rule = make_rule(seed=seed, threshold=1e-9)
        for shard, sums_K in enumerate(made_up_sums(plan, 30, 0.3)):
            rule.add(shard, sums_K)
        regrets.append([check.expected_regret for check in rule.checks])
    assert regrets[0] == regrets[1] != regrets[2]


def test_part_sums_keep_order_and_mark_the_unseen() -> None:
    rows = [
        {"elementwise_sum": 1.0, "token_sum": 2.0},
        {"elementwise_sum": None, "token_sum": None},
        {"elementwise_sum": 3.0, "token_sum": 4.0},
    ]
    part = pa.Table.from_pylist(rows, schema=SCHEMAS[SCORES])
    assert part_sums(part, "elementwise").tolist() == pytest.approx([1, np.nan, 3], nan_ok=True)
    assert part_sums(part, "token").tolist() == pytest.approx([2, np.nan, 4], nan_ok=True)


LIMITS = {
    "effective_bits": ({"bits": 9}, 9),
    "effective_bits_all": ({"bits": 12, "bits_over": "all"}, 12),
    "modelopt_effective_bits": ({"bits": 12, "bits_over": "all", "cost": "modelopt"}, 12),
    "weight_bytes": ({"bytes": 175_000}, 175_000),
}


@pytest.mark.parametrize(
    "names", [*((name,) for name in LIMITS), ("effective_bits", "weight_bytes")]
)
def test_budget_problem_allows_what_the_manifest_calls_satisfied(
    names: tuple[str, ...], make_model: Any
) -> None:
    """Every allocation of a model with a tied head and unsearched layers."""
    formats = resolve_formats(FORMATS, device="cpu")
    small = build_plan(make_model("qwen3"), formats, disable=("*.layers.1.*",))
    problem = Problem.from_plan(small.rows(), small.summary())
    options = SolveOptions(**{k: v for name in names for k, v in LIMITS[name][0].items()})
    arrays = budget_knapsack(problem, options, FORMATS)
    columns = [*FORMATS, "none"]
    verdicts = []
    for chosen in itertools.product(range(3), repeat=len(small.searched)):
        chosen_formats = {
            group.name: columns[column]
            for group, column in zip(small.searched, chosen, strict=True)
        }
        allocation = Allocation(
            formats=chosen_formats, score=0.0, costs={}, optimality_gap=0.0, is_satisfied=True
        )
        summary = solution_summary(problem, allocation, scores_are_nats=True)
        verdicts.append(all(summary[name] <= LIMITS[name][1] for name in names))
        assert arrays.is_within(np.array(chosen)) == verdicts[-1]
    assert 0.1 < np.mean(verdicts) < 0.9


RUN = {
    "dataset": {"num_shards": 40, "num_samples": 320, "num_tokens": 9000},
    "used": {"num_shards": 12, "num_samples": 96, "num_tokens": 2700},
}


def stopping(regret: float | None, is_stable: bool) -> dict[str, Any]:
    return {
        "threshold": 0.01,
        "shards_used": 12,
        "shards_total": 40,
        "is_stable": is_stable,
        "expected_regret": regret,
        "checks": [],
    }


@pytest.mark.parametrize(
    ("regret", "is_stable", "words"),
    [
        (0.0042, True, ["stable: expected regret 0.42%", ", below 1%"]),
        (0.031, False, ["not stable: expected regret 3.10%", "not below 1%"]),
        (None, False, ["the expected regret is unknown"]),
    ],
)
def test_describe_stopping_says_how_much_was_used(
    regret: float | None, is_stable: bool, words: list[str]
) -> None:
    text = describe_stopping(make_record(**RUN, stopping=stopping(regret, is_stable)))
    assert text is not None
    assert text.startswith("12 of 40 shards (96 of 320 samples, 2700 of 9000 tokens); ")
    assert all(part in text for part in words)


def test_describe_stopping_of_other_scans_is_nothing() -> None:
    assert describe_stopping(make_record(**RUN)) is None


@pytest.mark.parametrize(
    ("text", "share"),
    [("0.01", 0.01), (0.5, 0.5), ("1%", 0.01), (" 2.5 % ", 0.025), ("1e-3", 1e-3)],
)
def test_parse_share(text: float | str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


def marks(**changes: Any) -> dict[str, str]:
    values = {"model": "m", "data": "d", "out": "o", "bits": 8} | changes
    return stage_fingerprints(ScanConfig.model_validate(values), model="m", data="d")


def test_fingerprint_of_scores_knows_the_budget_only_where_it_matters() -> None:
    assert marks(bits=8)["score"] == marks(bits=7)["score"]
    stopped = marks(bits=8, stop_when_stable=0.1)
    assert stopped["score"] != marks(bits=8)["score"]
    assert stopped["score"] == marks(bits=8, stop_when_stable="10%")["score"]
    assert stopped["score"] != marks(bits=7, stop_when_stable=0.1)["score"]
    assert stopped["score"] != marks(bits=8, stop_when_stable=0.1, estimator="token")["score"]
    assert stopped["calibrate"] == marks(bits=7)["calibrate"]
    assert "stop_when_stable" in STAGE_FIELDS["score"]
