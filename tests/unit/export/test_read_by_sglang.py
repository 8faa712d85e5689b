"""SGLang's own classes read our checkpoints as they were planned.

Opt-in: ``AUTOQUANT_RAY_SGLANG`` is a folder in which a wheel of sglang 0.5.23 is unpacked:
``pip download --no-deps sglang==0.5.23``, then ``python -m zipfile -e sglang-*.whl FOLDER``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_readers import read_by_engine

from autoquant_ray.export.checkpoint import export_run

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

pytestmark = pytest.mark.skipif(SGLANG is None, reason="AUTOQUANT_RAY_SGLANG names no folder")


def read_by_sglang(folder: Path) -> dict[str, Any]:
    """Name of SGLang's module -> class of its method."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(SGLANG), str(folder)]
    return read_by_engine(command)


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
    for name, method in read_by_sglang(tmp_path / "out").items():
        parent, _, part = name.rpartition(".")
        layer = f"{parent.rpartition('.')[0]}.{FUSED[part]}" if part in FUSED else name
        assert method == METHODS[planned[layer]], (name, planned[layer])


@pytest.mark.parametrize("name", ["wfp8_afp8", "NVFP4_DEFAULT_CFG", "wfp4_afp16"])
def test_one_format_alone_is_read_for_all_but_what_is_left_out(
    name: str, solved_run: Any, tmp_path: Path
) -> None:
    choice = {"*": name, "*0.mlp.*": "none", "lm_head": "none"}
    directory, *_ = solved_run("llama", choice, (name,), name=name)
    export_run(directory, str(tmp_path / "out"), engine="sglang", gpu="blackwell")
    for layer, method in read_by_sglang(tmp_path / "out").items():
        kept = layer == "lm_head" or "0.mlp" in layer
        assert method == (None if kept else METHODS[name]), (layer, name)
