"""Whole scans into ``s3://``: killed, resumed, cut off, and the same bytes as on a local disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from local_ray import local_cluster
from object_store import KEYS, ObjectStore

from autoquant_ray.runs.names import SCORES, part_name

# Many draws make a shard slow enough that a kill lands in the middle of the scan.
SLOW = ("--shard-samples", "1", "--label-draws", "12")
NUM_SHARDS = 12


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """The server, named by the environment, as on a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        started = ObjectStore()
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": started.url}).items():
            patch.setenv(name, value)
        yield started
        started.stop()


@pytest.fixture(scope="module")
def arguments(store: ObjectStore, scan_arguments: Any) -> Iterator[Any]:
    """Arguments of a scan by one worker, on a cluster that knows the way to the store."""
    with local_cluster(num_cpus=1) as address:
        yield lambda out, *extra: scan_arguments(
            out, "--workers", "1", "--address", address, *extra
        )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, run_command: Any, arguments: Any) -> Path:
    run: Path = tmp_path_factory.mktemp("local") / "run"
    done = run_command(*arguments(run, *SLOW))
    assert done.returncode == 0, done.stderr
    return run


def score_parts(store: ObjectStore, run: str) -> dict[str, Any]:
    """Score parts -> when they were written."""
    return {
        name: store.client.head_object(Bucket="bucket", Key=f"{run}/{SCORES}/{name}")[
            "LastModified"
        ]
        for name in store.keys(f"{run}/{SCORES}/")
    }


def test_killed_driver_resumes_and_every_command_works(
    store: ObjectStore,
    local: Path,
    start_command: Any,
    run_command: Any,
    arguments: Any,
    watch: Any,
) -> None:
    run = "s3://bucket/killed/run"
    with start_command(*arguments(run, *SLOW, "--address", "local")) as scan:
        watch.wait_for(lambda: len(store.keys(f"killed/run/{SCORES}/")) >= 3, scan)
        children = psutil.Process(scan.pid).children(recursive=True)
        scan.kill()
    psutil.wait_procs(children)
    kept = score_parts(store, "killed/run")
    assert 3 <= len(kept) < NUM_SHARDS
    assert "sensitivity.parquet" not in store.keys("killed/run/")

    resumed = run_command(*arguments(run, *SLOW, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert kept.items() <= score_parts(store, "killed/run").items()
    assert (
        store.content("killed/run/sensitivity.parquet")
        == (local / "sensitivity.parquet").read_bytes()
    )
    assert [key for key in store.keys("killed/run/") if key.startswith(".lock")] == []
    assert set(store.keys("killed/run/")) == {
        str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()
    }
    lines = store.content("killed/run/events.jsonl").decode().splitlines()
    assert json.loads(lines[-1])["event"] == "run_done"

    for words in (("solve", "--bits", "6"), ("report",)):
        done = run_command(words[0], run, *words[1:])
        assert done.returncode == 0, done.stderr
    solved = run_command("solve", local, "--bits", "6")
    assert solved.returncode == 0, solved.stderr
    name = "solutions/bits-6.00/manifest.parquet"
    assert store.content(f"killed/run/{name}") == (local / name).read_bytes()


def test_listings_do_not_grow_with_the_shards(
    store: ObjectStore, local: Path, run_command: Any, arguments: Any
) -> None:
    counts = []
    for name, shard_samples in (("few", "6"), ("many", "1")):
        before = store.count("GET", f"prefix=count%2F{name}%2F")
        run = f"s3://bucket/count/{name}"
        done = run_command(*arguments(run, "--shard-samples", shard_samples))
        assert done.returncode == 0, done.stderr
        counts.append(store.count("GET", f"prefix=count%2F{name}%2F") - before)
    few, many = counts
    assert many - few < NUM_SHARDS - 2, counts


def test_server_gone_in_scoring_leaves_a_resumable_run(
    store: ObjectStore, local: Path, run_command: Any, arguments: Any
) -> None:
    run = "s3://bucket/gone/run"
    is_gone = []

    def go_after_third_part(method: str, path: str) -> int | None:
        if method == "PUT" and path.endswith(part_name(f"gone/run/{SCORES}", 3)):
            is_gone.append(True)
        return 400 if is_gone else None

    store.gateway.fault = go_after_third_part
    try:
        cut_off = run_command(*arguments(run, *SLOW))
    finally:
        store.gateway.fault = lambda _method, _path: None
    assert cut_off.returncode == 1, cut_off.stderr
    errors = [line for line in cut_off.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "s3://bucket/gone/run/" in errors[0]
    assert "go on with --resume" in errors[0]
    kept = score_parts(store, "gone/run")
    assert len(kept) >= 3

    resumed = run_command(*arguments(run, *SLOW, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert kept.items() <= score_parts(store, "gone/run").items()
    assert (
        store.content("gone/run/sensitivity.parquet")
        == (local / "sensitivity.parquet").read_bytes()
    )


def test_import_into_s3(store: ObjectStore, tmp_path: Path, run_command: Any) -> None:
    layer = {
        "formats": ["FP8(effective-bits: 8.0)", "NONE(effective-bits: 16.0)"],
        "scores": [0.5, 0],
        "costs": [8, 16],
    }
    manifest = tmp_path / "manifest.json"
    manifest.write_text(
        json.dumps(
            {"scheme": {"auto_quantize_bits": 8}, "layer_sensitivity": {"a.quant_recipe": layer}}
        )
    )
    for out in ("s3://bucket/imported/run", str(tmp_path / "run")):
        done = run_command("import", manifest, "--out", out)
        assert done.returncode == 0, done.stderr
    for name in ("sensitivity.parquet", "manifest.parquet"):
        assert store.content(f"imported/run/{name}") == (tmp_path / "run" / name).read_bytes()


def test_missing_bucket_stops_before_any_work(
    store: ObjectStore, run_command: Any, arguments: Any
) -> None:
    done = run_command(*arguments("s3://not-there/run", *SLOW))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "s3://not-there/run" in line
    assert "create the bucket" in line
    assert "worker(s) on" not in done.stderr
