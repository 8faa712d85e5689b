"""Wrong input and broken shards, through the real command line."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from autoquant_ray.config import stage_fields
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.errors import ClusterError, DataError, StoreError
from autoquant_ray.formats import menu
from autoquant_ray.scan import run_search


@pytest.fixture
def make_config(model_folder: Any, text_file: Path, tmp_path: Path) -> Any:
    """A scan on the session's cluster; keywords replace fields."""

    def build(**changes: Any) -> ScanConfig:
        values = {
            "model": str(model_folder("llama")),
            "data": str(text_file),
            "out": str(tmp_path / "run"),
            "formats": ("wint4_afp16:max", "wint8_aint8"),
            "bits": 8,
            "shard_samples": 4,
            "workers": 1,
        }
        return ScanConfig.model_validate(values | changes)

    return build


def test_scan_existing_run_without_flag_is_refused(ray_local: None, make_config: Any) -> None:
    config = make_config()
    run_search(config)
    before = Path(config.out, "run.json").read_bytes()
    with pytest.raises(StoreError, match=r"`resume` or `overwrite`"):
        run_search(config)
    assert Path(config.out, "run.json").read_bytes() == before


def test_scan_resume_with_other_config_names_the_field(ray_local: None, make_config: Any) -> None:
    config = make_config()
    run_search(config)
    with pytest.raises(StoreError, match="seed: 0 -> 5"):
        run_search(make_config(seed=5), "resume")


def test_scan_resume_with_other_workers_is_accepted(ray_local: None, make_config: Any) -> None:
    config = make_config()
    run_search(config)
    before = Path(config.out, "sensitivity.parquet").read_bytes()
    run_search(make_config(workers=2), "resume")
    assert Path(config.out, "sensitivity.parquet").read_bytes() == before


def test_scan_resume_after_data_changed_is_refused(
    ray_local: None, make_config: Any, tmp_path: Path, text_file: Path
) -> None:
    data = tmp_path / "data.txt"
    shutil.copy(text_file, data)
    config = make_config(data=str(data))
    run_search(config)
    data.write_text(data.read_text() + "w1 w2 w3\n")
    with pytest.raises(StoreError, match="the data changed"):
        run_search(config, "resume")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "garbage"])
def test_scan_resume_damaged_part_is_scored_again(
    damage: str, ray_local: None, make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config()
    run_search(config)
    run = Path(config.out)
    before = (run / "sensitivity.parquet").read_bytes()
    part = run / "scores" / "shard-000001.parquet"
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "foreign":
        shutil.copy(run / "scores" / "shard-000000.parquet", part)
    else:
        part.write_bytes(b"not parquet")
    values = json.loads((run / "run.json").read_text())
    values["stages"]["score"]["state"] = "running"
    del values["stages"]["aggregate"]
    (run / "run.json").write_text(json.dumps(values))
    with caplog.at_level("WARNING", logger="autoquant_ray"):
        run_search(config, "resume")
    assert "shard-000001.parquet is damaged" in caplog.text
    assert pq.read_table(part).column("shard").unique().to_pylist() == [1]
    assert (run / "sensitivity.parquet").read_bytes() == before


def test_scan_empty_data_writes_nothing(ray_local: None, make_config: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \nw1\n")
    config = make_config(data=str(empty))
    with pytest.raises(DataError, match=r"empty\.txt"):
        run_search(config)
    assert not Path(config.out).exists()


def test_scan_overwrite_with_empty_data_keeps_the_old_run(
    ray_local: None, make_config: Any, tmp_path: Path
) -> None:
    config = make_config()
    run_search(config)
    before = Path(config.out, "run.json").read_bytes()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(DataError):
        run_search(make_config(data=str(empty)), "overwrite")
    assert Path(config.out, "run.json").read_bytes() == before


def test_scan_more_gpus_than_the_cluster_has_is_refused(ray_local: None, make_config: Any) -> None:
    config = make_config(gpus_per_worker=2)
    with pytest.raises(ClusterError, match="need 2 GPU, the cluster has 0"):
        run_search(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:9", "127.0.0.1:9"])
def test_scan_unreachable_cluster_is_one_line(
    address: str, run_command: Any, scan_arguments: Any
) -> None:
    start = time.monotonic()
    done = run_command(*scan_arguments(Path("unused"), "--address", address))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert f"{address}' cannot be reached: " in last
    assert "give another --address, or local" in last
    assert time.monotonic() - start < 60  # Ray would ask for minutes


def test_scan_shard_with_nan_is_quarantined_and_exits_3(
    tmp_path: Path, model_folder: Any, text_file: Path, run_command: Any, scan_arguments: Any
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_folder("llama"), broken)
    weights = load_file(broken / "model.safetensors")
    token = int(text_file.read_text().splitlines()[5].split()[0][1:])
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = scan_arguments(tmp_path / "run", "--workers", "1")
    arguments[1] = broken
    done = run_command(*arguments)
    assert done.returncode == 3, done.stderr
    values = json.loads((tmp_path / "run" / "run.json").read_text())
    bad = {
        index // 2
        for index, line in enumerate(text_file.read_text().splitlines())
        if f"w{token}" in line.split()
    }
    assert {entry["shard"] for entry in values["quarantined"]} == bad
    assert all("nan" in entry["reason"] for entry in values["quarantined"])
    rows = pq.read_table(tmp_path / "run" / "sensitivity.parquet").to_pylist()
    assert {row["num_shards"] for row in rows} == {6 - len(bad)}
    assert "was left out" in (tmp_path / "run" / "report.md").read_text()


def test_scan_experts_without_tokens_are_scored_as_a_group(
    ray_local: None, make_config: Any, model_folder: Any, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3\n")
    run_search(make_config(model=str(model_folder("qwen3_moe")), data=str(short)))
    rows = pq.read_table(tmp_path / "run" / "sensitivity.parquet").to_pylist()
    scores = {row["group"]: row["score"] for row in rows}
    assert scores["model.layers.0.mlp.experts"] > 0
    assert all(score > 0 for score in scores.values())


def test_scan_overwrite_of_a_foreign_folder_is_refused(
    ray_local: None, make_config: Any, tmp_path: Path
) -> None:
    foreign = tmp_path / "project"
    foreign.mkdir()
    (foreign / "run.json").write_text('{"scripts": {}}')
    (foreign / "precious.txt").write_text("mine")
    with pytest.raises(StoreError, match="not a run directory"):
        run_search(make_config(out=str(foreign)), "overwrite")
    assert (foreign / "precious.txt").read_text() == "mine"


def test_scan_overwrite_keeps_files_that_are_not_ours(ray_local: None, make_config: Any) -> None:
    config = make_config()
    run_search(config)
    Path(config.out, "notes.txt").write_text("mine")
    run_search(make_config(seed=1), "overwrite")
    assert Path(config.out, "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "lost",
    [
        ["scores/shard-000001.parquet"],
        ["samples/shard-000001.parquet", "scores/shard-000001.parquet"],
        ["sensitivity.parquet"],
        ["plan.parquet", "calibration.parquet", "sensitivity.parquet"],
        ["calibration.parquet", "scores/shard-000002.parquet"],
        ["resampling.parquet", "empty: calibration.parquet"],
        ["empty: plan.parquet", "empty: sensitivity.parquet"],
        ["empty: resampling.parquet", "empty: scores/shard-000001.parquet"],
        ["empty: samples/shard-000001.parquet", "scores/shard-000001.parquet"],
    ],
)
def test_scan_resume_of_a_finished_run_replaces_lost_and_damaged_files(
    lost: list[str], ray_local: None, make_config: Any
) -> None:
    config = make_config()
    run_search(config)
    tables = ("sensitivity.parquet", "resampling.parquet", "calibration.parquet")
    before = {name: Path(config.out, name).read_bytes() for name in tables}
    for name in lost:
        path = Path(config.out, name.removeprefix("empty: "))
        path.write_bytes(b"") if name.startswith("empty: ") else path.unlink()
    run_search(config, "resume")
    assert {name: Path(config.out, name).read_bytes() for name in tables} == before
    for name in lost:
        assert Path(config.out, name.removeprefix("empty: ")).stat().st_size > 0


def test_scan_resume_with_a_part_of_another_run_scores_that_shard_again(
    ray_local: None, make_config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, other = make_config(), make_config(out=str(tmp_path / "other"), seed=7)
    run_search(config)
    run_search(other)
    name = "scores/shard-000001.parquet"
    before = Path(config.out, "sensitivity.parquet").read_bytes()
    shutil.copy(Path(other.out, name), Path(config.out, name))
    run_search(config, "resume")
    assert f"{name} is damaged; shard 1 is done again" in caplog.text
    assert Path(config.out, "sensitivity.parquet").read_bytes() == before


def test_scan_resume_after_the_tokenizer_changed_is_refused(
    ray_local: None, make_config: Any, model_folder: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder("llama"), model)
    config = make_config(model=str(model))
    run_search(config)
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"w1": 1,', '"w1": 2,'))
    assert (model / "tokenizer.json").read_text() != text
    with pytest.raises(StoreError, match="the model changed"):
        run_search(config, "resume")


def test_scan_resume_unfinished_with_another_version_is_refused(
    ray_local: None, make_config: Any
) -> None:
    config = make_config()
    run_search(config)
    values = json.loads(Path(config.out, "run.json").read_text())
    values["versions"]["torch"] = "1.0"
    Path(config.out, "run.json").write_text(json.dumps(values))
    run_search(config, "resume")
    del values["stages"]["aggregate"]
    Path(config.out, "run.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match=r"torch 1\.0"):
        run_search(config, "resume")


def test_scan_resume_keeps_what_names_meant_when_the_run_was_made(
    ray_local: None, make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Earlier versions rounded a bare int4 plainly; goes on so, and a new run does not."""
    config = make_config(formats=("wint4_afp16", "wint8_aint8"))
    with monkeypatch.context() as earlier:
        for module in (menu, stage_fields):
            earlier.setattr(module, "WEIGHTED_BY_DEFAULT", frozenset())
        run_search(config)
    run, others = Path(config.out), {"out": str(tmp_path / "new"), "min_expert_tokens": 3}
    before = (run / "sensitivity.parquet").read_bytes()
    calibrated = (run / "calibration.parquet").stat().st_mtime_ns
    for name in ("sensitivity.parquet", "scores/shard-000001.parquet"):
        (run / name).unlink()
    run_search(config.model_copy(update={"min_expert_tokens": 3}), "resume")
    assert (run / "sensitivity.parquet").read_bytes() == before
    assert (run / "calibration.parquet").stat().st_mtime_ns == calibrated
    assert not (run / "rounding.parquet").exists()

    run_search(config.model_copy(update=others))
    scores = [
        pq.read_table(folder / "sensitivity.parquet").to_pandas().set_index(["format"])
        for folder in (run, tmp_path / "new")
    ]
    plain, weighted = (of.loc["wint4_afp16"].score.to_numpy() for of in scores)
    assert (weighted != plain).all()
    assert weighted.sum() < plain.sum()
    assert (tmp_path / "new" / "rounding.parquet").exists()
