"""Files beside the weights come out of an export as the model has them, and configs nearly so."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder
from quantized_checkpoints import MODELOPT_FP8, repacked, tensor_fp8

from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model

FILES = {
    "generation_config.json": '{"do_sample": false,\n "temperature": 0.6, "top_k": 20}',
    "LICENSE": "Do as you like.\n",
    "README.md": "# A model\n",
    "configuration_special.py": "SPECIAL = True\n",
    "additional_chat_templates/tools.jinja": "{{ messages }}",
}
CHOICE = {"*": "none", "*mlp*": "wint8_aint8"}
FORMATS = ("wint8_aint8",)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_files_beside_the_weights_are_those_of_the_model(
    layout: str, solved_run: Any, model_folder: Any, tmp_path: Path, caplog: Any
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model_folder("llama"), folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "pytorch_model.bin").write_text("weights that nobody reads")
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")  # as older versions of transformers write it
    config |= {"rope_theta": 10000.0, "torch_dtype": config.pop("dtype"), "of_others": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config))
    directory, _, _ = solved_run("llama", CHOICE, FORMATS, folder=folder)
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO, logger="autoquant_ray"):
        export_run(directory, str(out), layout=layout)
    for name, text in FILES.items():
        assert (out / name).read_text() == text, name
    assert not (out / "pytorch_model.bin").exists()
    written = json.loads((out / "config.json").read_text())
    assert written.pop("quantization_config")
    assert written == config | {"torch_dtype": "bfloat16"}
    assert "config.json: changed torch_dtype, quantization_config" in caplog.text


def test_export_of_a_quantized_model_describes_the_new_weights_alone(
    solved_run: Any, model_folder: Any, tmp_path: Path
) -> None:
    folder = repacked(model_folder("llama"), tmp_path / "fp8", tensor_fp8, MODELOPT_FP8)
    described = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    (folder / "generation_config.json").unlink()
    directory, _, _ = solved_run("llama", CHOICE, FORMATS, folder=folder)
    out = tmp_path / "out"
    export_run(directory, str(out))
    for name in ("config.json", "hf_quant_config.json"):
        assert "W8A8_SQ_PER_CHANNEL" in (out / name).read_text()
        assert '"FP8"' not in (out / name).read_text()
    assert not (out / "generation_config.json").exists()
    source, written = (
        load_model(find_model(str(path)), dtype="float32", device="cpu").state_dict()
        for path in (folder, out)
    )
    for name, weight in source.items():
        if "mlp" not in name:
            assert torch.equal(written[name], weight.bfloat16().float()), name
        else:
            assert (written[name] - weight).norm() < 0.01 * weight.norm(), name
    assert "model.layers.0.mlp.up_proj.input_scale" in load_folder(out)
