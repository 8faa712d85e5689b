"""Which fields a stage's fingerprint depends on, by what the formats of a run are."""

from __future__ import annotations

from typing import Any

import pytest

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import changed_fields, stage_fingerprints
from autoquant_ray.formats.menu import resolve_formats


def config(formats: tuple[str, ...], **changes: Any) -> ScanConfig:
    values = {"model": "m", "data": "d", "out": "o", "formats": formats, "bits": 5.0}
    return ScanConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("name", "more", "counts"),
    [
        ("wint4_afp16", {}, True),
        ("wfp4_afp8", {}, True),
        ("wint5_g64_afp16", {}, True),
        ("wint8_afp16:weighted", {}, True),
        ("wint4_afp16:max", {}, False),
        ("wint8_afp16", {}, False),
        ("NVFP4_DEFAULT_CFG", {}, False),
        ("mine", {"custom_formats": {"mine": {"weight": {"num_bits": 4}}}}, False),
        ("wint4_afp16", {"custom_formats": {"wint4_afp16": {"weight": {"num_bits": 4}}}}, False),
        (
            "mine",
            {"custom_formats": {"mine": {"weight": {"num_bits": 4}, "algorithm": "weighted"}}},
            True,
        ),
    ],
)
def test_tokens_of_experts_count_where_weights_are_fitted_to_them(
    name: str, more: dict[str, Any], counts: bool
) -> None:
    before, after = (config((name,), min_expert_tokens=n, **more) for n in (8, 9))
    marks = [stage_fingerprints(c, "m", "d")["calibrate"] for c in (before, after)]
    assert (marks[0] != marks[1]) == counts
    changes = changed_fields(before.model_dump(mode="json"), after)
    assert changes == (["min_expert_tokens: 8 -> 9"] if counts else [])


def test_formats_of_a_run_count_as_they_were_recorded() -> None:
    """A bare name of an earlier version is plain, and its stages are done as they were."""
    before, after = (config(("wint4_afp16",), min_expert_tokens=n) for n in (8, 9))
    entry = resolve_formats(("wint4_afp16",), device="cpu")[0].to_json()
    menus = {"now": [entry], "earlier": [{k: v for k, v in entry.items() if k != "algorithm"}]}
    marks = {
        name: [stage_fingerprints(c, "m", "d", menu) for c in (before, after)]
        for name, menu in menus.items()
    }
    assert marks["earlier"][0] == marks["earlier"][1]
    assert marks["now"][0] == stage_fingerprints(before, "m", "d") != marks["now"][1]
    assert changed_fields(before.model_dump(mode="json"), after, menus["earlier"]) == []
    assert changed_fields(before.model_dump(mode="json"), after, menus["now"]) != []


def test_shares_of_rows_that_are_chosen_are_of_the_runs_estimator() -> None:
    """Another estimator scores again under ``auto``, and is only added up anew under a share."""
    marks = {
        (rows, estimator): stage_fingerprints(
            config(("wint8_afp16",), sample_rows=rows, estimator=estimator), "model", "data"
        )
        for rows in ("auto", 0.5)
        for estimator in ("elementwise", "token")
    }
    assert marks["auto", "elementwise"]["score"] != marks["auto", "token"]["score"]
    assert marks[0.5, "elementwise"]["score"] == marks[0.5, "token"]["score"]
    assert marks[0.5, "elementwise"]["score"] != marks["auto", "elementwise"]["score"]


def test_sums_over_sequences_are_made_where_they_are_asked_for() -> None:
    marks = {
        estimator: stage_fingerprints(
            config(("wint8_afp16",), estimator=estimator), "model", "data"
        )
        for estimator in ("elementwise", "token", "sequence")
    }
    assert marks["elementwise"]["score"] == marks["token"]["score"] != marks["sequence"]["score"]
    assert marks["elementwise"]["calibrate"] == marks["sequence"]["calibrate"]


@pytest.mark.parametrize("value", [0, -0.5, 1.5, "nan", "half", None])
def test_share_of_rows_that_is_none_is_refused_with_its_value(value: Any) -> None:
    with pytest.raises(ValueError, match="neither 'auto' nor a share, more than 0 and at most 1"):
        config(("wint8_afp16",), sample_rows=value)


@pytest.mark.parametrize("value", [0.5, "auto"])
def test_sums_over_sequences_of_drawn_rows_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"`sample_rows` {value} draws some; leave out"):
        config(("wint8_afp16",), sample_rows=value, estimator="sequence")
