"""Placements through the command line: same scores, resolved once per run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from local_ray import start_local_ray

from autoquant_ray.config.demo import find_demo_model
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.node_devices import device_bytes, difference_dtype, fast_types
from autoquant_ray.errors import ClusterError
from autoquant_ray.plan.memory import GIB


def config_of(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run / "run.json").read_text())["config"]
    return config


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scan_offloaded_gives_the_scores_of_a_resident_one(
    tmp_path: Path, run_command: Any, scan_arguments: Any, family: str
) -> None:
    tables = []
    for placement in ("auto", "offload"):
        run = tmp_path / placement
        arguments = scan_arguments(run, "--placement", placement, "--workers", 2, family=family)
        done = run_command(*arguments)
        assert done.returncode == 0, done.stderr
        tables.append(pq.read_table(run / "sensitivity.parquet").to_pydict())
        if placement == "auto":
            assert "placement: resident needs" in done.stderr
            assert config_of(run)["placement"] == "resident"
    resident, offloaded = tables
    assert offloaded["group"] == resident["group"]
    assert offloaded["format"] == resident["format"]
    assert offloaded["score"] == pytest.approx(resident["score"], rel=1e-6, abs=0)


def test_scan_resumed_keeps_the_placement_of_the_run(
    tmp_path: Path, run_command: Any, scan_arguments: Any
) -> None:
    run = tmp_path / "run"
    first = run_command(*scan_arguments(run, "--placement", "offload"))
    assert first.returncode == 0, first.stderr
    again = run_command(*scan_arguments(run, "--resume"))
    assert again.returncode == 0, again.stderr
    assert config_of(run)["placement"] == "offload"
    other = run_command(*scan_arguments(run, "--resume", "--placement", "resident"))
    assert other.returncode == 2
    assert "placement: offload -> resident" in other.stderr


def test_scan_decides_once_in_what_type_differences_are_multiplied(
    tmp_path: Path, run_command: Any, scan_arguments: Any
) -> None:
    run = tmp_path / "run"
    first = run_command(*scan_arguments(run, "--difference-dtype", "auto", "--workers", 2))
    assert first.returncode == 0, first.stderr
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    chosen, other = ("bfloat16", "float32") if has_units else ("float32", "bfloat16")
    assert f"differences: products in {chosen}" in first.stderr
    assert config_of(run)["difference_dtype"] == chosen
    again = run_command(*scan_arguments(run, "--resume", "--difference-dtype", other))
    assert again.returncode == 2
    assert f"difference_dtype: {chosen} -> {other}" in again.stderr


def test_scan_multiplies_integers_where_it_is_asked_to(
    tmp_path: Path, run_command: Any, scan_arguments: Any
) -> None:
    asked = ("--difference-dtype", "int8")
    tables = []
    for workers in (1, 2):
        run = tmp_path / str(workers)
        done = run_command(*scan_arguments(run, *asked, "--workers", workers))
        assert done.returncode == 0, done.stderr
        assert "multiplies no integers" not in done.stderr
        tables.append((run / "sensitivity.parquet").read_bytes())
    assert tables[0] == tables[1]
    chosen = config_of(run)["difference_dtype"]
    assert chosen in ("int8+float32", "int8+bfloat16")
    assert f"differences: products in {chosen.replace('+', ' and ')}" in done.stderr
    assert f"differences in {chosen.replace('+', ' and ')}" in (run / "report.md").read_text()
    again = run_command(*scan_arguments(run, "--resume", *asked))
    assert again.returncode == 0, again.stderr
    in_16_bits = scan_arguments(tmp_path / "16", *asked, "--dtype", "bfloat16")
    done = run_command(*in_16_bits)
    assert done.returncode == 0, done.stderr
    assert "int8 multiplies no integers: it needs a float32 model" in done.stderr
    assert config_of(tmp_path / "16")["difference_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("capability", "is_cuda", "types"),
    [
        ((7, 5), True, []),
        ((8, 0), True, ["bfloat16", "int8"]),
        ((9, 0), True, ["bfloat16", "int8"]),
        ((9, 4), False, ["bfloat16"]),
        ((10, 3), True, ["bfloat16"]),
        ((12, 0), True, ["bfloat16", "int8"]),
    ],
)
def test_types_that_are_fast_go_by_the_generation_of_the_gpu(
    capability: tuple[int, int], is_cuda: bool, types: list[str]
) -> None:
    assert fast_types(capability, is_cuda=is_cuda) == types


def test_scan_offloaded_gguf_is_refused_with_the_remedy(tmp_path: Path, run_command: Any) -> None:
    arguments = ["scan", find_demo_model(), "--data", "pydoc", "--out", tmp_path / "run"]
    done = run_command(*arguments, "--bits", 6, "--placement", "offload", "--address", "local")
    assert done.returncode == 2
    assert "offload needs safetensors" in done.stderr
    assert "--placement resident" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of the test is made up")
def test_device_bytes_of_gpus_that_do_not_answer_is_an_error_with_the_remedy() -> None:
    config = ScanConfig(model="m", data="d", out="o", bits=8)
    start_local_ray(num_cpus=1, num_gpus=1)
    try:
        with pytest.raises(
            ClusterError, match=r"memory of a GPU node cannot be read: .*; give `placement`"
        ):
            device_bytes(config, "cuda")
        on_cuda = config.model_copy(update={"device": "cuda", "dtype": "float32"})
        with pytest.raises(ClusterError, match=r"kind of a GPU node cannot be read: .*float32 or"):
            difference_dtype(on_cuda, has_integers=True)
        in_16_bits = on_cuda.model_copy(update={"dtype": "bfloat16"})
        assert difference_dtype(in_16_bits, has_integers=True) == "bfloat16"
        assert GIB < device_bytes(config, "cpu") <= psutil.virtual_memory().total
    finally:
        ray.shutdown()
