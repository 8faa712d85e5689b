"""Fitted weights in a run's file: where they are is all that is in memory before they are used."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store import KEYS, ObjectStore

from autoquant_ray.calibrate.files import rounding_rows
from autoquant_ray.calibrate.stored_rounding import StoredRounding, stored_rounding
from autoquant_ray.errors import StoreError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.quantize.calibration import (
    Calibration,
    FittedCodes,
    FittedWeight,
    FittedWeights,
)
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import ROUNDING, ROUNDING_FILE, part_name
from autoquant_ray.runs.parts import Parts

FORMATS = resolve_formats(("wint4_afp16:gptq", "wint8_afp16:weighted"), device="cpu")
NUM_LAYERS, NUM_WEIGHTS = 3, 200_000


def fits_of(layer: int) -> dict[tuple[str, str, str], FittedWeight]:
    """Codes of two weights of a layer, and multiples of scales of one of them."""
    draws = np.random.default_rng(layer).integers(0, 256, (7, NUM_WEIGHTS), np.uint8)
    gptq, weighted = (format_.weight_key for format_ in FORMATS)
    codes = [
        FittedCodes(damping=0.1, whole=rows[0], without=(rows[1], rows[2]))
        for rows in (draws[:3], draws[3:6])
    ]
    return {
        (f"layers.{layer}.q_proj", "", gptq): FittedWeight(codes=codes[0]),
        (f"layers.{layer}.q_proj", "", weighted): FittedWeight(multipliers=draws[6]),
        (f"layers.{layer}.experts", "down_proj.3", gptq): FittedWeight(codes=codes[1]),
    }


def written(uri: str) -> tuple[RunDirectory, FittedWeights]:
    """A run with the file of fitted weights, and what is in it."""
    directory, fits = RunDirectory(uri), [fits_of(layer) for layer in range(NUM_LAYERS)]
    for layer, fitted in enumerate(fits):
        directory.write_table(part_name(ROUNDING, layer), rounding_rows(fitted, FORMATS))
    directory.write_tables(ROUNDING_FILE, Parts(directory, ROUNDING, range(NUM_LAYERS)))
    return directory, {key: fit for fitted in fits for key, fit in fitted.items()}


def require_equal(ours: FittedWeights, expected: FittedWeights) -> None:
    assert list(ours) == list(expected)
    for key, fit in expected.items():
        stored = ours[key]
        if fit.codes is None:
            assert stored.codes is None
            assert np.array_equal(stored.multipliers, fit.multipliers)  # type: ignore[arg-type]
            continue
        assert stored.multipliers is None
        assert stored.codes is not None
        assert stored.codes.damping == fit.codes.damping
        assert np.array_equal(stored.codes.whole, fit.codes.whole)
        assert all(map(np.array_equal, stored.codes.without, fit.codes.without))


def test_file_gives_what_was_fitted_also_to_a_process_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory, fits = written("run")
    rounding = stored_rounding(directory, FORMATS)
    require_equal(rounding, fits)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    require_equal(pickle.loads(pickle.dumps(rounding)), fits)
    only = [key for key in fits if key[2] == FORMATS[0].weight_key]
    assert list(stored_rounding(RunDirectory(f"{tmp_path}/run"), FORMATS[:1])) == only


def test_object_store_gives_what_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    store = ObjectStore()
    try:
        directory, fits = written(store.uri("stored-rounding"))
        rounding = stored_rounding(directory, FORMATS)
        require_equal(pickle.loads(pickle.dumps(rounding)), fits)
    finally:
        store.stop()


def test_what_is_given_to_workers_holds_no_codes(tmp_path: Path) -> None:
    """Neither before nor after codes were used."""
    directory, _ = written(str(tmp_path))
    calibration = Calibration(rounding=stored_rounding(directory, FORMATS))
    assert len(pickle.dumps(calibration)) < NUM_WEIGHTS // 10
    for key in calibration.rounding:
        calibration.codes(key)
    assert len(pickle.dumps(calibration)) < NUM_WEIGHTS // 10


def test_columns_of_a_layer_are_read_once_and_no_others(tmp_path: Path) -> None:
    directory, _ = written(str(tmp_path))
    reads = []

    class Watched:
        def read(self, number: int, columns: Sequence[str]) -> Any:
            reads.append((number, *columns))
            return directory.read_row_group(ROUNDING_FILE, number, columns)

    stored = stored_rounding(directory, FORMATS).at(Watched())
    calibration = Calibration(rounding=stored, halves={0: 0, 1: 1})
    for shard in (None, 1):
        for key in stored:
            calibration.for_shard(shard).codes(key)
    layers = range(NUM_LAYERS)
    assert reads == [(n, "codes") for n in layers] + [(n, "codes_by_unseen_half") for n in layers]


def test_lost_or_cut_file_is_named_in_one_line(tmp_path: Path) -> None:
    directory, fits = written(str(tmp_path))
    rounding: StoredRounding = stored_rounding(directory, FORMATS)
    file = tmp_path / ROUNDING_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(StoreError, match=f"{ROUNDING_FILE} is damaged"):
        stored_rounding(directory, FORMATS)
    key = next(iter(fits))
    with pytest.raises(StoreError, match=f"{ROUNDING_FILE} is damaged"):
        Calibration(rounding=rounding).codes(key)
    file.unlink()
    with pytest.raises(StoreError, match=f"{ROUNDING_FILE} does not exist"):
        Calibration(rounding=rounding).codes(key)
