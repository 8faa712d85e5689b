"""Patterns of foreign files: what they match, and that none of them can hang."""

from __future__ import annotations

import re
import time

import pytest

from autoquant_ray.config.patterns import matching_names

NAMES = [f"model.layers.{n}.{part}" for n in range(12) for part in ("self_attn.q_proj", "mlp.up")]


@pytest.mark.parametrize(
    "pattern",
    [
        "mlp",
        r".*self_attn.*",
        r"model\.layers\.(1|3)\..*",
        r"layers\.1\.",
        "q_proj$",
        "^model",
        "x",
    ],
)
def test_patterns_of_tools_fit_the_names_that_python_finds(pattern: str) -> None:
    assert matching_names(pattern, NAMES) == [n for n in NAMES if re.search(pattern, n)]
    assert matching_names(pattern, NAMES, from_start=True) == [
        n for n in NAMES if re.match(pattern, n)
    ]


def test_pattern_that_python_would_try_for_hours_takes_no_time() -> None:
    names = ["a" * 5000 + "!"] * 100
    start = time.perf_counter()
    assert matching_names(r"(a+)+$", names) == []
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("pattern", "text"), [("(", "missing"), (r"(?!x)y", "invalid perl"), ("a" * 2000, "too long")]
)
def test_pattern_that_cannot_be_read_is_a_value_error(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"(?i){text}") as caught:
        matching_names(pattern, NAMES)
    assert len(str(caught.value)) < 200
