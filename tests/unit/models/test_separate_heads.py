"""Heads that the config ties to the embedding while the files hold another weight for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import fake_weight, load_folder, unpack_modelopt
from click.testing import CliRunner
from gguf_files import finish
from safetensors.torch import load_file, save_file

from autoquant_ray.allocate.problem import Problem
from autoquant_ray.cli.main import main
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import ModelRef, find_model
from autoquant_ray.models.load import build_skeleton, load_model
from autoquant_ray.models.separate_heads import separate_head, tie_as_files
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.score.scorer import Scorer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FORMATS = ("wint4_afp16:max", "wint8_aint8")
NOTE = "lm_head is a layer of its own: the config ties it to the input embedding"

Change = Callable[[torch.Tensor], torch.Tensor | None]


@pytest.fixture
def checkpoint(model_folder: Any, tmp_path: Path) -> Any:
    """A checkpoint whose config ties the head, with a head made of the embedding."""

    def build(change: Change, name: str = "model", prefix: str = "") -> Path:
        folder = tmp_path / name
        shutil.copytree(model_folder("qwen3"), folder)
        tensors = load_file(folder / "model.safetensors")
        assert HEAD not in tensors
        head = change(tensors[EMBEDDING])
        if head is not None:
            tensors[HEAD] = head
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
        return folder

    return build


def other(embedding: torch.Tensor) -> torch.Tensor:
    return embedding.flip(0).contiguous()


def nearly(embedding: torch.Tensor) -> torch.Tensor:
    return torch.where(embedding == embedding.max(), embedding * (1 + 1e-6), embedding)


def plan_of(folder: Path) -> Plan:
    formats = resolve_formats(FORMATS, device="cpu")
    return build_plan(build_skeleton(find_model(str(folder))), formats)


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "is_separate"),
    [(other, True), (nearly, True), (torch.clone, False), (lambda _: None, False)],
)
def test_plan_and_loaded_model_take_the_head_of_the_files(
    change: Change, is_separate: bool, dtype: str, checkpoint: Any
) -> None:
    folder = checkpoint(change)
    plan = plan_of(folder)
    model = load_model(find_model(str(folder)), dtype=dtype, device="cpu")
    assert is_tied(model) is not is_separate
    assert plan.groups[-1].is_tied is not is_separate
    assert (plan.separate_head, separate_head(model)) == 2 * (("lm_head" if is_separate else None),)
    tensors = load_file(folder / "model.safetensors")
    if not is_separate:
        tensors.pop(HEAD, None)  # saved twice, it is written and counted once
    problem = Problem.from_plan(plan.rows(), plan.summary())
    in_16_bits = problem.other_bytes + sum(g.cost("none", "storage") for g in problem.searched)
    assert in_16_bits == 2 * sum(tensor.numel() for tensor in tensors.values())
    head = model.get_output_embeddings().weight
    expected = tensors[HEAD] if is_separate else tensors[EMBEDDING]
    assert torch.equal(head, expected.to(head.dtype))


def test_model_saved_in_parts_is_read_by_its_index(checkpoint: Any, tmp_path: Path) -> None:
    model = load_model(find_model(str(checkpoint(other))), dtype="float32", device="cpu")
    folder = tmp_path / "parts"
    model.save_pretrained(folder, max_shard_size="70KB")
    assert not (folder / "model.safetensors").exists()
    assert plan_of(folder).separate_head == "lm_head"


def test_names_of_the_files_may_lack_a_prefix_or_have_more(
    checkpoint: Any, make_model: Any
) -> None:
    folder = checkpoint(other, prefix="language_model.")
    model = make_model("qwen3")
    skeleton = type(model)(model.config)
    assert is_tied(skeleton)
    tie_as_files(skeleton, find_model(str(folder)))
    assert not is_tied(skeleton)
    assert "lm_head.weight" not in skeleton.all_tied_weights_keys
    untied = type(model)(model.config)
    tie_as_files(untied, find_model(str(checkpoint(lambda _: None, "plain"))))
    assert is_tied(untied)


@pytest.mark.parametrize(("is_equal", "is_separate"), [(False, True), (True, False)])
def test_gguf_with_both_weights(
    is_equal: bool, is_separate: bool, make_model: Any, tmp_path: Path
) -> None:
    """As of Falcon and BLOOM, whose head transformers ties whatever such a file holds."""
    embedding = np.arange(32, dtype=np.float32).reshape(8, 4)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "falcon")
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", embedding if is_equal else embedding + 1)
    finish(writer)
    model = type(make_model("qwen3"))(make_model("qwen3").config)
    ref = ModelRef(name="model.gguf", path=str(tmp_path), gguf_file="model.gguf")
    tie_as_files(model, ref)
    assert is_tied(model) is not is_separate


@pytest.mark.parametrize("placement", ["resident", "offload"])
def test_scores_are_those_of_the_same_model_with_a_config_that_says_so(
    placement: str, checkpoint: Any, make_samples: Any, make_spec: Any
) -> None:
    sums = []
    for name in ("wrong", "right"):
        folder = checkpoint(other, name)
        if name == "right":
            file = folder / "config.json"
            values = json.loads(file.read_text()) | {"tie_word_embeddings": False}
            file.write_text(json.dumps(values))
        ref, plan = find_model(str(folder)), plan_of(folder)
        assert plan.separate_head == ("lm_head" if name == "wrong" else None)
        scorer = Scorer(make_spec(plan, model=ref, placement=placement, step_tokens=64))
        samples = make_samples([24, 17])
        sums.append(scorer.score(samples, 0, scorer.calibrate(samples)).sums.elementwise_GF)
        rows = plan.rows()
    assert sums[0].tobytes() == sums[1].tobytes()
    assert rows == plan_of(checkpoint(other, "again")).rows()


def test_plan_solution_and_report_say_so(checkpoint: Any, make_run: Any, model_folder: Any) -> None:
    folder = checkpoint(other)
    done = CliRunner().invoke(main, ["plan", str(folder), "--formats", ",".join(FORMATS)])
    assert done.exit_code == 0, done.output
    assert NOTE in done.output
    words = ["plan", str(folder), "--formats", ",".join(FORMATS), "--json"]
    assert json.loads(CliRunner().invoke(main, words).stdout)["separate_head"] == "lm_head"
    directory = make_run("qwen3", FORMATS, disable=(), folder=folder)
    done = CliRunner().invoke(main, ["solve", directory.uri, "--bits", "6"])
    assert NOTE in done.output
    for name in ("report.md", "report.html"):
        assert NOTE in directory.read_bytes(f"solutions/bits-6.00/{name}").decode()
    plain = make_run("qwen3", FORMATS, disable=(), folder=model_folder("qwen3"), name="plain")
    done = CliRunner().invoke(main, ["solve", plain.uri, "--bits", "6"])
    assert (done.exit_code, NOTE in done.output) == (0, False)
    assert NOTE not in plain.read_bytes("solutions/bits-6.00/report.md").decode()


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("format_", ["wfp8_afp8", "none"])
def test_export_writes_the_head_and_the_embedding(
    format_: str, layout: str, checkpoint: Any, solved_run: Any, tmp_path: Path
) -> None:
    folder = checkpoint(other)
    formats = ("wfp8_afp8",)
    directory, _, _ = solved_run(
        "qwen3", {"*": "wfp8_afp8", "lm_head": format_}, formats, folder=folder
    )
    out = tmp_path / "out"
    written = export_run(directory, str(out), layout=layout)
    stored, source = load_folder(out), load_folder(folder)
    assert torch.equal(stored[EMBEDDING], source[EMBEDDING].bfloat16())
    if format_ == "none":
        assert torch.equal(stored[HEAD], source[HEAD].bfloat16())
    elif layout == "modelopt":
        (menu,) = resolve_formats(formats, device="cpu")
        unpacked = unpack_modelopt(stored, "lm_head", "FP8")
        torch.testing.assert_close(
            unpacked, fake_weight(folder, "lm_head", menu), rtol=1e-6, atol=0
        )
    assert stored[HEAD].element_size() == (2 if format_ == "none" else 1)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert written.bytes_on_disk == pytest.approx(written.weight_bytes, rel=0.01)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("format_", ["wfp8_afp8", "none"])
def test_export_of_a_head_that_was_saved_twice_has_it_once(
    format_: str, layout: str, checkpoint: Any, solved_run: Any, tmp_path: Path
) -> None:
    """Weights that stay in their files are not compared by transformers, which then ties none."""
    folder = checkpoint(torch.clone)
    choice = {"*": "wfp8_afp8", "lm_head": format_}
    directory, _, _ = solved_run("qwen3", choice, ("wfp8_afp8",), folder=folder)
    out = tmp_path / "out"
    written = export_run(directory, str(out), layout=layout)
    stored, source = load_folder(out), load_folder(folder)
    assert torch.equal(stored[EMBEDDING], source[EMBEDDING].bfloat16())
    assert (HEAD in stored) is (format_ != "none")
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is (format_ == "none")
    assert written.bytes_on_disk == pytest.approx(written.weight_bytes, rel=0.01)
