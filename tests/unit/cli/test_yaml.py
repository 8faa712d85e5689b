"""Config files: what is refused, and where the message points."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import refusal, run


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


def aliases(levels: int) -> str:
    """Each list holds the one before nine times."""
    lists = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *lists, ""])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (aliases(9), "aliases"),
        ("custom_formats: &a {b: *a}\n", "aliases"),
        (f"samples: &a [{', '.join(['xyz'] * 30_000)}]\nbits: [*a, *a]\n", "samples"),
        ("samples: " + "[" * 30_000 + "]" * 30_000 + "\n", "nested too deeply"),
        (f"samples: {'9' * 5000}\n", "not valid YAML"),
        (f"samples: {'x' * 300_000}\n", "samples"),
        (f"{'k' * 1_000}: 1\n", "unknown key"),
        ("data: " + "x" * 2_000_000, "more than 1,000,000 characters"),
        ("samples: 2026-99-99\n", "not valid YAML"),
        (f"custom_formats: {{{'m' * 50_000}: {{weight: 3}}}}\n", "custom_formats"),
    ],
    ids=["nested", "itself", "list", "deep", "digits", "text", "key", "long", "date", "name"],
)
def test_yaml_of_any_size_gives_one_short_line_at_once(
    text: str, said: str, scan_yaml: Any
) -> None:
    start = time.perf_counter()
    line = refusal(scan_yaml(text))
    assert time.perf_counter() - start < 5
    assert said in line
    assert len(line) <= 400


def test_yaml_aliases_that_are_used_well_stay(scan_yaml: Any) -> None:
    text = "custom_formats: {a: &a {weight: {num_bits: 4, block_sizes: {-1: 32}}}, b: *a}\n"
    assert "unknown" in refusal(scan_yaml(text, formats="a,b,no-such-format"))
