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

from autoquant_ray.allocate.read import ScoredRun
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.report.sources import read_sources
from autoquant_ray.runs.names import EVALUATION_FILE
from autoquant_ray.runs.schemas import SCHEMAS
from autoquant_ray.runs.state import RunState

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
    written = export_run(directory, str(out))
    assert written.wider_bytes == 0, "scales are no weights that stay in float32"
    for name in ("config.json", "hf_quant_config.json"):
        assert "W8A8_SQ_PER_CHANNEL" in (out / name).read_text()
        assert '"FP8"' not in (out / name).read_text()
    assert not (out / "generation_config.json").exists()
    source, again = (
        load_model(find_model(str(path)), dtype="float32", device="cpu").state_dict()
        for path in (folder, out)
    )
    for name, weight in source.items():
        if "mlp" not in name:
            assert torch.equal(again[name], weight.bfloat16().float()), name
        else:
            assert (again[name] - weight).norm() < 0.01 * weight.norm(), name
    assert "model.layers.0.mlp.up_proj.input_scale" in load_folder(out)


def test_model_without_a_card_gets_one_of_how_it_was_quantized(
    solved_run: Any, model_folder: Any, tmp_path: Path
) -> None:
    directory, _, _ = solved_run("llama", CHOICE, FORMATS, folder=model_folder("llama"))
    sources = read_sources(ScoredRun.read(RunState.open(directory)), "")
    solution = sources.manifest["solution"]
    row = dict.fromkeys(SCHEMAS[EVALUATION_FILE].names, 0.0) | {
        "solution": "",
        "dataset": "/home/somebody/held-out.jsonl",
        "data_key": "d",
        "name": "solution",
        "allocation": sources.key,
        "kl_mean": 0.125,
        "num_tokens": 4096,
        "num_samples": 8,
    }
    stale = row | {"allocation": "an earlier one", "kl_mean": 9.0}
    directory.write_table(EVALUATION_FILE, [stale, row])
    out = tmp_path / "out"
    export_run(directory, str(out))
    card = (out / "README.md").read_text()
    facts = dict(
        line.split("  ", 1) for line in card.partition("```text\n")[2].splitlines() if "  " in line
    )
    facts = {label: value.strip() for label, value in facts.items()}
    num_mlp = sum("mlp" in name for name in sources.run.plan["modules"])
    assert facts["layers in wint8_aint8"] == f"{num_mlp}"
    assert facts["layers in 16 bits"] == f"{len(sources.run.plan['modules']) - num_mlp}"
    assert facts["predicted loss"] == f"{solution['predicted_kl_nats']:.4g}"
    assert facts["measured loss"] == "0.125 on 4,096 tokens of held-out.jsonl"
    recorded = sources.run.versions or {}
    assert recorded
    assert all(f"{name} {version}" in facts["versions"] for name, version in recorded.items())
    assert card.startswith("---\nlibrary_name: transformers\n")
    for private in ("/home/somebody", str(model_folder("llama").parent)):
        assert private not in card


def test_names_do_not_leave_the_block_of_a_card(
    solved_run: Any, model_folder: Any, tmp_path: Path
) -> None:
    directory, _, _ = solved_run("llama", CHOICE, FORMATS, folder=model_folder("llama"))
    record = directory.read_json("run.json")
    record["dataset"]["name"] = "a\n```\n# Heading\n<script>"
    directory.write_json("run.json", record)
    export_run(directory, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("\n```") == 2
    assert "\n# Heading" not in card
