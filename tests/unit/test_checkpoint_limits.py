"""What no checkpoint holds is known before an export: a search for an engine leaves it out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import refusal, run
from every_family import small_model
from moe_models import write_moe

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import served_problems
from autoquant_ray.checkpoint_limits import checkpoint_limits
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.errors import FormatError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.source import read_source
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.gguf_types import DISTRIBUTION, library_file
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.plan.make import make_plan
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.serving.compressed_formats import fitting_format
from autoquant_ray.serving.menus import served_sets
from autoquant_ray.solve import rewrite_reports, solve_run

MENU = ("wint8_afp16", "wint8_aint8")


def limits_of(folder: Path) -> Any:
    """What a scan of a model notes in ``run.json``."""
    space = SearchSpace(model=str(folder), formats=MENU)
    ref = find_model(str(folder))
    return checkpoint_limits(make_plan(space, ref, device="cpu"), ref).for_run()


def test_solve_for_an_engine_leaves_experts_that_files_keep_fused_in_16_bits(
    solved_run: Any, tmp_path: Path
) -> None:
    folder = write_moe(tmp_path / "gpt_oss", "gpt_oss")
    choice = {"*": "none", "*experts": "wint8_afp16"}
    directory, *_ = solved_run("qwen3_moe", choice, MENU, folder=folder)
    options = SolveOptions(bits=13, engine="vllm", gpu="hopper")
    earlier = solve_run(directory, options)
    assert experts_of(directory, earlier.name), "this run does not know what files keep fused"
    with pytest.raises(FormatError, match="files keep fused"):
        export_run(directory, str(tmp_path / "out"), solution=earlier.name)

    record = directory.read_json("run.json")
    record["plan"]["checkpoint_limits"] = limits_of(folder)
    directory.write_json("run.json", record)
    limit = record["plan"]["checkpoint_limits"]["compressed-tensors"]
    assert limit["groups"] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    solved = solve_run(directory, options.replaced(bits=15.5))
    assert experts_of(directory, solved.name) == set()
    written = export_run(directory, str(tmp_path / "out"), solution=solved.name)
    assert (written.layout, written.engine) == ("compressed-tensors", "vllm")

    rewrite_reports(directory)
    report = Path(directory.path("report.md")).read_text()
    assert re.search(r"No checkpoint holds it: .* compressed-tensors cannot hold experts", report)
    note = run(
        "solve", directory.uri, "--bits", 9, "--pin", "model.layers.1.mlp.experts=wint8_afp16"
    )
    assert re.search(
        "^note: No checkpoint holds it: `format` compressed", note.stdout, re.MULTILINE
    )
    assert "No checkpoint" not in run("solve", directory.uri, "--bits", 16).stdout


def test_solve_for_an_engine_leaves_out_a_layout_whose_names_are_not_those_of_the_files(
    solved_run: Any, model_folder: Any, tmp_path: Path
) -> None:
    """``model.layers`` of Qwen2.5-VL's files is ``model.language_model.layers`` in memory."""
    folder = model_folder("qwen2_5_vl")
    formats = ("wfp8_afp8", "wint8_aint8")
    directory, *_ = solved_run("qwen2_5_vl", {"*": "wfp8_afp8"}, formats, folder=folder)
    options = SolveOptions(bits=10, engine="vllm", gpu="hopper")
    # vLLM reads these integers in the other layout alone.
    earlier = solve_run(directory, options.replaced(allow={"*": ("wint8_aint8", "none")}))
    with pytest.raises(FormatError, match=r"\(model\.layers.* is model\.language_model\.layers"):
        export_run(directory, str(tmp_path / "out"), solution=earlier.name)

    record = directory.read_json("run.json")
    record["plan"]["checkpoint_limits"] = limits = limits_of(folder)
    directory.write_json("run.json", record)
    assert [*limits] == ["compressed-tensors"]
    assert "model.language_model.layers.1.mlp.down_proj" in limits["compressed-tensors"]["groups"]
    assert "lm_head" not in limits["compressed-tensors"]["groups"], "it has its name in the files"
    solved = solve_run(directory, options)
    written = export_run(directory, str(tmp_path / "out"), solution=solved.name)
    assert (written.layout, written.engine) == ("modelopt", "vllm")
    assert "compressed-tensors" not in limits_of(model_folder("qwen3_vl"))


def experts_of(directory: Any, solution: str) -> set[str]:
    """Experts that a solution quantizes."""
    return {name for name in read_source(directory, solution).formats if "experts" in name}


def test_engine_of_a_model_that_no_checkpoint_holds_is_refused_before_any_work(
    tmp_path: Path, text_file: Path
) -> None:
    small_model("gpt2").save_pretrained(tmp_path / "model")
    scan = ("scan", tmp_path / "model", "--data", text_file, "--out", tmp_path / "run")
    line = refusal(run(*scan, "--bits", 9, "--formats", "wint8_afp16", "--engine", "vllm"))
    assert "vllm cannot serve this model: a checkpoint of GPT2LMHeadModel cannot be" in line
    assert line.endswith("solve without --engine")
    assert len(line) <= 400
    assert not (tmp_path / "run").exists()


def test_weights_that_layers_share_stay_in_16_bits_for_an_engine() -> None:
    plan = build_plan(small_model("zamba2"), resolve_formats(("wfp8_afp8",), device="cpu"))
    shared = {group.name for group in plan.searched if group.is_shared}
    problem = Problem.from_plan(plan.rows(), plan.summary())
    variants = served_problems(problem, SolveOptions(bits=12, engine="vllm"))
    assert shared
    assert len(variants) > 0
    for variant in variants:
        assert variant.served is not None
        permitted = variant.served.permitted
        assert {g for g, names in permitted.items() if names == {NONE}} >= shared
        assert any(len(names) > 1 for names in permitted.values())


@pytest.mark.skipif(library_file() is None, reason=f"needs {DISTRIBUTION}")
def test_types_of_gguf_files_are_said_once(model_folder: Any) -> None:
    folder = model_folder("llama")
    for menu in ("q4_k,q8_0", "q4_k,q8_0,wint8_aint8"):
        done = run("plan", folder, "--formats", menu, "--json")
        for lines in json.loads(done.stdout)["checkpoint_limits"].values():
            assert [line[:32] for line in lines] == ["q4_k, q8_0: types of GGUF files "]
        assert run("plan", folder, "--formats", menu).stdout.count("export: ") == 1


def test_four_bit_integers_of_experts_are_none_that_modelopt_packs() -> None:
    groups = {"experts": ["model.layers.0.mlp.experts"], "o": ["model.layers.0.self_attn.o_proj"]}
    shapes = {"model.layers.0.mlp.experts": [[4, 128, 128], [4, 128, 64]]}
    shapes |= {"model.layers.0.self_attn.o_proj": [[128, 128]]}
    menu = resolve_formats(("wint4_g64_afp16", "wfp8_afp8"), device="cpu")
    (served, *_) = served_sets(groups, list(groups), menu, "trtllm", "hopper", shapes)
    assert served.permitted["o"] == {NONE, "wint4_g64_afp16", "wfp8_afp8"}
    assert served.permitted["experts"] == {NONE, "wfp8_afp8"}


def test_plan_names_the_blocks_that_fit_where_others_do_not(model_folder: Any) -> None:
    folder = model_folder("llama")  # rows of 64 weights, and of 160
    formats = "wint4_afp16,wint4_afp16:max,wint4_g64_afp16,wint4_g32_afp16,NVFP4_DEFAULT_CFG"
    document = json.loads(run("plan", folder, "--formats", formats, "--json").stdout)
    for lines in document["checkpoint_limits"].values():
        assert [line.rpartition(" (")[0] for line in lines] == [
            f"{name}: rows of {row} weights are no whole number of blocks of {block}; {fits} fits"
            for name, row, block, fits in (
                ("wint4_afp16", 64, 128, "wint4_g64_afp16"),
                ("wint4_afp16", 160, 128, "wint4_g32_afp16"),
                ("wint4_afp16:max", 64, 128, "wint4_g64_afp16"),
                ("wint4_afp16:max", 160, 128, "wint4_g32_afp16"),
                ("wint4_g64_afp16", 160, 64, "wint4_g32_afp16"),
            )
        ]
        named = {line.rpartition("; ")[2].partition(" fits")[0] for line in lines}
        assert named <= set(document["formats"])


def test_blocks_that_fit_are_those_of_all_rows_and_of_the_same_inputs() -> None:
    wide, narrow = resolve_formats(("wint4_afp16", "wint4_g32_afp16"), device="cpu")
    assert fitting_format(wide, [(8, 192)]) == "wint4_g64_afp16"
    assert fitting_format(wide, [(8, 192), (8, 160)]) == "wint4_g32_afp16"
    assert fitting_format(wide, [(8, 192), (8, 100)]) is None
    assert fitting_format(narrow, [(8, 100)]) is None
    assert fitting_format(replace(wide, input={"num_bits": 8}), [(8, 192)]) is None
