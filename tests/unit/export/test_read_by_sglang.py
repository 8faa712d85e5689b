"""SGLang's own classes read our checkpoints as they were planned.

Opt-in: ``AUTOQUANT_RAY_SGLANG`` is a folder in which a wheel of sglang 0.5.23 is unpacked:
``pip download --no-deps sglang==0.5.23``, then ``python -m zipfile -e sglang-*.whl FOLDER``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_readers import read_by_engine

from autoquant_ray.errors import ConfigError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.serving.table import GENERATIONS, TABLE

SCRIPT = Path(__file__).parents[2] / "support" / "sglang_layers.py"
SGLANG = os.environ.get("AUTOQUANT_RAY_SGLANG")
FUSED = {"qkv_proj": "self_attn.q_proj", "gate_up_proj": "mlp.gate_proj"}
METHODS = {
    "wfp8_afp8": "ModelOptFp8LinearMethod",
    "NVFP4_DEFAULT_CFG": "ModelOptFp4LinearMethod",
    "wfp4_afp16": "ModelOptNvFp4A16LinearMethod",
    "MXFP8_DEFAULT_CFG": "Fp8LinearMethod of MXFP8",
    "none": None,
}
ALGORITHMS = {
    "FP8": "wfp8_afp8",
    "NVFP4": "NVFP4_DEFAULT_CFG",
    "W4A16_NVFP4": "wfp4_afp16",
    "MXFP8": "MXFP8_DEFAULT_CFG",
}
"""Of the table's rows that are served."""
CAPABILITIES = {"ampere": 80, "ada": 89, "hopper": 90, "blackwell": 100}
MIXED_CAPABILITY = 80

pytestmark = pytest.mark.skipif(SGLANG is None, reason="AUTOQUANT_RAY_SGLANG names no folder")


def read_by_sglang(folder: Path) -> tuple[dict[str, Any], int]:
    """Name of SGLang's module -> class of its method; the least compute capability."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(SGLANG), str(folder)]
    read = read_by_engine(command)
    return read, read.pop("capability", 0)


def described(folder: Path, **config: Any) -> Path:
    """A folder with a config of ModelOpt's layout, of formats that are not exported."""
    folder.mkdir()
    content = {"quant_method": "modelopt", **config}
    (folder / "config.json").write_text(json.dumps({"quantization_config": content}))
    return folder


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_every_layer_is_read_as_the_manifest_says(
    shift: int, solved_run: Any, tmp_path: Path
) -> None:
    menu = [*list(METHODS)[shift:], *list(METHODS)[:shift]]
    parts = ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")
    modules = [f"{layer}.{part}" for layer in range(2) for part in parts]
    chosen = {f"*{module}_proj": menu[i % len(menu)] for i, module in enumerate(modules)}
    formats = tuple(name for name in METHODS if name != "none")
    directory, *_ = solved_run("llama", {"*": "none", "lm_head": menu[1]} | chosen, formats)
    export_run(directory, str(tmp_path / "out"), engine="sglang", gpu="blackwell")
    rows = directory.read_table("manifest.parquet").to_pylist()
    planned = {row["module"]: row["format"] for row in rows}
    read, capability = read_by_sglang(tmp_path / "out")
    for name, method in read.items():
        parent, _, part = name.rpartition(".")
        layer = f"{parent.rpartition('.')[0]}.{FUSED[part]}" if part in FUSED else name
        assert method == METHODS[planned[layer]], (name, planned[layer])
    assert capability == MIXED_CAPABILITY


@pytest.mark.parametrize("row", TABLE["sglang"], ids=lambda row: row.algo)
def test_every_row_of_the_table_is_what_its_classes_do(
    row: Any, solved_run: Any, tmp_path: Path
) -> None:
    """Alone: the head too, but for MXFP8, and not what is left out."""
    if row.algo not in ALGORITHMS:
        alone = described(tmp_path / "alone", quant_algo=row.algo, ignore=[])
        assert "only supports regular FP8" in read_by_sglang(alone)[0]["raises"]
        layers: dict[str, Any] = {"model.layers.0.mlp.down_proj": {"quant_algo": row.algo}}
        layers["model.layers.1.mlp.down_proj"] = {"quant_algo": "NVFP4", "group_size": 16}
        mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        read, _ = read_by_sglang(described(tmp_path / "mixed", **mixed))
        expected = "Fp8LinearMethod of blocks of [128, 128]" if "FP8" in row.algo else None
        assert read["model.layers.0.mlp.down_proj"] == expected
        assert (row.mixed, row.single) == ((), ())
        return
    name = ALGORITHMS[row.algo]
    takes_head = row.algo != "MXFP8"
    choice = {"*": name, "*0.mlp.*": "none", "*1.self_attn.*": "none"}
    choice |= {} if takes_head else {"lm_head": "none"}
    directory, *_ = solved_run("llama", choice, (name,))
    export_run(directory, str(tmp_path / "out"), engine="sglang", gpu="blackwell")
    read, capability = read_by_sglang(tmp_path / "out")
    for layer, method in read.items():
        is_kept = "0.mlp" in layer or "1.self_attn" in layer
        is_kept |= layer == "lm_head" and not takes_head
        assert method == (None if is_kept else METHODS[name]), layer
    able = {gpu for gpu in GENERATIONS if CAPABILITIES[gpu] >= capability}
    assert set(row.single) <= able
    assert set(row.single) == able or "before Blackwell the inputs stay in 16 bits" in row.note


def test_head_in_mxfp8_alone_is_refused(solved_run: Any, tmp_path: Path) -> None:
    """SGLang's class for it has no branch for heads: it would be read as 16 bits."""
    directory, *_ = solved_run("llama", {"*": "MXFP8_DEFAULT_CFG"}, ("MXFP8_DEFAULT_CFG",))
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lm_head: sglang would read them as 16 bits"):
        export_run(directory, out, layout="modelopt", engine="sglang", gpu="blackwell")
    export_run(directory, out, layout="modelopt")
    read, _ = read_by_sglang(tmp_path / "out")
    assert read.pop("lm_head") is None
    assert set(read.values()) == {METHODS["MXFP8_DEFAULT_CFG"]}


def test_several_formats_without_nvfp4_are_read_as_another(solved_run: Any, tmp_path: Path) -> None:
    menu = ("wfp8_afp8", "MXFP8_DEFAULT_CFG")
    directory, *_ = solved_run("llama", {"*": menu[0], "*mlp*": menu[1]}, menu)
    with pytest.raises(ConfigError, match="sglang reads several formats without NVFP4"):
        export_run(directory, str(tmp_path / "out"), engine="sglang", gpu="blackwell")
    export_run(directory, str(tmp_path / "out"), layout="modelopt")
    read, _ = read_by_sglang(tmp_path / "out")
    assert all(kind == {"method": "w4afp8"} for kind in read.values())


def test_one_format_of_compressed_tensors_is_read_for_all_but_what_is_left_out(
    solved_run: Any, tmp_path: Path
) -> None:
    """A Llama's fused layers are found by names of their own alone."""
    menu = ("wint8_aint8", "FP8_PER_CHANNEL_PER_TOKEN_CFG")
    for name, scheme in zip(menu, ("W8A8Int8", "W8A8Fp8"), strict=True):
        choice = {"*": name, "*0.mlp.*": "none", "*1.self_attn.q_proj": "none", "lm_head": "none"}
        directory, *_ = solved_run("llama", choice, (name,), name=name)
        written = export_run(directory, str(tmp_path / f"out-{name}"), engine="sglang")
        assert written.layout == "compressed-tensors"
        read, _ = read_by_sglang(tmp_path / f"out-{name}")
        for layer, kind in read.items():
            is_kept = "0.mlp" in layer or layer in ("lm_head", "model.layers.1.self_attn.qkv_proj")
            assert kind == (None if is_kept else f"CompressedTensors{scheme}"), layer
