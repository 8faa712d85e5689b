"""Measurements and nights on a disk that fills up: a line that says so, then they go on."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

COMMANDS = {
    "evaluate": ("--num-random", "2", "--seq-len", "512"),
    "refine": ("--trials", "6", "--seq-len", "512"),
}
RESULTS = {
    "evaluate": ("evaluation.parquet", "report.md"),
    "refine": ("solutions/scan-refined/manifest.parquet", "evaluation.parquet"),
}


@pytest.fixture(scope="module")
def disk() -> Iterator[Any]:
    """``benchmarks/drill_disk.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("drill_disk")
        patch.delitem(sys.modules, "drill_disk")


@pytest.fixture(scope="module")
def scanned(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> Path:
    run: Path = tmp_path_factory.mktemp("scanned") / "run"
    done = run_command(*scan_arguments(run, "--samples", "6", "--shard-samples", "1"))
    assert done.returncode == 0, done.stderr
    return run


def assert_says_that_the_disk_is_full(done: Any) -> None:
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left on device" in last
    assert "free space there" in last
    assert "Traceback" not in done.stderr
    assert len(last) <= 400


@pytest.mark.parametrize("free_kib", [8, 48])
@pytest.mark.parametrize("command", COMMANDS)
def test_measurement_on_a_full_disk_goes_on_once_there_is_room(
    command: str, free_kib: int, disk: Any, scanned: Path, tmp_path: Path, run_command: Any
) -> None:
    whole = Path(shutil.copytree(scanned, tmp_path / "whole"))
    words = COMMANDS[command]
    assert run_command(command, whole, *words).returncode == 0
    try:
        with disk.small_disk(tmp_path / "disk", size_mib=16) as small:
            run = Path(shutil.copytree(scanned, small / "run"))
            disk.fill(small / "ballast", but=free_kib * 1024)
            assert_says_that_the_disk_is_full(run_command(command, run, *words))
            (small / "ballast").unlink()
            again = run_command(command, run, *words)
            assert again.returncode == 0, again.stderr
            for name in RESULTS[command]:
                assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    except PermissionError as error:
        pytest.skip(str(error))


def test_night_on_a_full_disk_goes_on_once_there_is_room(
    disk: Any,
    tmp_path: Path,
    model_folder: Any,
    text_file: Path,
    cluster_address: str,
    run_command: Any,
) -> None:
    job = {"kind": "nightly", "name": "tiny", "model": str(model_folder("llama")), "bits": 8}
    job |= {"data": str(text_file), "formats": ["wint4_afp16:max", "wint8_aint8"]}
    job |= {"shard_samples": 2, "workers": 1, "address": cluster_address}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))

    def night(runs: Path) -> Any:
        return run_command("nightly", path, "--runs", runs, "--date", "2026-11-01")

    assert night(tmp_path / "whole").returncode == 0
    try:
        with disk.small_disk(tmp_path / "disk", size_mib=16) as small:
            disk.fill(small / "ballast", but=64 * 1024)
            assert_says_that_the_disk_is_full(night(small / "runs"))
            (small / "ballast").unlink()
            again = night(small / "runs")
            assert again.returncode == 0, again.stderr
            name = "tiny-2026-11-01/sensitivity.parquet"
            assert (small / "runs" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    except PermissionError as error:
        pytest.skip(str(error))
