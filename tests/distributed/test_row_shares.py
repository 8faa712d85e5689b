"""Shares of rows that the first shards decide: the same bytes, whoever scored them and when."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.scan import run_search

FIRST, SHARDS = 2, 12
FORMATS = ("wint4_afp16:max", "wint8_afp16", "wint8_aint8")
# Many draws make a shard slow enough that a kill lands in the middle of the scan.
SLOW = ("--shard-samples", "4", "--label-draws", "6", "--sample-rows", "auto", "--hold-out", "0")
SLOW += ("--formats", ",".join(FORMATS))
ALONE = ("--workers", "1", "--address", "local")  # its cluster ends with it


@pytest.fixture(scope="session")
def long_file(tmp_path_factory: pytest.TempPathFactory, make_samples: Any) -> Path:
    """Forty-eight lines of 50 to 97 words."""
    path: Path = tmp_path_factory.mktemp("long") / "calibration.txt"
    samples = make_samples(list(range(50, 98)))
    path.write_text("".join(" ".join(f"w{t}" for t in sample) + "\n" for sample in samples))
    return path


@pytest.fixture(scope="session")
def arguments(scan_arguments: Any, text_file: Path, long_file: Path) -> Callable[..., list[Any]]:
    """Arguments of a scan of the long lines."""

    def build(out: Path, *extra: str) -> list[Any]:
        words = scan_arguments(out, *SLOW, *extra)
        return [long_file if word == text_file else word for word in words]

    return build


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, run_command: Any, arguments: Any) -> Path:
    run: Path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command(*arguments(run, "--workers", "1"))
    assert done.returncode == 0, done.stderr
    assert "after 2 shard(s) on all rows" in done.stderr
    return run


def scores(run: Path) -> bytes:
    return (run / "sensitivity.parquet").read_bytes()


def part(run: Path, shard: int) -> Any:
    return parquet.read_table(run / "scores" / f"shard-{shard:06d}.parquet")


def test_first_shards_are_whole_and_the_others_are_drawn(undisturbed: Path) -> None:
    shares = [part(undisturbed, shard).column("row_share").to_numpy() for shard in range(SHARDS)]
    assert all((shares[shard] == 1).all() for shard in range(FIRST))
    assert all(np.array_equal(shares[shard], shares[FIRST]) for shard in range(FIRST, SHARDS))
    assert 0.05 <= shares[FIRST].min() <= 0.7
    for shard in range(SHARDS):
        is_first = shard < FIRST
        assert (part(undisturbed, shard).column("drawing_variances").null_count == 0) is is_first
        noise = part(undisturbed, shard).column("elementwise_variance").to_numpy()
        assert ((noise > 0) == (shares[shard] < 1)).all()
    rows = parquet.read_table(undisturbed / "sensitivity.parquet").to_pylist()
    drawn = [row for row in rows if row["row_share"] < 1]
    assert drawn
    assert np.median([row["sampling_stderr"] / row["score_stderr"] for row in drawn]) < 0.15


def test_scores_of_drawn_rows_are_those_of_all_rows_within_their_error(
    undisturbed: Path, tmp_path: Path, run_command: Any, arguments: Any
) -> None:
    run = tmp_path / "run"
    done = run_command(*arguments(run, "--workers", "2", "--sample-rows", "1"))
    assert done.returncode == 0, done.stderr
    exact = parquet.read_table(run / "sensitivity.parquet").to_pylist()
    rows = parquet.read_table(undisturbed / "sensitivity.parquet").to_pylist()
    deviations = []
    for row, other in zip(rows, exact, strict=True):
        assert (row["group"], row["format"]) == (other["group"], other["format"])
        assert other["row_share"] == 1
        if row["sampling_stderr"] == 0:
            assert row["score"] == pytest.approx(other["score"], rel=1e-5)
        else:
            deviations.append((row["score"] - other["score"]) / row["sampling_stderr"])
    assert np.sqrt(np.mean(np.square(deviations))) == pytest.approx(1, abs=0.5)


def test_three_workers_give_identical_bytes(
    undisturbed: Path, tmp_path: Path, run_command: Any, arguments: Any
) -> None:
    done = run_command(*arguments(tmp_path / "run", "--workers", "3"))
    assert done.returncode == 0, done.stderr
    assert scores(tmp_path / "run") == scores(undisturbed)


def test_killed_worker_gives_identical_bytes(
    undisturbed: Path, tmp_path: Path, start_command: Any, arguments: Any, watch: Any
) -> None:
    """While the first shards are scored."""
    run = tmp_path / "run"
    watch.kill_worker(run, start_command(*arguments(run, "--workers", "2")), after=1)
    assert scores(run) == scores(undisturbed)


def test_killed_driver_resumes_to_identical_bytes_and_repeats_nothing(
    undisturbed: Path,
    tmp_path: Path,
    start_command: Any,
    run_command: Any,
    arguments: Any,
    watch: Any,
) -> None:
    run = tmp_path / "run"
    kept = watch.kill_driver(run, start_command(*arguments(run, *ALONE)), after=4)
    assert 4 <= len(kept) < SHARDS
    done = run_command(*arguments(run, "--workers", "1", "--resume"))
    assert done.returncode == 0, done.stderr
    assert kept.items() <= watch.part_times(run).items()
    assert scores(run) == scores(undisturbed)


def test_lost_first_part_is_made_again_and_the_shares_with_it(
    undisturbed: Path, tmp_path: Path, run_command: Any, arguments: Any, watch: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "scores" / "shard-000000.parquet").unlink()
    (run / "sensitivity.parquet").unlink()
    before = len(watch.scored(run))
    done = run_command(*arguments(run, "--workers", "1", "--resume"))
    assert done.returncode == 0, done.stderr
    assert watch.scored(run)[before:] == [0]
    assert scores(run) == scores(undisturbed)


def test_shares_do_not_depend_on_the_order_in_which_shards_are_done(
    ray_local: None,
    undisturbed: Path,
    tmp_path: Path,
    model_folder: Any,
    long_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every stage gets its results back to front."""
    real, orders = WorkerPool.run, []

    def run(pool: WorkerPool, tasks: Any, submit: Any, stop: Any = None) -> Iterator[Outcome]:
        outcomes = list(real(pool, tasks, submit, stop))
        outcomes.sort(key=lambda outcome: -outcome.task.shard)
        orders.append([outcome.task.shard for outcome in outcomes])
        yield from outcomes

    monkeypatch.setattr(WorkerPool, "run", run)
    config = ScanConfig(
        model=str(model_folder("llama")),
        data=str(long_file),
        out=str(tmp_path / "run"),
        formats=FORMATS,
        bits=8,
        shard_samples=4,
        label_draws=6,
        sample_rows="auto",
        hold_out=0,
        workers=2,
    )
    run_search(config)
    assert orders[-2:] == [[1, 0], list(range(SHARDS - 1, FIRST - 1, -1))]
    assert scores(tmp_path / "run") == scores(undisturbed)


def test_few_shards_are_scored_on_all_rows(
    tmp_path: Path, run_command: Any, arguments: Any
) -> None:
    """Three shards: the first two would be more than half of them."""
    run = tmp_path / "run"
    done = run_command(*arguments(run, "--samples", "12"))
    assert done.returncode == 0, done.stderr
    assert "all rows are scored, 3 shard(s) are few" in done.stderr
    rows = parquet.read_table(run / "sensitivity.parquet").to_pylist()
    assert {row["row_share"] for row in rows} == {1.0}
    assert {row["sampling_stderr"] for row in rows} == {0.0}
