"""Another subset of the data by seed: same seed, same subset; no seed, as before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.stage_fields import changed_fields, stage_fingerprints
from autoquant_ray.data.texts import DataSpec, read_texts, shuffled
from autoquant_ray.errors import DataError

TEXTS = [f"text {number}" for number in range(200)]


def config(**changes: Any) -> ScanConfig:
    return ScanConfig(model="m", data="d.txt", out="o", bits=6, **changes)


def test_shuffled_without_seed_keeps_the_order() -> None:
    assert list(shuffled(TEXTS, None)) == TEXTS


def test_shuffled_is_a_permutation_that_the_seed_decides() -> None:
    orders = [list(shuffled(TEXTS, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == sorted(TEXTS) and order != TEXTS for order in orders)


def test_shuffled_is_the_same_on_every_machine() -> None:
    """Written out: a changed order would silently make tonight's data another."""
    assert "".join(shuffled("abcdefgh", 7)) == "cbdahgef"


@pytest.mark.parametrize("limits", [{"max_texts": 10}, {"max_characters": 80}])
def test_shuffled_reads_no_further_than_its_buffer(limits: dict[str, int]) -> None:
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    stream = shuffled(texts(), 3, **limits)
    first = [next(stream) for _ in range(5)]
    assert len(set(first)) == 5
    assert len(read) <= 20
    assert sorted([*first, *stream]) == sorted(TEXTS)


def test_shuffled_keeps_one_text_that_is_longer_than_the_buffer() -> None:
    assert sorted(shuffled(["a" * 50, "b" * 50], 0, max_characters=10)) == ["a" * 50, "b" * 50]


def test_read_texts_with_seed_gives_other_first_texts(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(TEXTS))

    def first(seed: int | None) -> list[str]:
        spec = DataSpec(source=str(path), num_samples=8, seq_len=8, shuffle_seed=seed)
        return list(read_texts(spec))[:8]

    assert first(None) == TEXTS[:8]
    assert first(1) == first(1) != first(2)


def test_read_texts_packed_text_file_with_seed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("one\ntwo\n")
    spec = DataSpec(source=str(path), num_samples=8, seq_len=8, pack=True, shuffle_seed=1)
    with pytest.raises(DataError, match="shuffle its lines"):
        read_texts(spec)


def test_data_seed_changes_every_stage_after_the_plan() -> None:
    marks = [stage_fingerprints(config(data_seed=seed), "m", "d") for seed in (None, 0, 1)]
    assert marks[0]["plan"] == marks[1]["plan"]
    for stage in ("shards", "calibrate", "score", "aggregate", "allocate"):
        assert len({mark[stage] for mark in marks}) == 3


def test_data_seed_none_keeps_the_fingerprints_of_runs_before_it_existed() -> None:
    """Their formats are all plain: no algorithm stands in their ``run.json``."""
    menu = [{"name": name} for name in config().formats]
    marks = stage_fingerprints(config(), "m", "d", menu)
    assert marks == FINGERPRINTS_OF_0_1


def test_changed_fields_sees_a_data_seed_that_an_older_run_lacks() -> None:
    before = config().model_dump(mode="json")
    del before["data_seed"]
    assert changed_fields(before, config()) == []
    assert changed_fields(before, config(data_seed=3)) == ["data_seed: None -> 3"]


FINGERPRINTS_OF_0_1 = {
    "plan": "3b0c5011f8447d84",
    "shards": "2aa8af1cc09f1d10",
    "calibrate": "32cb8f5180a0805b",
    "score": "2d03666d3cfb1766",
    "aggregate": "393a3963102ae83c",
    "allocate": "92d4e5de7b29cfec",
}
