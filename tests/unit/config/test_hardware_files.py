"""Hardware files: what the shipped cards say and where from, and what a wrong file is told."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoquant_ray.allocate.cards import FOLDER, load_hardware, shipped_cards
from autoquant_ray.errors import ConfigError

PRINTED = {
    # Bytes per second, and rates as the datasheets print them: [dense, or with sparsity halved].
    "a100": (2.039e12, {"16x16": 312e12, "int8xint8": 624e12, "int4xint4": 1248e12}),
    "b200": (
        7.7e12,
        {
            "16x16": 4.5e15 / 2,
            "fp8xfp8": 9e15 / 2,
            "int8xint8": 9e15 / 2,
            "fp4xfp4": 18e15 / 2,
            "fp4xfp8": 9e15 / 2,
        },
    ),
    "h100": (3.35e12, {"16x16": 1979e12 / 2, "fp8xfp8": 3958e12 / 2, "int8xint8": 3958e12 / 2}),
    "h200": (4.8e12, {"16x16": 1979e12 / 2, "fp8xfp8": 3958e12 / 2, "int8xint8": 3958e12 / 2}),
    "rtx4090": (
        1.008e12,
        {"16x16": 165.2e12, "fp8xfp8": 330.3e12, "int8xint8": 660.6e12, "int4xint4": 1321.2e12},
    ),
}


def test_shipped_cards_are_the_known_ones() -> None:
    assert shipped_cards() == sorted(PRINTED)


@pytest.mark.parametrize("card", sorted(PRINTED))
def test_shipped_card_says_what_its_datasheet_prints_dense(card: str) -> None:
    hardware = load_hardware(card)
    bandwidth, rates = PRINTED[card]
    assert hardware.memory_bandwidth.value == bandwidth
    assert {pair: figure.value for pair, figure in hardware.matmul_rates.items()} == rates


@pytest.mark.parametrize("card", sorted(PRINTED))
def test_every_shipped_figure_has_its_source(card: str) -> None:
    figures = _figures(yaml.safe_load((FOLDER / f"{card}.yaml").read_text()))
    assert len(figures) >= 4
    for figure in figures:
        assert set(figure) == {"value", "source"}
        named = ("datasheet", "whitepaper", "Benchmarking Guide", "documentation")
        assert any(word in figure["source"] for word in named)
    shares = [figure for figure in figures if float(figure["value"]) <= 1]
    for share in shares:  # "... 3.18 of 3.35 TB/s"
        achieved, _, peak = share["source"].rpartition(": ")[2].split(" ")[:3]
        assert share["value"] == pytest.approx(float(achieved) / float(peak), abs=1e-3)


def _figures(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, dict):
        return []
    figures = [value] if "value" in value else []
    return figures + [figure for item in value.values() for figure in _figures(item)]


def test_shipped_cards_are_package_data() -> None:
    project = Path(__file__).parents[3] / "pyproject.toml"
    data = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]
    matched = {path for glob in data["autoquant_ray.allocate"] for path in FOLDER.parent.glob(glob)}
    assert matched == set(FOLDER.iterdir())


def test_rate_without_units_is_the_16_bit_rate() -> None:
    card = load_hardware("a100")
    assert card.rate("fp8", "fp8") == 312e12
    assert not card.has_units("fp8", "fp8")
    assert card.rate("int4", "int4") == 1248e12
    assert card.has_units("int4", "int4")
    assert card.has_units("int4", "16")


GOOD = {
    "name": "Card",
    "memory_bandwidth": {"value": 1e12, "source": "measured here"},
    "matmul_rates": {"16x16": {"value": 1e14, "source": "measured here"}},
}


def test_own_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert load_hardware(str(path)).bytes_per_second() == 1e12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "green"}, "colour: unknown key; known: name, memory_bandwidth"),
        ({"memory_bandwidth": {"value": 1e12}}, "memory_bandwidth.source is missing"),
        ({"memory_bandwidth": {"value": 1, "source": " "}}, "memory_bandwidth.source"),
        (
            {"memory_bandwidth": {"value": 0, "source": "x"}},
            "memory_bandwidth.value.*above|greater",
        ),
        ({"memory_bandwidth": {"value": True, "source": "x"}}, "must be a number"),
        ({"memory_bandwidth": {"value": 1, "source": "x", "sauce": 1}}, "unknown key; closest"),
        ({"bandwidth_share": {"value": 1.2, "source": "x"}}, "bandwidth_share.value.*1.2"),
        ({"matmul_rates": {"fp8xfp8": {"value": 1, "source": "x"}}}, "16x16 is missing"),
        ({"matmul_rates": {"fp8": {"value": 1, "source": "x"}}}, "'fp8' is not a pair"),
        ({"matmul_rates": None}, "matmul_rates"),
    ],
)
def test_wrong_file_is_refused_in_one_line(change: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(ConfigError, match=words) as caught:
        load_hardware(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", ["h1000", "no/such.yaml", ""])
def test_unknown_card_is_refused_with_the_known_ones(named: str) -> None:
    with pytest.raises(ConfigError, match="a100, b200, h100, h200, rtx4090"):
        load_hardware(named)
