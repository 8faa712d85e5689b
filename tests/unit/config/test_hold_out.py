"""How much of the data is kept for measurements, by what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from autoquant_ray.config.hold_out import num_held_out, parse_hold_out


@pytest.mark.parametrize(
    ("hold_out", "num_samples", "number"),
    [
        ("auto", 19, 0),
        ("auto", 20, 2),
        ("auto", 29, 2),
        ("auto", 50, 5),
        ("auto", 128, 12),
        (0, 50, 0),
        (8, 50, 8),
        (0.2, 50, 10),
        (0.01, 50, 1),
    ],
)
def test_number_of_samples_kept(hold_out: Any, num_samples: int, number: int) -> None:
    assert num_held_out(hold_out, num_samples) == number


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", "auto"), ("0", 0), ("8", 8), ("20%", 0.2), ("0.2", 0.2)],
)
def test_text_is_a_number_a_share_or_auto(text: Any, value: Any) -> None:
    parsed = parse_hold_out(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("text", ["-1", "1.5", "100%", "nan", "half", "", None])
def test_anything_else_is_refused_with_examples(text: Any) -> None:
    with pytest.raises(ValueError, match="write for example 8 or 10%"):
        parse_hold_out(text)


def test_numbers_of_yaml_are_taken_as_they_are() -> None:
    parsed = [parse_hold_out(value) for value in (8, 0.25)]
    assert parsed == [8, 0.25]
    assert list(map(type, parsed)) == [int, float]
