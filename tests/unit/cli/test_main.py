"""The command line: what it refuses before any work, what it prints, what its help says.

A refusal is exit code 2 (4 for a budget), one line on stderr with the value and a remedy, and an
untouched ``--out``. The scans here name a cluster that does not exist, so a check that came after
the connection to Ray would show as a complaint about that address.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import pytest
import transformers
import yaml
from click.testing import CliRunner, Result

from autoquant_ray.cli.main import main
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.config.search_space import SearchSpace
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.schemas import SCHEMAS

NO_CLUSTER = "ray://127.0.0.1:9"
COMMANDS = (
    "plan",
    "scan",
    "solve",
    "report",
    "import",
    "demo",
    "run",
    "submit",
    "jobs",
    "compare",
    "nightly",
    "evaluate",
    "frontier",
    "explain",
    "export",
    "refine",
    "site",
)
JOBS_COMMANDS = ("jobs list", "jobs status", "jobs logs", "jobs stop")


def run(*arguments: Any) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(result: Result, exit_code: int = 2) -> str:
    """The one line with which a command refused; its exit code is checked."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert NO_CLUSTER not in lines[0]
    return lines[0]


@pytest.fixture
def scan(model_folder: Any, text_file: Path, tmp_path: Path) -> Any:
    """Scan with a small model; keywords replace flags, None leaves one out.

    Returns the result after checking that nothing was written to ``--out``.
    """

    def run_scan(*extra: Any, model: Any = "", **flags: Any) -> Result:
        values = {
            "data": text_file,
            "out": tmp_path / "run",
            "formats": "wint4_afp16,wint8_aint8",
            "bits": 8,
            "device": "cpu",
            "address": NO_CLUSTER,
        } | flags
        options = [(f"--{key}", value) for key, value in values.items() if value is not None]
        named = [] if model is None else [model or model_folder("llama")]
        result = run("scan", *named, *(part for option in options for part in option), *extra)
        assert not (tmp_path / "run").exists()
        return result

    return run_scan


@pytest.fixture
def scan_yaml(scan: Any, tmp_path: Path) -> Any:
    """Scan with a YAML file of the given text; flags that the text replaces are left out."""

    def run_scan(text: str, **flags: Any) -> Result:
        path = tmp_path / "scan.yaml"
        path.write_text(text)
        result: Result = scan("--config", path, **flags)
        return result

    return run_scan


def save_config(config: Any, folder: Path) -> Path:
    """A model folder that holds config.json alone."""
    config.save_pretrained(folder)
    return folder


# --- the model


@pytest.mark.parametrize("command", ["plan", "scan"])
def test_model_missing_folder_is_refused(command: str, scan: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    result = run("plan", missing) if command == "plan" else scan(model=missing)
    line = refusal(result)
    assert str(missing) in line
    assert "give a folder, a GGUF file or a hub id" in line


def test_model_file_that_is_no_gguf_is_refused(scan: Any, text_file: Path) -> None:
    line = refusal(scan(model=text_file))
    assert str(text_file) in line
    assert "give its folder" in line


def test_model_folder_without_config_is_refused(scan: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    line = refusal(scan(model=empty))
    assert str(empty) in line
    assert "config.json" in line


def test_model_damaged_config_is_refused(scan: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{not json")
    assert str(broken) in refusal(scan(model=broken))


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHER_MODELS = {
    "bert": lambda: transformers.BertConfig(**SMALL, intermediate_size=64, vocab_size=64),
    "roberta": lambda: transformers.RobertaConfig(**SMALL, intermediate_size=64, vocab_size=64),
    "t5": lambda: transformers.T5Config(d_model=32, d_ff=64, num_layers=1, vocab_size=64),
    "vit": lambda: transformers.ViTConfig(**SMALL, intermediate_size=64),
}


@pytest.mark.parametrize("command", ["plan", "scan"])
@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_model_that_is_no_decoder_is_refused(
    kind: str, command: str, scan: Any, tmp_path: Path
) -> None:
    folder = save_config(OTHER_MODELS[kind](), tmp_path / kind)
    result = run("plan", folder, "--device", "cpu") if command == "plan" else scan(model=folder)
    line = refusal(result)
    assert str(folder) in line
    assert re.search("not a decoder-only|not a language model", line)


def test_model_bert_that_is_a_decoder_is_planned(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=64, vocab_size=64, is_decoder=True)
    result = run("plan", save_config(config, tmp_path / "bert"), "--device", "cpu")
    assert result.exit_code == 0, result.output


def test_scan_without_model_is_refused(scan: Any) -> None:
    assert "--model is missing" in refusal(scan(model=None))


# --- formats and layers


def test_format_unknown_names_the_closest(scan: Any) -> None:
    line = refusal(scan(formats="wint4_afp61"))
    assert "'wint4_afp61'" in line
    assert "wint4_afp16" in line.partition("closest:")[2]


def test_format_unknown_preset_names_the_closest(scan: Any) -> None:
    line = refusal(scan(formats="wint4_afp16,FP8_DEFAULT_CONFIG"))
    assert "'FP8_DEFAULT_CONFIG'" in line
    assert "FP8_DEFAULT_CFG" in line.partition("closest:")[2]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NVFP4_AWQ_FULL_CFG", "awq_full"),
        ("NVFP4_AWQ_CLIP_CFG", "awq_clip"),
        ("NVFP4_SVDQUANT_DEFAULT_CFG", "svdquant"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_format_with_other_calibration_is_refused(
    name: str, reason: str, device: str, scan: Any
) -> None:
    line = refusal(scan(formats=name, device=device))
    assert name in line
    assert reason in line.replace(name, "")
    assert "needs the calibration algorithm" in line


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("nvfp4_default_cfg", "closest: NVFP4_DEFAULT_CFG,"),
        ("nvfp4", "closest: NVFP4_DEFAULT_CFG,"),
        ("MXFP6", "closest: MXFP6_DEFAULT_CFG,"),
        ("wFP8_aFP8", "closest: wfp8_afp8,"),
    ],
)
def test_format_in_other_case_or_without_its_ending_names_the_right_one(
    name: str, suggested: str, scan: Any
) -> None:
    assert suggested in refusal(scan(formats=name))


def test_format_that_needs_cuda_is_refused_on_cpu(scan_yaml: Any) -> None:
    text = "custom_formats: {mine: {weight: {num_bits: [2, 1], block_sizes: {-1: 16}}}}\n"
    line = refusal(scan_yaml(text, formats="wint8_aint8,mine", device="cpu"))
    assert "mine cannot run on cpu: fp4 needs block_sizes with 'type: dynamic'" in line
    assert "choose another format" in line


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fp4_and_mx_are_planned_for_either_device(device: str, model_folder: Any) -> None:
    formats = "wfp4_afp16,NVFP4_DEFAULT_CFG,MXFP8_DEFAULT_CFG"
    result = run("plan", model_folder("llama"), "--formats", formats, "--device", device)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("formats", "problem"),
    [("", "name at least one"), ("none", "'none'"), ("wint8_aint8,wint8_aint8", "named twice")],
)
def test_formats_that_make_no_menu_are_refused(formats: str, problem: str, scan: Any) -> None:
    line = refusal(scan(formats=formats))
    assert line.startswith("error: --formats: ")
    assert problem in line


def test_disable_pattern_without_layer_is_refused(scan: Any) -> None:
    line = refusal(scan(disable="*experts*"))
    assert "'*experts*' matches no layer" in line
    assert "model.layers.0.self_attn.q_proj" in line


def test_disable_every_layer_is_refused(scan: Any) -> None:
    assert "every layer is disabled" in refusal(scan(disable="*"))


# --- the budget


@pytest.mark.parametrize("bits", ["17", "0", "-1", "nan", "inf"])
def test_bits_outside_the_range_are_refused(bits: str, scan: Any) -> None:
    line = refusal(scan(bits=bits))
    assert line.startswith("error: --bits: ")
    assert f"(got {float(bits)})" in line


@pytest.mark.parametrize("text", ["17", "0", "-1", "nan", "inf"])
def test_solve_bits_outside_the_range_are_refused(text: str, make_run: Any) -> None:
    directory = make_run()
    line = refusal(run("solve", directory.uri, "--bits", text))
    assert f"--bits {float(text)}" in line
    assert "above 0 and at most 16" in line


def reachable_low(model: Path, *options: str) -> float:
    """Lowest average bits that ``plan`` reports."""
    result = run("plan", model, "--device", "cpu", "--json", *options)
    return float(json.loads(result.stdout)["bits_range"][0])


def test_bits_below_the_reachable_exit_4_with_the_range(scan: Any, model_folder: Any) -> None:
    line = refusal(scan(bits=4), exit_code=4)
    low, high = re.search(r"--bits 4 .*reachable is ([\d.]+) to ([\d.]+)", line).groups()
    exact = reachable_low(model_folder("llama"), "--formats", "wint4_afp16,wint8_aint8")
    assert exact <= float(low) < exact + 0.01
    assert float(high) == 16


def test_bits_at_the_reported_minimum_pass_the_budget_check(scan: Any) -> None:
    low = re.search(r"reachable is ([\d.]+)", scan(bits=4).stderr)[1]
    result = scan(bits=low)
    assert result.exit_code == 2
    assert NO_CLUSTER in result.stderr


def test_bytes_below_the_reachable_exit_4_with_the_range(scan: Any) -> None:
    line = refusal(scan(bits=None, bytes="40KB"), exit_code=4)
    assert "--bytes 40000" in line
    assert re.search(r"reachable is .* bytes\) to .* bytes\)", line)


def test_solve_bits_below_the_reachable_exits_4_and_writes_nothing(make_run: Any) -> None:
    directory = make_run()
    line = refusal(run("solve", directory.uri, "--bits", 2), exit_code=4)
    assert re.search(r"--bits 2 .*reachable is [\d.]+ to [\d.]+", line)
    assert directory.list_folders("solutions") == []


@pytest.mark.parametrize("text", ["lots", "2.5XB", "-3GB", "0"])
def test_bytes_that_are_no_size_are_refused(text: str, scan: Any, make_run: Any) -> None:
    for result in (scan(bytes=text), run("solve", make_run().uri, "--bytes", text)):
        line = refusal(result)
        assert line.startswith("error: --bytes: ")
        assert repr(text) in line


def test_scan_without_budget_is_refused(scan: Any) -> None:
    line = refusal(scan(bits=None))
    assert "budget" in line
    assert "bits" in line
    assert "bytes" in line


def test_solve_without_budget_is_refused(make_run: Any) -> None:
    line = refusal(run("solve", make_run().uri))
    assert "--bits" in line
    assert "--bytes" in line


# --- other flags


@pytest.mark.parametrize("flag", ["data", "out"])
def test_scan_without_required_flag_names_it(flag: str, scan: Any) -> None:
    assert f"--{flag} is missing" in refusal(scan(**{flag: None}))


def test_resume_with_overwrite_is_refused(scan: Any) -> None:
    line = refusal(scan("--resume", "--overwrite"))
    assert "--resume" in line
    assert "--overwrite" in line


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "nan", "150%", "0%", "soon", "%"])
def test_stop_when_stable_that_is_no_share_is_refused(share: str, scan: Any) -> None:
    line = refusal(scan(**{"stop-when-stable": share}))
    assert line.startswith("error: --stop-when-stable: ")
    assert repr(share) in line
    assert "0.01 or 1%" in line


def test_yaml_stop_when_stable_takes_percent_and_refuses_yes(scan_yaml: Any) -> None:
    assert "stop_when_stable: '0.5.1'" in refusal(scan_yaml("stop_when_stable: 0.5.1\n"))
    assert "stop_when_stable: True is not a share" in refusal(scan_yaml("stop_when_stable: yes\n"))
    result = scan_yaml("stop_when_stable: 2%\n")
    assert result.exit_code == 2
    assert NO_CLUSTER in result.stderr


@pytest.mark.parametrize("workers", ["0", "-1", "many", "1.5"])
def test_workers_that_are_no_number_are_refused(workers: str, scan: Any) -> None:
    line = refusal(scan(workers=workers))
    assert line.startswith("error: --workers: ")
    assert workers in line


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("--bits", "four", "'four' is not a valid float"),
        ("--samples", "many", "'many' is not a valid integer"),
        ("--dtype", "float16", "'float16' is not one of 'auto', 'float32', 'bfloat16'"),
        ("--device", "tpu", "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
    ],
)
def test_flag_of_wrong_type_is_named_in_the_last_line(
    flag: str, value: str, shown: str, scan: Any
) -> None:
    result = scan(flag, value)
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert flag in line
    assert shown in line


def test_flag_unknown_is_named_in_the_last_line(scan: Any) -> None:
    result = scan("--sample", "3")
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert "--sample" in line
    assert "--samples" in line


# --- YAML


def test_yaml_unknown_key_is_named_with_the_closest(scan_yaml: Any) -> None:
    line = refusal(scan_yaml("smaples: 3\n"))
    assert "scan.yaml: smaples: unknown key" in line
    assert "samples" in line.partition("closest:")[2]


def test_yaml_unknown_nested_key_is_named_with_its_path(scan_yaml: Any) -> None:
    text = "custom_formats: {mine: {weight: {num_bits: 4}, output: {num_bits: 8}}}\n"
    line = refusal(scan_yaml(text, formats="mine"))
    assert "scan.yaml: custom_formats.mine.output: unknown key" in line
    assert "'weight'" in line


def test_yaml_unknown_quantizer_attribute_is_named(scan_yaml: Any) -> None:
    text = "custom_formats: {mine: {weight: {num_bitz: 4}}}\n"
    line = refusal(scan_yaml(text, formats="mine"))
    assert "'mine'" in line
    assert "num_bitz" in line


def test_yaml_algorithm_of_a_custom_format_is_checked_when_planning(
    scan_yaml: Any, model_folder: Any
) -> None:
    weight = "weight: {num_bits: 8, axis: 0}"
    text = f"custom_formats: {{mine: {{{weight}, algorithm: msee}}}}\n"
    line = refusal(scan_yaml(text, formats="mine"))
    assert "custom format 'mine' needs the calibration algorithm 'msee'; known are max, mse" in line
    text = f"custom_formats: {{mine: {{{weight}, algorithm: {{method: mse, step: 1}}}}}}\n"
    assert "mse has no argument 'step'" in refusal(scan_yaml(text, formats="mine"))
    assert "custom_formats.mine.algorithm" in refusal(
        scan_yaml(f"custom_formats: {{mine: {{{weight}, algorithm: 4}}}}\n", formats="mine")
    )


def test_yaml_custom_format_without_weight_is_refused(scan_yaml: Any) -> None:
    line = refusal(scan_yaml("custom_formats: {mine: {input: null}}\n", formats="mine"))
    assert "'mine'" in line
    assert "'weight'" in line


@pytest.mark.parametrize(
    ("text", "path", "shown"),
    [
        ("samples: many\n", "samples", "'many'"),
        ("samples: 3.5\n", "samples", "3.5"),
        ("samples: yes\n", "samples", "True"),
        ("samples: 0\n", "samples", "0"),
        ("seed: [1]\n", "seed", "[1]"),
        ("workers: [1]\n", "workers", "[1]"),
        ("workers: true\n", "workers", "True"),
        ("pack: perhaps\n", "pack", "'perhaps'"),
        ("labels: humans\n", "labels", "'humans'"),
        ("split: {a: 1}\n", "split", "{'a': 1}"),
        ("disable: 3\n", "disable", "3"),
        ("custom_formats: [a]\n", "custom_formats", "['a']"),
        ("custom_formats: {a: {weight: 4}}\n", "custom_formats.a.weight", "4"),
    ],
)
def test_yaml_wrong_type_names_path_and_value(
    text: str, path: str, shown: str, scan_yaml: Any
) -> None:
    line = refusal(scan_yaml(text))
    assert f"scan.yaml: {path}: " in line
    assert shown in line


@pytest.mark.parametrize(
    ("text", "path"), [("formats: [1]\n", "formats.0"), ("formats: {a: 1}\n", "formats")]
)
def test_yaml_formats_of_wrong_type_are_refused(text: str, path: str, scan_yaml: Any) -> None:
    assert f"scan.yaml: {path}: " in refusal(scan_yaml(text, formats=None))


@pytest.mark.parametrize("text", ["- a\n- b\n", "only text\n", "3\n"])
def test_yaml_that_is_no_mapping_is_refused(text: str, scan_yaml: Any) -> None:
    line = refusal(scan_yaml(text))
    assert "scan.yaml" in line
    assert "key: value" in line


@pytest.mark.parametrize("text", ["a: [\n", "a: b: c\n", "\tsamples: 3\n"])
def test_yaml_that_is_malformed_is_refused(text: str, scan_yaml: Any) -> None:
    line = refusal(scan_yaml(text))
    assert "scan.yaml is not valid YAML" in line
    assert "line" in line


def test_yaml_missing_file_is_refused(scan: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert f"{missing} does not exist" in refusal(scan("--config", missing))


def test_yaml_with_flag_over_it_the_flag_wins(scan_yaml: Any) -> None:
    assert "(got 17.0)" in refusal(scan_yaml("bits: 4\n", bits=17))


def test_yaml_alone_gives_the_same_answer_as_flags(model_folder: Any, tmp_path: Path) -> None:
    folder = model_folder("qwen3")
    values = {
        "model": "overwritten by the argument",
        "formats": ["wint4_afp16", "wint8_aint8"],
        "disable": ["*o_proj"],
        "device": "cpu",
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    from_yaml = run("plan", folder, "--config", path, "--json")
    flags = ("--formats", "wint4_afp16,wint8_aint8", "--disable", "*o_proj", "--device", "cpu")
    from_flags = run("plan", folder, *flags, "--json")
    assert from_yaml.exit_code == 0, from_yaml.output
    assert from_yaml.stdout == from_flags.stdout


# --- plan


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "qwen3_vl"])
def test_plan_json_holds_groups_and_range(family: str, model_folder: Any) -> None:
    formats = ["wint4_afp16", "wint8_aint8"]
    command = ("plan", model_folder(family), "--device", "cpu", "--formats", ",".join(formats))
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    rows = printed["groups"]
    assert all(set(row) == set(SCHEMAS["plan"].names) for row in rows)
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


# --- solve and report


def test_solve_json_is_the_written_solution(make_run: Any) -> None:
    directory = make_run()
    result = run("solve", directory.uri, "--bits", 6, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["name"] == "bits-6.00"
    written = json.loads(Path(printed["paths"]["manifest.json"]).read_text())
    assert written["solution"].items() <= printed.items()
    assert written["solution"]["effective_bits"] <= 6
    assert all(Path(path).parent.name == "bits-6.00" for path in printed["paths"].values())
    assert all(Path(path).is_file() for path in printed["paths"].values())


def test_solve_pins_and_allowed_formats_are_kept(make_run: Any) -> None:
    directory = make_run()
    first, second = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"
    options = ("--pin", f"{first}=none", "--allow", "*.mlp.*=wint8_aint8,wfp8_afp8")
    result = run("solve", directory.uri, "--bits", 9, *options, "--max-formats", 2, "--json")
    assert result.exit_code == 0, result.output
    rows = pq.read_table(json.loads(result.stdout)["paths"]["manifest.parquet"]).to_pylist()
    chosen = {row["module"]: row["format"] for row in rows}
    assert chosen[first] == "none"
    assert second in chosen
    mlp = {format_ for module, format_ in chosen.items() if ".mlp." in module}
    assert mlp <= {"wint8_aint8", "wfp8_afp8"}
    assert len(set(chosen.values()) - {"none"}) <= 2


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        (("--pin", "model.layers.0.mlp.gate=none"), "model.layers.0.mlp.gate_proj"),
        (("--pin", "model.layers.0.mlp.gate_proj=wint4"), "wint4_afp16"),
        (("--allow", "*experts*=none"), "'*experts*'"),
        (("--allow", "*=wint4"), "wint4_afp16"),
    ],
)
def test_solve_constraint_on_unknown_name_is_refused(
    option: tuple[str, str], shown: str, make_run: Any
) -> None:
    directory = make_run()
    line = refusal(run("solve", directory.uri, "--bits", 8, *option))
    assert shown in line
    assert directory.list_folders("solutions") == []


@pytest.mark.parametrize("command", [("solve", "--bits", "4"), ("report",)])
def test_command_on_folder_that_is_no_run_is_refused(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    name, *options = command
    line = refusal(run(name, tmp_path, *options))
    assert f"{tmp_path} is not a run directory" in line
    assert "run.json" in line


def test_report_without_solution_is_refused(make_run: Any) -> None:
    directory = make_run()
    assert "no solution yet" in refusal(run("report", directory.uri))


def test_report_writes_all_reports_again(make_run: Any) -> None:
    directory = make_run()
    for bits in (5, 7):
        assert run("solve", directory.uri, "--bits", bits).exit_code == 0
    root = Path(directory.uri)
    before = {path: path.read_bytes() for path in root.rglob("report.*")}
    assert len(before) == 4
    for path in before:
        path.unlink()
    result = run("report", directory.uri)
    assert result.exit_code == 0, result.output
    assert sorted(result.stdout.split()) == sorted(str(path) for path in before)
    assert {path: path.read_bytes() for path in before} == before


def test_report_json_lists_the_paths(make_run: Any) -> None:
    directory = make_run()
    run("solve", directory.uri, "--bits", 5)
    paths = json.loads(run("report", directory.uri, "--json").stdout)["paths"]
    assert sorted(Path(path).name for path in paths) == ["report.html", "report.md"]


def test_import_into_existing_run_without_flag_keeps_it(make_run: Any) -> None:
    directory: RunDirectory = make_run()
    before = {p: p.read_bytes() for p in Path(directory.uri).rglob("*") if p.is_file()}
    manifest = Path(directory.uri).parent / "manifest.json"
    manifest.write_text(
        json.dumps(
            {
                "scheme": {"auto_quantize_bits": 8},
                "layer_sensitivity": {
                    "a": {"formats": ["F", "NONE"], "scores": [1.0, 0], "costs": [8.0, 16.0]}
                },
            }
        )
    )
    line = refusal(run("import", manifest, "--out", directory.uri))
    assert "--overwrite" in line
    assert {p: p.read_bytes() for p in Path(directory.uri).rglob("*") if p.is_file()} == before


# --- help


def options_of(name: str) -> list[click.Option]:
    """Options of a command, as click knows them; a group's command has two words."""
    command: click.Command = main
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return [p for p in command.params if isinstance(p, click.Option)]


def flags_of(option: click.Option) -> list[str]:
    """Long flags of an option."""
    return [flag for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--")]


@pytest.mark.parametrize("name", [*COMMANDS, *JOBS_COMMANDS])
def test_help_shows_an_example_and_every_option(name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert re.search(rf"Example:\n +autoquant-ray {name}\b", result.stdout)
    for option in options_of(name):
        assert option.help, option.name
        assert flags_of(option)
        for flag in flags_of(option):
            assert re.search(rf"(?m)\s{flag}(\s|$)", result.stdout), flag


@pytest.mark.parametrize(("name", "model"), [("plan", SearchSpace), ("scan", ScanConfig)])
def test_help_shows_every_config_field_with_text_and_default(
    name: str, model: type[SearchSpace]
) -> None:
    shown = " ".join(run(name, "--help").stdout.replace("vision-\n", "vision-").split())
    for field_name, field in model.model_fields.items():
        if field_name in ("model", "custom_formats"):
            continue
        start = shown.index(f"--{field_name.replace('_', '-')} ")
        text = shown[start:]
        assert " ".join(field.description.split()[:4]) in text, field_name
        if (
            not field.is_required()
            and field.default not in (None, ())
            and field.annotation is not bool
        ):
            default = ",".join(field.default) if field_name == "formats" else field.default
            assert f"[default: {default}]" in text, field_name


def test_help_lists_every_command_and_exit_code() -> None:
    shown = run("--help").stdout
    assert set(main.commands) == set(COMMANDS)
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", shown, re.M)
    for code in ("0 done", "1 failed", "2 wrong usage", "4 budget infeasible", "130 interrupted"):
        assert code in shown


@pytest.mark.parametrize("name", [*COMMANDS, *JOBS_COMMANDS])
def test_help_examples_name_only_real_options(name: str) -> None:
    example = run(*name.split(), "--help").stdout.partition("Example:")[2].partition("Options:")[0]
    for line in re.split(r"\n\s*autoquant-ray ", example)[1:]:
        command, second, *_ = [*line.split(), ""]
        command = f"{command} {second}" if command == "jobs" else command
        used = re.findall(r"--[a-z-]+", line)
        known = {flag for option in options_of(command) for flag in flags_of(option)}
        assert set(used) <= known, line
