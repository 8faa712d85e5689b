"""Exports of plans that quantize the KV cache: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import calibrated, load_folder
from click.testing import CliRunner
from written_runs import made_up_config, made_up_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.calibrate.files import read_calibration
from autoquant_ray.cli.main import main
from autoquant_ray.errors import ConfigError, FormatError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model, fingerprint_model
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.solve import solve_run

FORMATS = ("wfp8_afp8", "wint8_afp16", "kv_fp8", "kv_nvfp4")
CACHES = [f"model.layers.{number}.self_attn.kv" for number in (0, 1)]


@pytest.fixture
def solved(make_model: Any, model_folder: Any, tmp_path: Path) -> Any:
    """A run of a small model, calibrated and solved with its caches in given formats."""

    def build(family: str, *caches: str, weights: str = "wfp8_afp8") -> Any:
        folder = model_folder(family)
        plan = build_plan(make_model(family), resolve_formats(FORMATS, device="cpu"))
        config = made_up_config(folder, tmp_path / "run", FORMATS, kv_bytes_per_token=1000)
        fingerprint = fingerprint_model(find_model(str(folder)))
        directory = made_up_run(config, plan, family, fingerprint)
        calibrated(directory, folder, FORMATS)
        pins = {g.name: weights for g in plan.searched if "mlp" in g.name or "k_proj" in g.name}
        pins |= dict(zip(CACHES, caches, strict=True))
        options = SolveOptions(bits=16, kv_bytes_per_token=1000, pins=pins)
        solve_run(directory, options, folder="")
        return directory

    return build


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_one_format_for_all_caches_is_written_with_its_scales(
    family: str, solved: Any, tmp_path: Path
) -> None:
    directory = solved(family, "kv_fp8", "kv_fp8")
    lines = export_run(directory, str(tmp_path / "out"), engine="vllm", gpu="hopper").lines()
    assert lines[1] == "KV cache: kv_fp8 in 2 attentions"
    calibration, tensors = read_calibration(directory), load_folder(tmp_path / "out")
    for group in CACHES:
        attention = group.removesuffix(".kv")
        for part in "kv":
            scale = tensors[f"{attention}.{part}_proj.{part}_scale"]
            expected = calibration.of(attention).maxima[f"{part}_bmm_amax"] / 448
            assert float(scale) == pytest.approx(expected, rel=1e-6)
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


@pytest.mark.filterwarnings("ignore")
def test_caches_in_16_bits_leave_no_trace(solved: Any, tmp_path: Path) -> None:
    assert not export_run(solved("llama", NONE, NONE), str(tmp_path / "out")).caches
    assert not [
        name for name in load_folder(tmp_path / "out") if name.endswith(("k_scale", "v_scale"))
    ]
    assert "kv_cache_scheme" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("caches", [("kv_fp8", NONE), ("kv_fp8", "kv_nvfp4"), ("kv_nvfp4",) * 2])
def test_other_caches_are_refused(caches: tuple[str, ...], solved: Any, tmp_path: Path) -> None:
    directory = solved("llama", *caches)
    with pytest.raises(FormatError, match=r"kv_fp8 for all attentions or in 16 bits.*`allow`"):
        export_run(directory, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_layouts_and_engines_without_caches_are_refused(solved: Any, tmp_path: Path) -> None:
    directory = solved("llama", "kv_fp8", "kv_fp8", weights="wint8_afp16")
    with pytest.raises(
        FormatError, match=r"compressed-tensors cannot hold formats of the KV cache"
    ):
        export_run(directory, str(tmp_path / "out"), layout="compressed-tensors")
    with pytest.raises(ConfigError, match="no source says that vllm on a100"):
        export_run(directory, str(tmp_path / "out"), engine="vllm", gpu="a100")
    arguments = ["export", directory.uri, "--format", "recipe", "--tool", "llama.cpp", "--out"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "recipe cannot hold formats of the KV cache" in result.output
    assert not (tmp_path / "out").exists()
