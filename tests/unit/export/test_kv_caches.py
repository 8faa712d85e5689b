"""Exports of plans that quantize the KV cache: what is written, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import calibrated, load_folder
from click.testing import CliRunner
from engine_readers import read_by_engine
from packaging.version import Version
from written_runs import made_up_config, made_up_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.calibrate.files import read_calibration
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.cli.main import main
from autoquant_ray.errors import ConfigError, FormatError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.source import read_source
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model, fingerprint_model
from autoquant_ray.models.load import load_model
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.solve import solve_run

FORMATS = ("wfp8_afp8", "wint8_afp16", "kv_fp8", "kv_nvfp4", "kv_fp8_nvfp4")
VLLM = os.environ.get("AUTOQUANT_RAY_VLLM")
MIXED = ("wint8_afp16", "wfp8_afp8")
CACHES = [f"model.layers.{number}.self_attn.kv" for number in (0, 1)]


@pytest.fixture
def solved(make_model: Any, model_folder: Any, tmp_path: Path) -> Any:
    """A run of a small model, calibrated and solved with its caches in given formats."""
    numbers = itertools.count()

    def build(family: str, *caches: str, weights: str = "wfp8_afp8") -> Any:
        folder = model_folder(family)
        plan = build_plan(make_model(family), resolve_formats(FORMATS, device="cpu"))
        config = made_up_config(
            folder, tmp_path / f"run-{next(numbers)}", FORMATS, kv_bytes_per_token=1000
        )
        fingerprint = fingerprint_model(find_model(str(folder)))
        directory = made_up_run(config, plan, family, fingerprint)
        calibrated(directory, folder, FORMATS)
        of_mlp, of_keys = MIXED if weights == "mixed" else (weights, weights)
        pins = {g.name: of_mlp for g in plan.searched if "mlp" in g.name}
        pins |= {g.name: of_keys for g in plan.searched if "q_proj" in g.name}
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


ALONE = {"deployment_supported": False}
"""What is said beside formats by layer where the weights have one format."""
FP8_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
FP8, NVFP4, APART = ({"quant_algo": name} for name in ("FP8", "NVFP4", "FP8_K_NVFP4_V"))


def by_layer(*formats: Any) -> dict[str, Any]:
    """What both configs say of caches by layer."""
    names = [name.removesuffix(".kv") for name in CACHES]
    layers = {name: entry for name, entry in zip(names, formats, strict=True) if entry is not None}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "schema_version": 1}


def said_of_caches(folder: Path) -> list[dict[str, Any]]:
    """What the two configs of a checkpoint say of the KV cache."""
    nested = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    flat = json.loads((folder / "config.json").read_text())["quantization_config"]
    start = "kv_cache_"
    return [
        {name.removeprefix(start): value for name, value in content.items() if start in name}
        for content in (nested, flat)
    ]


def export_by_modelopt(directory: Any, out: Path) -> None:
    """Write a run's solution with ModelOpt alone, calibrated on what the run was."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    source = read_source(directory)
    model = load_model(find_model(source.state.config["model"]), dtype="float32", device="cpu")
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        mtq.quantize(model, load_quantization_config(source.manifest), lambda m: m(ids))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("caches", "weights", "nested", "flat"),
    [
        (("kv_fp8",) * 2, "mixed", {"quant_algo": "FP8"}, {"scheme": FP8_SCHEME}),
        (("kv_nvfp4",) * 2, "wfp8_afp8", {"quant_algo": "NVFP4"}, {"scheme": "NVFP4"}),
        (("kv_fp8_nvfp4",) * 2, "wfp8_afp8", APART, APART),
        (("kv_fp8", "kv_nvfp4"), "wfp8_afp8", by_layer(FP8, NVFP4) | ALONE, None),
        (("kv_nvfp4", "kv_fp8_nvfp4"), "mixed", by_layer(NVFP4, APART), None),
        (("kv_fp8", NONE), "mixed", by_layer(FP8, None), None),
    ],
)
def test_formats_of_caches_are_written_as_modelopt_writes_them(
    caches: tuple[str, ...], weights: str, nested: Any, flat: Any, solved: Any, tmp_path: Path
) -> None:
    directory, out = solved("llama", *caches, weights=weights), tmp_path / "out"
    written = export_run(directory, str(out))
    assert said_of_caches(out) == [nested, flat or nested]
    tensors, calibration = load_folder(out), read_calibration(directory)
    quantized = [name for name, format_ in zip(CACHES, caches, strict=True) if format_ != NONE]
    scales = {name for name in tensors if name.endswith(("k_scale", "v_scale"))}
    expected = {}
    for attention in (name.removesuffix(".kv") for name in quantized):
        for part in "kv":
            maximum = calibration.of(attention).maxima[f"{part}_bmm_amax"]
            expected[f"{attention}.{part}_proj.{part}_scale"] = maximum / 448
    assert scales == set(expected)
    for name, value in expected.items():
        assert float(tensors[name]) == pytest.approx(value, rel=1e-6)
    assert (written.unread_caches is None) == ("quantized_layers" not in nested and nested != APART)
    if Version(version("nvidia-modelopt")) < Version("0.48.0rc1"):
        return
    theirs = tmp_path / "theirs"
    export_by_modelopt(directory, theirs)
    if NONE in caches:  # it does not say which layers those are
        assert said_of_caches(theirs)[0] == {"quant_algo": "FP8"}
    else:
        assert said_of_caches(theirs) == said_of_caches(out)
    tensors = load_folder(theirs)
    assert {name for name in tensors if name.endswith(("k_scale", "v_scale"))} == scales
    for name, value in expected.items():
        assert float(tensors[name]) == pytest.approx(value, rel=1e-6)


def test_formats_by_layer_are_written_with_a_warning(solved: Any, tmp_path: Path) -> None:
    directory = solved("llama", "kv_fp8", "kv_nvfp4")
    result = CliRunner().invoke(main, ["export", directory.uri, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "warning" in line]
    assert line.startswith(
        "warning: no released engine reads formats of the KV cache by layer "
        "(kv_cache_quantized_layers)"
    )
    assert "to serve it" not in result.stdout
    with pytest.raises(ConfigError, match="the KV cache has kv_fp8, kv_nvfp4, and engines keep"):
        export_run(directory, str(tmp_path / "other"), engine="vllm", gpu="b200")
    assert not (tmp_path / "other").exists()


def test_scales_of_caches_that_an_engine_would_not_read_are_refused(
    solved: Any, tmp_path: Path
) -> None:
    directory = solved("llama", "kv_nvfp4", "kv_nvfp4", weights="mixed")
    with pytest.raises(ConfigError, match=r"vllm on b200 serves kv_nvfp4 beside several formats"):
        export_run(directory, str(tmp_path / "out"), engine="vllm", gpu="b200")


@pytest.mark.skipif(VLLM is None, reason="AUTOQUANT_RAY_VLLM names no Python")
@pytest.mark.filterwarnings("ignore")
def test_vllm_reads_one_format_for_all_caches(solved: Any, tmp_path: Path) -> None:
    """``auto`` of formats that it does not know leaves the caches in 16 bits."""
    script = Path(__file__).parents[2] / "support" / "vllm_caches.py"
    read = {
        ("kv_fp8", "kv_fp8", "wfp8_afp8"): ["fp8_e4m3", True],
        ("kv_fp8", "kv_fp8", "mixed"): ["fp8_e4m3", True],
        ("kv_nvfp4", "kv_nvfp4", "wfp8_afp8"): ["nvfp4", True],
        ("kv_nvfp4", "kv_nvfp4", "mixed"): ["nvfp4", False],
        ("kv_fp8_nvfp4", "kv_fp8_nvfp4", "mixed"): ["auto", False],
        ("kv_fp8", "kv_nvfp4", "wfp8_afp8"): ["auto", True],
        ("kv_fp8", "none", "mixed"): ["auto", False],
    }
    expected = {}
    for number, ((*caches, weights), kind) in enumerate(read.items()):
        folder = tmp_path / f"out-{number}"
        export_run(solved("llama", *caches, weights=weights), str(folder))
        expected[str(folder)] = kind
    command = [str(VLLM), "-W", "ignore", str(script), *expected]
    assert read_by_engine(command, VLLM_LOGGING_LEVEL="ERROR") == expected


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
