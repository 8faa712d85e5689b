"""Models, formats and disabled layers that the command line refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from command_line import refusal, run


def save_config(config: Any, folder: Path) -> Path:
    """A model folder that holds config.json alone."""
    config.save_pretrained(folder)
    return folder


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
