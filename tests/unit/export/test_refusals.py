"""What ``export`` refuses before anything is written, and what the command prints."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import load_folder
from click.testing import CliRunner

from autoquant_ray import modelopt_export
from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.cli.main import main
from autoquant_ray.errors import AutoQuantError, ConfigError, FormatError, StoreError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.solve import solve_run

REFUSED = (
    "wint4_aint4",
    "wfp8_afp8",
    "wint8_aint8",
    "wint4_afp16",
    "wfp8_afp16",
    "INT8_SMOOTHQUANT_CFG",
)


@pytest.mark.parametrize(
    ("choice", "options", "error", "text"),
    [
        (
            {"*o_proj": "wint4_aint4"},
            {},
            FormatError,
            r"wint4_aint4 has no packed form.*0\.self_att",
        ),
        (
            {"*o_proj": "wint4_afp16"},
            {},
            FormatError,
            r"rows of 64 weights.*blocks of 128; wint4_g64_afp16 fits.*o_proj",
        ),
        ({"*o_proj": "wfp8_afp16"}, {}, FormatError, r"wfp8_afp16 has no .*compressed-tensors"),
        (
            {"*": "wfp8_afp8"},
            {"solution": "none-such"},
            StoreError,
            r"none-such.*solutions of the run",
        ),
        (
            {"*o_proj": "INT8_SMOOTHQUANT_CFG"},
            {},
            FormatError,
            r"INT8_SMOOTHQUANT_CFG \(smoothquant\) has a factor per input channel.*o_proj",
        ),
        (
            {"*o_proj": "INT8_SMOOTHQUANT_CFG"},
            {"layout": "compressed-tensors"},
            FormatError,
            r"has a factor per input channel",
        ),
        ({"*": "wfp8_afp8"}, {"out": "full"}, ConfigError, r"full is not empty"),
        ({"*": "wfp8_afp8"}, {"out": "full/file"}, ConfigError, r"is a file"),
        ({"*": "wfp8_afp8"}, {"out": "s3://bucket/x"}, ConfigError, r"local folder"),
        ({"*": "wfp8_afp8"}, {"layout": "gguf"}, ConfigError, r"'gguf' is unknown.*modelopt"),
        ({"*": "wfp8_afp8"}, {"engine": "vlm"}, ConfigError, r"'vlm' is unknown"),
        ({"*": "none"}, {}, ConfigError, r"every layer in 16 bits"),
        (
            {"*mlp*": "wint8_aint8", "*attn*": "wfp8_afp8"},
            {"engine": "vllm", "layout": "modelopt"},
            ConfigError,
            r"layers\.0\.mlp\.gate_proj.*W8A8_SQ_PER_CHANNEL",
        ),
        (
            {"*mlp*": "wint8_aint8", "*attn*": "wfp8_afp8"},
            {"engine": "sglang", "layout": "compressed-tensors"},
            ConfigError,
            r"one format only.*wfp8_afp8, wint8_aint8",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    choice: dict[str, str],
    options: dict[str, str],
    error: type[AutoQuantError],
    text: str,
    solved_run: Any,
    tmp_path: Path,
) -> None:
    directory, _, _ = solved_run("llama", {"*": "none"} | choice, REFUSED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = options.get("out", "new/out")
    target = out if "://" in out else str(tmp_path / out)
    rest = {name: value for name, value in options.items() if name != "out"}
    before = set(tmp_path.rglob("*"))
    with pytest.raises(error, match=text) as caught:
        export_run(directory, target, **rest)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert set(tmp_path.rglob("*")) == before


def test_missing_package_is_named_with_the_command_that_installs_it(
    solved_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python does not find a package whose place among the modules holds None."""
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    directory, _, _ = solved_run("llama", {"*": "wfp8_afp8"}, ("wfp8_afp8",))
    with pytest.raises(ConfigError, match="needs the package compressed-tensors") as caught:
        export_run(directory, str(tmp_path / "out"), layout="compressed-tensors")
    command = str(caught.value).partition("compressed-tensors: ")[2]
    assert command == "pip install -c constraints.txt -e '.[export]' in the checkout"
    assert not (tmp_path / "out").exists()


def test_names_that_the_exporter_does_not_take_back_are_refused(
    solved_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt alone would warn, and write the names in memory."""

    def stop(*_: Any) -> None:
        raise RuntimeError("no such rule")

    monkeypatch.setattr(modelopt_export, "revert_weight_conversion_quant_aware", stop)
    directory, _, _ = solved_run("llama", {"*": "wfp8_afp8"}, ("wfp8_afp8",))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match=r"form of its own files \(no such rule\)") as caught:
        export_run(directory, str(tmp_path / "out"))
    assert caught.value.exit_code == 2
    assert set(tmp_path.rglob("*")) == before


def test_layer_without_a_calibrated_maximum_is_named(solved_run: Any, tmp_path: Path) -> None:
    """As a rarely routed expert may be."""
    directory, _, _ = solved_run("llama", {"*": "wfp8_afp8"}, ("wfp8_afp8",))
    table = directory.read_table("calibration.parquet")
    name = "model.layers.1.mlp.up_proj"
    rows = [row for row in table.to_pylist() if row["module"] != name]
    directory.write_table("calibration.parquet", rows)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(FormatError, match=rf"{name} saw no input.*more samples") as caught:
        export_run(directory, str(tmp_path / "out"))
    assert caught.value.exit_code == 2
    assert set(tmp_path.rglob("*")) == before


def test_command_writes_the_folder_and_says_how_large_it_is(
    solved_run: Any, tmp_path: Path
) -> None:
    directory, _, _ = solved_run("llama", {"*": "wfp8_afp8", "lm_head": "none"})
    out = tmp_path / "out"
    arguments = ["export", directory.uri, "--out", str(out), "--engine", "vllm", "--gpu", "h100"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "quantized layers: 14 FP8" in result.stdout
    on_disk = sum(tensor.nbytes for tensor in load_folder(out).values())
    assert f"weights on disk: {on_disk:,} bytes; the manifest says" in result.stdout
    assert result.stdout.splitlines()[-2:] == [f"to serve it: vllm serve {out}", str(out)]
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert again.stderr == f"error: --out {out} is not empty; give a new folder\n"


UNSERVED = "warning: none of vllm, sglang, trtllm serves this modelopt checkpoint as chosen; "


@pytest.mark.parametrize("others", ["wint8_aint8", "MXFP8_DEFAULT_CFG"])
def test_command_warns_of_a_folder_that_no_engine_serves_and_says_what_mends_it(
    others: str, solved_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads int8 in the other layout, but on no GPU that has MXFP8."""
    monkeypatch.chdir(tmp_path)
    by_token = "FP8_PER_CHANNEL_PER_TOKEN_CFG"
    first = "wfp8_afp8" if others == "wint8_aint8" else "wint8_aint8"
    directory, _, _ = solved_run("llama", {}, (first, others, by_token))
    allow = {"*.q_proj": (first,), "*mlp*": (others,), "*.o_proj": (by_token,)}
    chosen = solve_run(directory, SolveOptions(bits=8.5, allow=allow)).name
    arguments = ["export", directory.uri, "--out", "out", "--solution", chosen]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "to serve it" not in result.stdout
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(UNSERVED)
    assert len(warning) <= 400
    words = shlex.split(warning.rpartition(": ")[2])
    if others == "wint8_aint8":
        assert words[:2] == ["autoquant-ray", "export"]
    else:
        assert words[:2] == ["autoquant-ray", "solve"]
        assert CliRunner().invoke(main, words[1:]).exit_code == 0
        solution = warning.split("--solution ")[1].split(": ")[0]
        words = ["", "export", directory.uri, "--out", "FOLDER", "--solution", solution]
    mended = CliRunner().invoke(main, words[1:])
    assert mended.exit_code == 0, mended.output
    assert "warning: none of" not in mended.stderr
    assert (tmp_path / "FOLDER" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tool", "mlx-lm"], "--tool, --base and --overwrite are for"),
        (
            ["--format", "recipe", "--engine", "vllm"],
            "--engine, --gpu, --max-shard-size and --extra-heads are for a checkpoint",
        ),
        (["--gpu", "h100"], "--gpu h100 needs an engine"),
    ],
)
def test_command_refuses_options_of_the_other_kind(
    options: list[str], text: str, make_run: Any, tmp_path: Path
) -> None:
    directory = make_run()
    solve_run(directory, SolveOptions(bits=8), folder="")
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["export", directory.uri, "--out", str(out), *options])
    assert result.exit_code == 2
    assert text in result.stderr
    assert not out.exists()
