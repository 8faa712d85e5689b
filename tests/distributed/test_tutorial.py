"""The tutorial's commands, on a small model and in its order, do what the page says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
PROGRAM = "autoquant-ray"
SCANNED, SOLVED = "runs/tutorial", "bits-7.00-vllm"


def steps() -> Iterator[tuple[list[str], list[str]]]:
    """Each command of ours, as words, with the lines that it prints on the page."""
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text("utf-8"), re.S):
        for step in block.replace("\\\n", "").split("$ ")[1:]:
            command, *printed = step.splitlines()
            if command.startswith(f"{PROGRAM} "):
                yield shlex.split(command)[1:], printed


def until_a_number(line: str) -> str:
    """What a line says before its first number or rule, its blanks as single ones."""
    return " ".join(re.split(r"[\d─]", line)[0].split())


def test_commands_of_the_tutorial_work_in_its_order(
    run_command: Any,
    model_folder: Any,
    make_samples: Any,
    cluster_address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS")  # as wide as the page
    text = tmp_path / "text.txt"
    lines = (" ".join(f"w{token}" for token in sample) for sample in make_samples([200] * 40))
    text.write_text("\n".join(lines) + "\n")
    here = {
        "$MODEL": model_folder("llama"),
        "pydoc": text,
        "local": cluster_address,
        SCANNED: tmp_path / "run",
        "served-tutorial": tmp_path / "served",
    }
    commands = []
    for words, printed in steps():
        done = run_command(*(here.get(word, word) for word in words))
        assert done.returncode == 0, done.stderr
        said = f"{done.stdout} {done.stderr}".replace(str(tmp_path / "run"), SCANNED)
        said = " ".join(said.split())
        for line in printed:
            assert until_a_number(line).removesuffix("served-tutorial") in said, (words[0], line)
        commands.append(words[0])
    assert commands == ["scan", "solve", "evaluate", "export"]
    assert SOLVED in PAGE.read_text("utf-8")
    assert (tmp_path / "run" / "solutions" / SOLVED / "manifest.parquet").exists()
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
