"""Weight files that were not copied whole are refused by what their header says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import run

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(model_folder: Any, tmp_path: Path) -> Path:
    """A copy of a model that a test may damage."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def refusal(model: Path) -> str:
    """The line with which ``plan`` refuses a model."""
    result = run("plan", model, "--formats", "wint8_aint8", "--device", "cpu")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert len(line) <= 400
    return str(line)


@pytest.mark.parametrize("lost", [1, 1000])
def test_file_without_its_end_is_refused(lost: int, model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:-lost])
    line = refusal(model)
    assert f"holds {len(content) - lost:,} bytes, but its tensors end at {len(content):,}" in line
    assert "fetch it again" in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\0\0\0",
        b"\xff" * 400,
        b"\x02" + b"\0" * 7 + b"[]",
        b"\x0a" + b"\0" * 7 + b'{"a": [1]}',
    ],
    ids=["empty", "no length", "no header", "a list", "an odd entry"],
)
def test_file_that_is_none_is_refused(content: bytes, model: Path) -> None:
    (model / WEIGHTS).write_bytes(content)
    line = refusal(model)
    assert "is no safetensors file" in line
    assert line.endswith("fetch it again")


def test_pointer_of_git_lfs_is_named(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 500\n"
    (model / WEIGHTS).write_text(pointer)
    assert refusal(model).endswith(
        "it is a pointer that Git LFS left in its place; run `git lfs pull` in its folder"
    )


def test_part_without_its_end_is_refused(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    names = [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
    (model / WEIGHTS).unlink()
    part = "model-00001-of-00001.safetensors"
    (model / part).write_bytes(content[:-4])
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, part)}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert f"{part} holds" in refusal(model)
