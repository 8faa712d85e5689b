"""Budgets and other options that the command line refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import NO_CLUSTER, refusal, run


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
    assert "give a budget: --bits B" in line
    assert "--bytes N" in line


def test_solve_without_budget_is_refused(make_run: Any) -> None:
    line = refusal(run("solve", make_run().uri))
    assert "--bits" in line
    assert "--bytes" in line


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


def test_keep_rounded_takes_yes_or_no(scan: Any, scan_yaml: Any) -> None:
    for result in (scan(**{"keep-rounded": "no"}), scan_yaml("keep_rounded: no\n")):
        assert NO_CLUSTER in result.stderr
    assert "'maybe' is not one of 'yes', 'no'" in refusal(scan(**{"keep-rounded": "maybe"}))
    line = refusal(scan_yaml("keep_rounded: maybe\n"))
    assert "scan.yaml: keep_rounded: " in line
    assert "'maybe'" in line


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


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--tasks-dir", "folder"), "--tasks-dir is for --tasks; give that too, or leave it out"),
        (("--task-limit", "5"), "--task-limit is for --tasks; give that too, or leave it out"),
        (("--tasks", " , "), "--tasks: names no task; give one, such as arc_easy"),
        (("--num-random", "3", "--against", "uniform"), "--num-random is for random in --against"),
        (("--node-label", "a b"), "--node-label: 'a b=' is no label of a node"),
        (("--as", "xml"), "'--as': 'xml' is not one of 'text'"),
    ],
)
def test_evaluate_options_without_effect_and_by_their_own_flags_are_refused(
    words: tuple[str, ...], text: str, make_run: Any
) -> None:
    line = refusal(run("evaluate", make_run().uri, "--address", NO_CLUSTER, *words))
    assert text in line
