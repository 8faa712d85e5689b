"""Fitted weights for workers that cannot read the run's files."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from autoquant_ray.calibrate.files import rounding_rows
from autoquant_ray.calibrate.stored_rounding import stored_rounding
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.quantize.calibration import Calibration, FittedCodes, FittedWeight
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import ROUNDING, ROUNDING_FILE, part_name
from autoquant_ray.runs.parts import Parts
from autoquant_ray.stages.shared_rounding import for_workers

FORMATS = resolve_formats(("wint4_afp16:gptq",), device="cpu")


@ray.remote
def codes_of(calibration: Calibration) -> list[Any]:
    """What a worker reads, under the rounding for shards of the first half."""
    return [calibration.for_shard(0).codes(key) for key in calibration.rounding]


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_workers_read_the_file_or_what_the_driver_shares(
    is_elsewhere: bool, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(str(tmp_path))
    draws = np.random.default_rng(0).integers(0, 256, (2, 3, 5000), np.uint8)
    for layer, (whole, *without) in enumerate(draws):
        codes = FittedCodes(damping=0.1, whole=whole, without=tuple(without))
        key = (f"layers.{layer}.q_proj", "", FORMATS[0].weight_key)
        rows = rounding_rows({key: FittedWeight(codes=codes)}, FORMATS)
        directory.write_table(part_name(ROUNDING, layer), rows)
    directory.write_tables(ROUNDING_FILE, Parts(directory, ROUNDING, range(2)))
    if is_elsewhere:
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    stored = Calibration(rounding=stored_rounding(directory, FORMATS), halves={0: 0})
    calibration = for_workers(directory, stored)
    assert (calibration is stored) == (not is_elsewhere)
    if is_elsewhere:
        directory.delete(ROUNDING_FILE)
    read = ray.get(codes_of.remote(ray.put(calibration)))
    assert np.array_equal(read, draws[:, 1])
