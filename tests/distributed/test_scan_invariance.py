"""The promise: the same input gives byte-identical scores, whoever computed and whoever died."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.scan import run_search

FORMATS = (*(f"wint4_afp16:{method}" for method in ("max", "weighted", "gptq", "awq+gptq")),)
FORMATS += ("wint8_aint8", "NVFP4_AWQ_LITE_CFG", "kv_nvfp4")
KV_BYTES = 200
# Many draws make a shard slow enough that a kill lands in the middle of the scan.
FAMILY = "qwen3_moe"  # linears, routed experts and caches
SLOW = ("--shard-samples", "1", "--label-draws", "8", "--formats", ",".join(FORMATS))
SLOW = (*SLOW, "--kv-bytes-per-token", str(KV_BYTES), "--estimator", "sequence")
ALONE = ("--workers", "1", "--address", "local")  # its cluster ends with it


def sensitivity(run: Path) -> list[bytes]:
    """Scores with all estimators' sums, and the statistics and weights that they are made with."""
    names = ("sensitivity.parquet", "channels.parquet", "search.parquet", "rounding.parquet")
    return [(run / name).read_bytes() for name in names]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> Path:
    run: Path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command(*scan_arguments(run, *SLOW, "--workers", "1", family=FAMILY))
    assert done.returncode == 0, done.stderr
    return run


def test_what_is_compared_holds_roundings_of_routed_experts(undisturbed: Path) -> None:
    """Of experts that saw enough of so few tokens."""
    rows = parquet.read_table(undisturbed / "rounding.parquet").to_pylist()
    rounded = [row for row in rows if row["codes"] is not None]
    assert {row["format"] for row in rounded} == {"wint4_afp16:gptq", "wint4_afp16:awq+gptq"}
    assert any(row["module"].endswith("experts") and "." in row["part"] for row in rounded)


@pytest.mark.parametrize(("workers", "keep_graphs"), [(1, 0), (2, "auto"), (3, "100kB")])
def test_scan_any_number_of_workers_gives_identical_bytes(
    workers: int,
    keep_graphs: Any,
    ray_local: None,
    undisturbed: Path,
    tmp_path: Path,
    model_folder: Any,
    text_file: Path,
    watch: Any,
) -> None:
    config = ScanConfig(
        model=str(model_folder(FAMILY)),
        data=str(text_file),
        out=str(tmp_path / "run"),
        formats=FORMATS,
        bits=8,
        kv_bytes_per_token=KV_BYTES,
        estimator="sequence",
        shard_samples=1,
        label_draws=8,
        workers=workers,
        keep_graphs=keep_graphs,
    )
    result = run_search(config)
    assert result.quarantined == []
    assert sensitivity(tmp_path / "run") == sensitivity(undisturbed)
    ready = watch.events(tmp_path / "run", "worker_ready")
    assert 1 <= len({e["pid"] for e in ready}) <= workers


def test_scan_killed_worker_gives_identical_bytes(
    undisturbed: Path, tmp_path: Path, start_command: Any, scan_arguments: Any, watch: Any
) -> None:
    run = tmp_path / "run"
    watch.kill_worker(
        run, start_command(*scan_arguments(run, *SLOW, "--workers", "2", family=FAMILY)), after=2
    )
    assert sorted(watch.scored(run)) == list(range(12))
    assert sensitivity(run) == sensitivity(undisturbed)


def test_scan_killed_driver_resumes_without_repeating_finished_shards(
    undisturbed: Path,
    tmp_path: Path,
    start_command: Any,
    run_command: Any,
    scan_arguments: Any,
    watch: Any,
) -> None:
    run = tmp_path / "run"
    scan = start_command(*scan_arguments(run, *SLOW, *ALONE, family=FAMILY))
    finished = watch.kill_driver(run, scan, after=3)
    assert 3 <= len(finished) < 12
    assert not (run / "sensitivity.parquet").exists()

    before = len(watch.scored(run))
    other = ("--workers", "1", "--keep-graphs", "0")  # changes no number, so it may differ
    resumed = run_command(*scan_arguments(run, *SLOW, *other, "--resume", family=FAMILY))
    assert resumed.returncode == 0, resumed.stderr
    again = watch.scored(run)[before:]
    assert sorted(again) == [s for s in range(12) if f"shard-{s:06d}.parquet" not in finished]
    assert finished.items() <= watch.part_times(run).items()
    assert sensitivity(run) == sensitivity(undisturbed)


def test_scan_interrupted_by_sigterm_exits_130_and_resumes(
    undisturbed: Path,
    tmp_path: Path,
    start_command: Any,
    run_command: Any,
    scan_arguments: Any,
    watch: Any,
) -> None:
    run = tmp_path / "run"
    with start_command(*scan_arguments(run, *SLOW, *ALONE, family=FAMILY)) as scan:
        watch.wait_for(lambda: len(watch.scored(run)) >= 1, scan)
        scan.send_signal(signal.SIGTERM)
        _, stderr = scan.communicate()
    assert scan.returncode == 130
    assert "--resume" in stderr.splitlines()[-1]
    assert run_command(*scan_arguments(run, *SLOW, "--resume", family=FAMILY)).returncode == 0
    assert sensitivity(run) == sensitivity(undisturbed)
