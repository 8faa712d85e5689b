"""``import`` refuses manifests that are broken, and names the place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from manifests import UNSEARCHED

LAYER = "model.layers.1.self_attn.o_proj.quant_recipe"
DELETED = object()


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("layer_sensitivity",), DELETED, ["'layer_sensitivity'"]),
        (("layer_sensitivity",), {}, ["'layer_sensitivity'"]),
        (("layer_sensitivity",), [1], ["'layer_sensitivity'"]),
        (("layer_sensitivity", LAYER), [1], [LAYER, "formats, scores and costs"]),
        (("layer_sensitivity", LAYER, "costs"), DELETED, [LAYER, "costs"]),
        (("layer_sensitivity", LAYER, "costs"), 3, [LAYER, "lists"]),
        (("layer_sensitivity", LAYER, "costs"), [1024.0, 2048.0], [LAYER, "length"]),
        (("layer_sensitivity", LAYER, "scores"), ["a", 0.1, 0], [LAYER, "INT4_AWQ_CFG"]),
        (("layer_sensitivity", LAYER, "scores"), [0.2, None, 0], [LAYER, "FP8_DEFAULT_CFG"]),
        (("layer_sensitivity", LAYER, "scores"), [0.2, -0.1, 0], [LAYER, "FP8_DEFAULT_CFG"]),
        (("layer_sensitivity", LAYER, "scores"), [0.2, float("nan"), 0], [LAYER, "FP8_DEFAULT"]),
        (("layer_sensitivity", LAYER, "scores"), [0.2, True, 0], [LAYER, "FP8_DEFAULT_CFG"]),
        (("layer_sensitivity", LAYER, "costs"), [10**400, 2048, 4096], [LAYER, "INT4_AWQ_CFG"]),
        (("layer_sensitivity", LAYER, "costs"), [1024.0, 2048.0, 0], [LAYER, "NONE"]),
        (("layer_sensitivity", LAYER, "costs"), [0.1, 0.2, 0.4], [LAYER, "NONE"]),
        (
            ("layer_sensitivity", LAYER, "formats"),
            ["INT4_AWQ_CFG(effective-bits: 4.0)"] * 2 + ["NONE(effective-bits: 16.0)"],
            [LAYER, "twice"],
        ),
        (
            ("layer_sensitivity", LAYER, "formats"),
            ["A(effective-bits: 4.0)", "B(effective-bits: 8.0)", "C(effective-bits: 9.0)"],
            [LAYER, "NONE"],
        ),
        (
            ("layer_sensitivity", LAYER.removesuffix(".quant_recipe")),
            {"formats": ["NONE"], "scores": [0], "costs": [16]},
            [LAYER],
        ),
        (("layer_sensitivity", LAYER, "costs"), [1e19, 2e19, 4e19], [LAYER, "more weights"]),
        (("model",), {"id": "\ud800"}, ["surrogate"]),
        (("scheme",), [1], ["scheme"]),
        (("model",), "example/small-llama", ["model"]),
        (("dataset",), ["a"], ["dataset"]),
        (("scheme", "auto_quantize_bits"), "seven", ["auto_quantize_bits", "'seven'"]),
        (("scheme", "auto_quantize_bits"), 0, ["auto_quantize_bits", "0"]),
        (("scheme", "auto_quantize_bits"), 17, ["auto_quantize_bits", "17"]),
        (("scheme", "auto_quantize_bits"), True, ["auto_quantize_bits", "True"]),
    ],
)
def test_import_broken_manifest_names_the_place(
    place: tuple[str, ...],
    value: Any,
    named: list[str],
    manifest: dict[str, Any],
    write: Any,
    tmp_path: Path,
) -> None:
    broken = copy.deepcopy(manifest)
    parent = broken
    for key in place[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    path = write(broken)
    result = run("import", path, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert str(path) in line
    for part in named:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_import_without_any_budget_names_both_places(
    manifest: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    del manifest["scheme"], manifest["autoquant_state"]
    result = run("import", write(manifest), "--out", tmp_path / "run")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "scheme.auto_quantize_bits" in line
    assert "autoquant_state.constraints.effective_bits" in line


def test_import_with_only_none_is_refused(
    manifest: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    key = f"{UNSEARCHED}.quant_recipe"
    manifest["layer_sensitivity"] = {key: manifest["layer_sensitivity"][key]}
    result = run("import", write(manifest), "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "NONE" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]", '"text"', "null", "{", "\x00"])
def test_import_file_that_is_no_manifest_is_one_line(text: str, write: Any, tmp_path: Path) -> None:
    path = write(text)
    result = run("import", path, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert str(path) in line
    assert not (tmp_path / "run").exists()


def test_import_missing_file_is_one_line(tmp_path: Path) -> None:
    result = run("import", tmp_path / "none.json", "--out", tmp_path / "run")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert f"{tmp_path / 'none.json'} does not exist" in line
    assert not (tmp_path / "run").exists()
