"""Every sentence of doubt: said where it holds, with its numbers, and only there."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autoquant_ray.report.concerns import find_concerns
from autoquant_ray.report.evidence import ChosenFormat, Evidence
from autoquant_ray.report.measured import verdict

LOSSES = {"a": 0.020, "b": 0.018, "c": 0.016, "d": 0.015, "e": 0.031}


def evidence(**changes: Any) -> Evidence:
    """A plan that nothing is wrong with, unless something is changed."""
    values: dict[str, Any] = {
        "predicted": 0.1,
        "stderr": 0.004,
        "effective_bits": 5.5,
        "choices": [
            ChosenFormat(group=name, format="wint4_afp16", score=loss, stderr=0.1 * loss)
            for name, loss in LOSSES.items()
        ],
        "num_shards": 16,
        "labels": "model",
        "expected_regret": 0.001,
        "null": 0.3,
    }
    values["choices"] = [c for c in values["choices"] if c.score < 0.025]
    return Evidence(**(values | changes))


def measured(kl: float, predicted: float = 0.1, **rivals: tuple[float, float | None]) -> Any:
    """Rows of one data set: the solution, and rivals with what they lose more and its error."""
    solution = {"name": "solution", "dataset": "held-out", "kl_mean": kl, "predicted_kl": predicted}
    others = [
        {
            "name": name.replace("_", " "),
            "kl_mean": kl + more,
            "kl_above_solution": more,
            "kl_above_solution_stderr": error,
        }
        for name, (more, error) in rivals.items()
    ]
    return [[solution, *others]]


def titles(facts: Evidence) -> list[str]:
    return [concern.title for concern in find_concerns(facts)]


def only(facts: Evidence) -> str:
    """The text of the one concern there is."""
    (concern,) = find_concerns(facts)
    return concern.text


def test_sound_allocation_has_none() -> None:
    assert find_concerns(evidence()) == []
    assert find_concerns(evidence(measured=measured(0.12, uniform_x=(0.1, 0.01)))) == []


def test_unmet_budget_is_grave() -> None:
    (concern,) = find_concerns(evidence(is_satisfied=False))
    assert (concern.title, concern.is_grave) == ("The budget is not met", True)


def test_large_group_is_named_with_its_share() -> None:
    choices = [
        ChosenFormat(
            group="model.layers.1.mlp.down_proj", format="wfp8_afp8", score=0.06, stderr=None
        ),
        ChosenFormat(group="b", format="wint4_afp16", score=0.04, stderr=None),
    ]
    facts = evidence(choices=choices)
    assert titles(facts) == ["One group takes most of the loss"]
    assert "model.layers.1.mlp.down_proj in wfp8_afp8 takes 60%" in only(facts)
    assert "'explain' with model.layers.1.mlp.down_proj shows" in only(facts)


def test_group_of_a_quarter_takes_much_and_less_is_not_named() -> None:
    def with_largest(score: float) -> Evidence:
        rest = ChosenFormat(group="rest", format="f", score=0.01, stderr=None)
        large = ChosenFormat(group="large", format="f", score=score, stderr=None)
        return evidence(choices=[rest, large])

    assert titles(with_largest(0.025)) == ["One group takes much of the loss"]
    assert titles(with_largest(0.024)) == []


def test_wide_error_bar_says_how_wide() -> None:
    assert "0.1 ± 0.012, a relative error of 12%" in only(evidence(stderr=0.012))
    assert titles(evidence(stderr=0.0099)) == []
    assert titles(evidence(stderr=None)) == []


def test_scores_within_their_error_are_named_with_their_share() -> None:
    choices = [
        ChosenFormat(group=f"g{n}", format="wfp8_afp8", score=0.001, stderr=0.001) for n in range(4)
    ]
    choices.append(ChosenFormat(group="sure", format="wfp8_afp8", score=0.001, stderr=0.0009))
    text = only(evidence(choices=choices))
    assert text.startswith("4 chosen formats with a score no larger than its standard error")
    assert "4.0% of the predicted loss: g0 (wfp8_afp8), g1 (wfp8_afp8), g2 (wfp8_afp8)" in text
    assert "and 1 more" in text
    assert "sure" not in text


def test_few_bits_are_doubted_until_they_are_measured() -> None:
    assert "At 4.90 bits (below 5)" in only(evidence(effective_bits=4.9))
    assert titles(evidence(effective_bits=4.9999)) == [], "a budget of 5 bits, nearly used up"
    assert titles(evidence(effective_bits=4.0, measured=measured(0.11))) == []


def test_single_format_of_few_bits_is_predicted_too_low() -> None:
    text = only(evidence(effective_bits=4.13, uniform="wint4_afp16"))
    assert text.startswith("All quantized groups are in wint4_afp16, at 4.13 bits (below 4.5)")
    assert "1.4 to 1.5 times the predicted one" in text
    assert "'evaluate'" in text
    for facts in (
        evidence(effective_bits=4.5, uniform="wfp4_afp16"),
        evidence(effective_bits=4.13),
    ):
        assert "layers interact" in only(facts)
    assert titles(evidence(effective_bits=8.0, uniform="wfp8_afp16")) == []
    measured_already = evidence(effective_bits=4.13, uniform="f", measured=measured(0.14))
    assert titles(measured_already) == []


@pytest.mark.parametrize(("kl", "shown"), [(0.16, "1.6 times"), (0.05, "0.5 times"), (0.14, None)])
def test_measured_beyond_the_range_is_told(kl: float, shown: str | None) -> None:
    facts = evidence(measured=measured(kl))
    if shown is None:
        assert find_concerns(facts) == []
    else:
        assert titles(facts) == ["The prediction does not hold"]
        assert f"Measured on held-out, the loss is {shown} the prediction" in only(facts)


def test_nothing_measured_has_no_ratio() -> None:
    assert find_concerns(evidence(measured=measured(0.0))) == []


def test_loss_of_which_nothing_was_predicted_is_told() -> None:
    facts = evidence(measured=[[measured(0.25)[0][0] | {"predicted_kl": 0.0}]])
    assert "The prediction does not hold" in titles(facts)
    row = facts.measured[0][0] | {"kl_above_equal": None}
    assert verdict([row]) == (
        "The prediction does not hold: no loss was predicted, and 0.25 nats per token were "
        "measured."
    )
    assert verdict([row | {"kl_mean": 1e-9}]) == "Nothing was lost."


def test_allocation_that_breaks_the_model_is_grave() -> None:
    (concern,) = find_concerns(evidence(measured=measured(math.inf)))
    assert (concern.title, concern.is_grave) == ("The solution breaks the model", True)


def test_rival_that_is_surely_better_is_grave() -> None:
    rivals = measured(0.1, uniform_wfp8_afp8=(-0.03, 0.01), modelopt=(-0.01, 0.002))
    (concern,) = find_concerns(evidence(measured=rivals))
    assert concern.is_grave
    assert "uniform wfp8 afp8 loses 0.07 nats per token, this solution 0.1" in concern.text
    assert find_concerns(evidence(measured=measured(0.1, modelopt=(-0.01, 0.006)))) == []


def test_coin_tosses_matter_only_with_regret() -> None:
    facts = evidence(coin_tosses=["a", "b"], expected_regret=0.02)
    assert titles(facts) == ["Coin tosses that matter"]
    text = only(facts)
    assert "2 groups with an undecided format, together 38.0% of the predicted loss: a, b." in text
    assert "expected to cost 2.0%" in text
    assert titles(evidence(coin_tosses=["a", "b"], expected_regret=0.005)) == []
    assert titles(evidence(expected_regret=0.02)) == []


def test_allocation_near_the_null_is_grave() -> None:
    (concern,) = find_concerns(evidence(null=0.105))
    assert concern.is_grave
    assert "the predicted loss is 0.105; this solution has 0.1." in concern.text
    assert find_concerns(evidence(null=0.12)) == []


def test_each_shard_left_out_is_named() -> None:
    left_out = [{"shard": n, "stage": "score", "reason": "a NaN in the loss"} for n in (3, 7)]
    concerns = find_concerns(evidence(quarantined=left_out))
    assert [c.title for c in concerns] == ["Data was left out"] * 2
    assert "Shard 3 was left out in the stage score: a NaN in the loss." in concerns[0].text


def test_labels_of_the_data_are_biased() -> None:
    assert "--labels model" in only(evidence(labels="data"))


@pytest.mark.parametrize(
    ("num_shards", "shown"),
    [(1, "a single shard"), (7, "from 7 shards; with fewer than 8"), (8, None), (None, None)],
)
def test_few_shards_are_told(num_shards: int | None, shown: str | None) -> None:
    concerns = find_concerns(evidence(num_shards=num_shards))
    assert [shown in concern.text for concern in concerns if shown] == [True] * (shown is not None)
    assert len(concerns) == (shown is not None)


def test_grave_ones_come_first() -> None:
    facts = evidence(measured=[*measured(0.3), *measured(math.inf)], labels="data")
    assert [c.is_grave for c in find_concerns(facts)] == [True, False, False]


def test_allocation_that_loses_nothing_has_none() -> None:
    facts = evidence(predicted=0.0, stderr=0.0, choices=[], null=None, effective_bits=16.0)
    assert find_concerns(facts) == []
    assert find_concerns(evidence(predicted=0.0, stderr=0.0, choices=[], null=0.0)) == []


def test_allocation_for_domains_is_not_held_against_allocations_for_all_tokens() -> None:
    better = measured(0.1, modelopt=(-0.05, 0.001))
    assert "Another allocation loses less" in titles(evidence(measured=better))
    assert titles(evidence(measured=better, by_domain=True)) == []
    assert titles(evidence(null=0.01, objective=0.001)) == []
    assert "this solution has 0.02" in only(evidence(null=0.01, objective=0.02))


def test_allocation_that_measurements_chose_is_not_held_against_its_scores() -> None:
    doubts = {"coin_tosses": ["a"], "expected_regret": 0.5, "null": 0.01}
    assert len(titles(evidence(**doubts))) == 2
    assert titles(evidence(**doubts, by_measurement=True)) == []


def test_imported_allocation_at_few_bits_is_not_sent_to_evaluate() -> None:
    assert titles(evidence(effective_bits=4.0)) == ["Below the range of the prediction"]
    assert titles(evidence(effective_bits=4.0, labels=None)) == []
