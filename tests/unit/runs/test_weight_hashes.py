"""Hashes that name the layer whose weights changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autoquant_ray.errors import ModelError
from autoquant_ray.runs import weight_hashes
from autoquant_ray.runs.weight_hashes import OTHER, hash_groups

GROUPS = {"a.q_proj": ["a.q_proj", "a.k_proj"], "a.experts": ["a.experts"], "b": ["b"]}


def save(folder: Path, **changes: Any) -> Path:
    """A checkpoint in two files; keywords replace tensors."""
    names = ("a.q_proj.weight", "a.k_proj.weight", "a.experts.0.up.weight", "norm.weight")
    tensors = {name: torch.arange(6.0).view(2, 3) + i for i, name in enumerate(names)}
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    folder.mkdir()
    save_file(dict(list(tensors.items())[:2]), folder / "model-1.safetensors")
    save_file(dict(list(tensors.items())[2:]), folder / "model-2.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensor", "group"),
    [
        ("a__k_proj__weight", "a.q_proj"),
        ("a__experts__0__up__weight", "a.experts"),
        ("norm__weight", OTHER),
    ],
)
@pytest.mark.parametrize("limit", [2**30, 0], ids=["whole", "blocks"])
def test_changed_tensor_changes_the_hash_of_its_group_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, group: str, limit: int
) -> None:
    monkeypatch.setattr(weight_hashes, "_WHOLE_LIMIT_BYTES", limit)
    before = hash_groups(save(tmp_path / "before"), GROUPS)
    after = hash_groups(save(tmp_path / "after", **{tensor: torch.ones(2, 3)}), GROUPS)
    assert list(before) == ["a.q_proj", "a.experts", OTHER]
    assert [name for name in before if before[name] != after[name]] == [group]


def test_same_tensors_in_other_files_have_the_same_hashes(tmp_path: Path) -> None:
    first = save(tmp_path / "first")
    (first / "model-1.safetensors").rename(first / "model-3.safetensors")
    assert hash_groups(first, GROUPS) == hash_groups(save(tmp_path / "second"), GROUPS)


def test_folder_without_safetensors_has_no_hashes(tmp_path: Path) -> None:
    assert hash_groups(tmp_path, GROUPS) == {}


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
        hash_groups(tmp_path, GROUPS)
