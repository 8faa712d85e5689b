"""``plan``: what it prints, and from which files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import modelopt
import pytest
import transformers
from click.testing import CliRunner
from command_line import refusal, run
from every_family import small_model
from packaging.version import Version

from autoquant_ray.cli.main import main
from autoquant_ray.runs.names import PLAN_FILE
from autoquant_ray.runs.schemas import SCHEMAS


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "qwen3_vl"])
def test_plan_json_holds_groups_and_range(family: str, model_folder: Any) -> None:
    formats = ["wint4_afp16", "wint8_aint8"]
    command = ("plan", model_folder(family), "--device", "cpu", "--formats", ",".join(formats))
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    rows = printed["groups"]
    assert all(set(row) == set(SCHEMAS[PLAN_FILE].names) for row in rows)
    searched = {row["group"] for row in rows if row["is_searched"]}
    for group in searched:
        named = [row["format"] for row in rows if row["group"] == group]
        assert named == [*formats, "none"]
    assert all("visual" not in group for group in searched)
    assert printed["num_searched"] == len(searched)
    assert printed["num_groups"] == len({row["group"] for row in rows})
    assert printed["formats"] == formats
    low, high = printed["bits_range"]
    assert 4 < low < high == 16
    of_llama = [row["module_names"] for row in rows if row["group"].endswith("q_proj")]
    kinds = {tuple(name.rpartition(".")[2] for name in names) for names in of_llama}
    assert ("q_proj", "k_proj", "v_proj") in kinds


def test_plan_json_range_is_the_cheapest_and_dearest_sum(model_folder: Any) -> None:
    printed = json.loads(run("plan", model_folder("llama"), "--device", "cpu", "--json").stdout)
    by_group: dict[str, list[Any]] = {}
    for row in printed["groups"]:
        by_group.setdefault(row["group"], []).append(row)
    weights = sum(rows[0]["num_weights"] for rows in by_group.values())
    for bound, pick in zip(printed["bits_range"], (min, max), strict=True):
        total = sum(pick(row["weight_bytes"] for row in rows) for rows in by_group.values())
        assert bound == pytest.approx(8 * total / weights, rel=1e-12)


def test_plan_needs_only_the_config_file(model_folder: Any, tmp_path: Path) -> None:
    folder = model_folder("qwen3_moe")
    shutil.copy(folder / "config.json", tmp_path)
    full, bare = (run("plan", path, "--device", "cpu", "--json") for path in (folder, tmp_path))
    assert bare.exit_code == 0, bare.output
    assert bare.stdout == full.stdout


def test_plan_table_names_every_group_and_the_range(model_folder: Any) -> None:
    folder = model_folder("llama")
    result = run("plan", folder, "--device", "cpu", "--disable", "lm_head")
    printed = json.loads(
        run("plan", folder, "--device", "cpu", "--disable", "lm_head", "--json").stdout
    )
    for row in printed["groups"]:
        assert row["group"] in result.stdout
    assert "lm_head (disabled by 'lm_head')" in result.stdout
    low, high = printed["bits_range"]
    shown = re.search(r"bits: ([\d.]+) to ([\d.]+)", result.stdout)
    assert shown is not None
    assert low <= float(shown[1]) < low + 1e-3  # rounded inward, so that both can be asked for
    assert high - 1e-3 < float(shown[2]) <= high


def test_refusal_of_a_real_process_is_one_line(model_folder: Any) -> None:
    """Libraries write to the process' own stderr, which a runner in this process cannot see."""
    arguments = ["plan", str(model_folder("llama")), "--formats", "wint4_afp61"]
    done = subprocess.run(
        [sys.executable, "-m", "autoquant_ray", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_plan_takes_a_number_of_clusters_of_experts(model_folder: Any) -> None:
    command = ("plan", model_folder("qwen3_moe"), "--device", "cpu", "--formats", "wint8_afp16")
    apart, clusters = (run(*command, "--expert-groups", value) for value in ("expert", "2"))
    assert clusters.exit_code == 0, clusters.output
    assert clusters.stdout == apart.stdout


LIMIT_OF_DBRX: str | None = "export: `format` modelopt cannot hold this model: ModelOpt makes"
if Version(modelopt.__version__) >= Version("0.48rc1"):
    LIMIT_OF_DBRX = None  # it takes DBRX's experts as those of other families there


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        ("zamba2", "export: weights that several layers share are not packed; leave them"),
        (
            "gpt_oss",
            "export: `format` modelopt cannot hold transposed experts (model.layers",
        ),
        ("longcat_flash", "export: `format` modelopt cannot give this model's tensors"),
        ("dbrx", LIMIT_OF_DBRX),
        ("gpt2", "export: a checkpoint of GPT2LMHeadModel cannot be written"),
        ("granitemoe", "export: `format` modelopt cannot hold experts that the model's own"),
        ("ernie4_5_vl_moe", "export: `format` modelopt cannot give this model's tensors"),
        ("deepseek_v4", "export: `format` compressed-tensors cannot hold layers that the model's"),
        ("llama", None),
    ],
)
def test_plan_says_what_an_export_would_stop_at(
    family: str, limit: str | None, tmp_path: Path
) -> None:
    small_model(family).save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--formats", "wfp8_afp8"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("export: ")]
    assert [line[: len(limit)] for line in lines[:1]] == [limit] if limit else lines == []
    content = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    of_modelopt = limit is not None and "compressed-tensors" not in limit
    assert bool(content["checkpoint_limits"]["modelopt"]) == of_modelopt


def test_plan_names_formats_that_no_checkpoint_holds(model_folder: Any) -> None:
    arguments = ["plan", str(model_folder("llama")), "--formats", "wint4_aint4,wfp8_afp8"]
    result = CliRunner().invoke(main, arguments)
    assert "export: wint4_aint4 has no packed form (model.layers.0" in result.stdout
    assert result.stdout.count("export: ") == 1


def test_card_gives_time_and_memory_of_a_worker(model_folder: Any) -> None:
    folder = model_folder("qwen3")
    asked = ("plan", folder, "--formats", "wint4_afp16", "--device", "cpu")
    more = ("--card", "h100", "--samples", 10, "--seq-len", 100)
    done = run(*asked, *more, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    worker = document["worker"]
    assert worker["card"] == "NVIDIA H100 SXM"
    assert worker["num_tokens"] == 1000
    assert worker["seconds"] == pytest.approx(1000 * document["flops_per_token"] / 989.5e12)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder)
    )
    weights = {tensor.data_ptr(): tensor.numel() for tensor in model.parameters()}
    assert worker["resident_bytes"] >= 2 * sum(weights.values())
    assert worker["offloaded_bytes"] <= worker["resident_bytes"]
    width = sum(m.out_features for m in model.model.layers.modules() if hasattr(m, "out_features"))
    width += sum(layer.self_attn.o_proj.in_features for layer in model.model.layers)
    assert worker["graph_bytes"] == pytest.approx(2 * 2048 * width, rel=0.06)
    printed = run(*asked, *more).stdout
    assert "time: at least" in printed
    assert "1,000 tokens on one NVIDIA H100 SXM (a bound, no measurement" in printed
    assert "memory of a worker: " in printed
    assert "graphs of all layers: 0.0 GiB more; --keep-graphs auto keeps" in printed
    assert "worker" not in json.loads(run(*asked, "--json").stdout)


def test_card_that_is_none_is_refused(model_folder: Any) -> None:
    asked = ("plan", model_folder("qwen3"), "--formats", "wint4_afp16", "--device", "cpu")
    line = refusal(run(*asked, "--card", "h1000"))
    assert line.startswith("error: --card 'h1000' is neither a card (a100, ")
    assert "--card" in refusal(run(*asked, "--samples", 3))
