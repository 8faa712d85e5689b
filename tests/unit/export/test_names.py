"""Names in a checkpoint: those of the model's own files, for families whose names transformers
changes on loading, or whose layers ModelOpt's exporter does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import modelopt
import pytest
import transformers
from checkpoints import load_folder
from every_family import small_model
from packaging.version import Version
from safetensors.torch import save_file

from autoquant_ray.errors import FormatError
from autoquant_ray.export.checkpoint import export_run

FP8 = "wfp8_afp8"
EXPERTS_THAT_STAY = [("aria_text", "model.layers.0.mlp.shared_experts.up_proj")]
if Version(modelopt.__version__) >= Version("0.48rc1"):
    EXPERTS_THAT_STAY = []  # written one by one there, which is refused


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("falcon", "transformer.h.0.mlp.dense_h_to_4h"),  # a linear of a class of its own
        ("deepseek_v4", "head"),  # a rule for one whole name
        ("minimax_m3_vl", "language_model.model.layers.1.block_sparse_moe.shared_experts.up_proj"),
        # rules for a part of the model
        ("qwen3_5_moe", "model.language_model.layers.0.mlp.experts.0.up_proj"),
        *EXPERTS_THAT_STAY,
    ],
)
def test_layers_are_packed_under_the_names_of_the_models_own_files(
    family: str, layer: str, solved_run: Any, tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    small_model(family).save_pretrained(folder)
    experts = "*experts" if family == "deepseek_v4" else "nothing"
    choice = {"*": FP8, experts: "none"}
    directory, _, _ = solved_run("llama", choice, (FP8,), folder)
    export_run(directory, str(out))
    tensors = load_folder(out)
    before = set(load_folder(folder))
    written = {name for name in tensors if not name.endswith((".weight_scale", ".input_scale"))}
    assert written - {"lm_head.weight"} == before - {"lm_head.weight"}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    listed = {*config.get("quantized_layers", ())} or written
    assert layer in {name.removesuffix(".weight") for name in listed}
    assert {f"{layer}.weight_scale", f"{layer}.input_scale"} <= tensors.keys()
    assert all(f"{name}.weight" in before for name in config.get("quantized_layers", ()))


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.18"),
    reason="it gives back the published names there, but for the prefix of the base model",
)
def test_model_whose_files_have_names_that_nothing_gives_back_is_refused(
    solved_run: Any, tmp_path: Path
) -> None:
    """As published, DeepSeek-V4's names have no ``model.``; transformers loads both."""
    folder, out = tmp_path / "model", tmp_path / "out"
    small_model("deepseek_v4").save_pretrained(folder)
    tensors = load_folder(folder)
    in_memory = re.compile(r"^model\.(layers\.\d+)\.self_attn\.q_a_proj")
    published = {in_memory.sub(r"\1.attn.wq_a", name): tensor for name, tensor in tensors.items()}
    assert "layers.0.attn.wq_a.weight" in published
    for file in folder.glob("*.safetensors"):
        save_file(published, file, metadata={"format": "pt"})
    directory, _, _ = solved_run("llama", {"*": FP8}, (FP8,), folder)
    before = set(tmp_path.rglob("*"))
    names = "write layers.0.self_attn.q_a_proj.weight, .* have layers.0.attn.wq_a.weight"
    with pytest.raises(FormatError, match=names) as caught:
        export_run(directory, str(out))
    assert caught.value.exit_code == 2
    assert set(tmp_path.rglob("*")) == before
