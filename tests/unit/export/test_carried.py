"""Tensors that transformers does not load: counted, copied, ignored, and never lost unsaid."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import load_folder
from click.testing import CliRunner
from gguf_files import random_llama, write_llama
from safetensors.torch import load_file, save_file

from autoquant_ray.allocate.problem import Problem
from autoquant_ray.cli.main import main
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.errors import CheckpointError, FormatError
from autoquant_ray.export.carried import SourceTensors
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.plan.make import make_plan

SHAPES = {
    "mtp.layers.0.self_attn.q_proj.weight": (64, 64),
    "mtp.layers.0.mlp.experts.0.up_proj.weight": (96, 64),
    "mtp.norm.weight": (64,),
    "model.layers.2.mlp.down_proj.weight": (64, 96),  # the model has two layers
}
MIXED = {"*": "wint8_aint8", "*q_proj": "wfp8_afp8", "lm_head": "none"}


def put_extra_head(folder: Path, out: Path, *, is_sharded: bool) -> Path:
    """The model of a folder with random tensors that no class of transformers knows."""
    out.mkdir()
    for file in folder.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    in_source = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    extra = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if not is_sharded:
        save_file(in_source | extra, out / "model.safetensors", metadata={"format": "pt"})
        return out
    parts = {
        f"model-0000{i}-of-00002.safetensors": part for i, part in ((1, in_source), (2, extra))
    }
    for name, part in parts.items():
        save_file(part, out / name, metadata={"format": "pt"})
    places = {tensor: file for file, part in parts.items() for tensor in part}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


@pytest.mark.parametrize(
    ("layout", "choice", "is_sharded"),
    [
        ("modelopt", {"*": "wfp8_afp8"}, False),
        ("modelopt", MIXED, True),
        ("compressed-tensors", MIXED, False),
    ],
)
def test_extra_heads_are_in_the_export_and_ignored(
    layout: str,
    choice: dict[str, str],
    is_sharded: bool,
    solved_run: Any,
    model_folder: Any,
    tmp_path: Path,
) -> None:
    folder = put_extra_head(model_folder("llama"), tmp_path / "model", is_sharded=is_sharded)
    formats = tuple(sorted({*choice.values()} - {"none"}))
    directory, *_ = solved_run("llama", choice, formats, folder=folder)
    out = tmp_path / "out"
    written = export_run(directory, str(out), layout=layout)
    tensors, in_source = load_folder(out), load_folder(folder)
    assert written.num_carried == len(SHAPES)
    assert written.bytes_on_disk == sum(tensor.nbytes for tensor in tensors.values())
    for name in SHAPES:
        assert torch.equal(tensors[name], in_source[name].bfloat16())
    assert {
        n
        for n in in_source
        if n not in tensors and n.replace(".weight", ".weight_packed") not in tensors
    } == set()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    for module in {name.rpartition(".")[0] for name in SHAPES if "norm" not in name}:
        assert module in config["ignore"]
    inside = "mtp.layers.0.mlp.experts"  # as engines call experts that they join
    patterns = config["ignore"]
    if layout == "modelopt":
        assert any(fnmatch.fnmatchcase(inside, pattern) for pattern in patterns)
        assert not any(fnmatch.fnmatchcase("model.layers.20.mlp.up_proj", p) for p in patterns)
        legacy = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        assert set(patterns) <= set(legacy["exclude_modules"])
        return
    regular = [pattern.removeprefix("re:") for pattern in patterns if pattern.startswith("re:")]
    assert any(re.match(pattern, inside) for pattern in regular)
    _, problems = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert set(problems["unexpected_keys"]) == set(SHAPES)
    assert not problems["missing_keys"]


def test_extra_heads_count_in_plan_budget_and_manifest(model_folder: Any, tmp_path: Path) -> None:
    folder = put_extra_head(model_folder("llama"), tmp_path / "model", is_sharded=True)
    space = SearchSpace(model="m", formats=("wfp8_afp8",))
    plan = make_plan(space, find_model(str(folder)), device="cpu")
    before = make_plan(space, find_model(str(model_folder("llama"))), device="cpu")
    num_bytes = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert dict(plan.carried) == {n: 2 * torch.Size(s).numel() for n, s in SHAPES.items()}
    problem = Problem.from_plan(plan.rows(), plan.summary())
    plain = Problem.from_plan(before.rows(), before.summary())
    assert problem.fixed_bytes == plain.fixed_bytes + num_bytes
    assert "carried" not in before.summary()
    words = ["plan", str(folder), "--formats", "wfp8_afp8", "--device", "cpu"]
    assert "carried: 4 tensors" in CliRunner().invoke(main, words).stdout
    assert (
        json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["carried"] == plan.carried
    )


def test_tensor_of_the_source_that_is_nowhere_is_named(model_folder: Any, tmp_path: Path) -> None:
    folder = put_extra_head(model_folder("qwen3"), tmp_path / "model", is_sharded=False)
    ref = find_model(str(folder))
    in_source = SourceTensors.of(load_model(ref, dtype="float32", device="cpu"), ref)
    assert set(in_source.carried) == set(SHAPES)
    in_source.require_all_in(folder)
    kept = load_folder(folder)
    for lost in ("mtp.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del kept[lost]
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"left out 2 tensors.*(up_proj.*norm|norm.*up_proj)"):
        in_source.require_all_in(folder)


def test_blocks_of_gguf_that_are_not_loaded_are_refused_by_name(tmp_path: Path) -> None:
    file = write_llama(
        tmp_path / "a.gguf", random_llama(), tensors={"blk.2.nextn.norm.weight": [1.0]}
    )
    ref = find_model(str(file))
    with pytest.raises(FormatError, match=r"1 tensors that transformers does not .*blk\.2\.nextn"):
        SourceTensors.of(build_skeleton(ref), ref)
