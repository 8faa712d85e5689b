"""Exports part by part: what is in memory, files of a size, and an export that was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import transformers
from checkpoints import load_folder
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file, save_file
from small_models import make_tokenizer, small_config
from warm_commands import WarmProcess

from autoquant_ray import modelopt_export
from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.errors import CheckpointError, ConfigError
from autoquant_ray.export import checkpoint, compressed_tensors
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.export.compressed_tensors import CompressedPacker
from autoquant_ray.export.folder import PartFiles, parts_beside
from autoquant_ray.export.modelopt import ModelOptPacker
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model

CHOICE = {
    "*": "none",
    "*self_attn.*": "int4_g32",
    "*mlp.*": "wint8_afp16",
    "*down_proj": "none",
    "lm_head": "wint8_afp16",
}
PACKERS = {"modelopt": ModelOptPacker, "compressed-tensors": CompressedPacker}
LAYOUTS = tuple(PACKERS)
_POLL_S = 0.002


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_shards(folder: Path, target: Path, num_files: int) -> Path:
    """A copy of a model's folder with its tensors in several files, in turns."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_folder(folder)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{number % num_files + 1:05d}-of-{num_files:05d}.safetensors"
        files.setdefault(file, {})[name] = tensor
    for file, held in files.items():
        save_file(held, target / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


@contextmanager
def packing(monkeypatch: pytest.MonkeyPatch, layout: str) -> Iterator[list[Any]]:
    """While open, bytes of the weights that are in memory at each part that is packed."""
    sizes: list[Any] = []
    kind: Any = PACKERS[layout]
    pack = kind.pack

    init = kind.__init__
    models: list[Any] = []

    def remembering(self: Any, model: Any, *rest: Any) -> None:
        models.append(model)
        init(self, model, *rest)

    def counted(self: Any, shell: Any, part: Any) -> Any:
        weights = {id(p): p for p in models[-1].parameters() if not p.is_meta}
        in_part = {id(p) for p in shell.parameters()}
        assert set(weights) == in_part
        sizes.append(sum(p.nbytes for p in weights.values()))
        return pack(self, shell, part)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__init__", remembering)
        patch.setattr(kind, "pack", counted)
        yield sizes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_one_part_alone_are_in_memory(
    layout: str, solved_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, folder, _ = solved_run("llama", CHOICE)
    layers: dict[str, int] = {}
    for name, tensor in load_folder(folder).items():
        part = ".".join(name.split(".")[:3]) if ".layers." in name else name
        layers[part] = layers.get(part, 0) + tensor.float().nbytes
    with packing(monkeypatch, layout) as sizes:
        export_run(directory, str(tmp_path / "out"), layout=layout)
    assert len(sizes) == 6  # embedding, two layers, norm, rotary embedding, head
    assert sorted(sizes) == sorted([*layers.values(), 0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_folder_is_that_of_modelopts_own_exporter(
    family: str, solved_run: Any, tmp_path: Path
) -> None:
    choice = {"*": "wint8_afp16", "*down_proj": "wint8_aint8", "lm_head": "none"}
    directory, folder, maxima = solved_run(family, choice)
    export_run(directory, str(tmp_path / "ours"), layout="modelopt")
    model: Any = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    config = load_quantization_config(str(Path(directory.path(""))))
    model = mtq.quantize(model, config | {"algorithm": "max"})
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.input_quantizer.amax = torch.tensor(maxima[name])
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "theirs")
    ours, theirs = load_folder(tmp_path / "ours"), load_folder(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        is_rounded = tensor.dtype == torch.float32 and not name.endswith("_scale")
        assert torch.equal(ours[name], tensor.bfloat16() if is_rounded else tensor), name
    quantized = [
        json.loads((tmp_path / who / "hf_quant_config.json").read_text())
        for who in ("ours", "theirs")
    ]
    assert quantized[0] == quantized[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shards_hold_what_one_file_does(
    family: str, layout: str, solved_run: Any, tmp_path: Path
) -> None:
    directory, _, _ = solved_run(family, CHOICE)
    export_run(directory, str(tmp_path / "one"), layout=layout)
    written = export_run(directory, str(tmp_path / "many"), layout=layout, max_shard_size="40KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == written.bytes_on_disk
    for file in files:
        tensors = load_file(file)
        assert {n for n, name in index["weight_map"].items() if name == file.name} == set(tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 40_000
    single, together = load_folder(tmp_path / "one"), load_folder(tmp_path / "many")
    assert single.keys() == together.keys()
    assert all(torch.equal(single[name], tensor) for name, tensor in together.items())
    for name in ("config.json", "tokenizer.json"):
        assert contents(tmp_path / "one")[name] == contents(tmp_path / "many")[name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_in_shards_gives_the_same_files(
    layout: str, solved_run: Any, model_folder: Any, tmp_path: Path
) -> None:
    whole = model_folder("llama")
    parts = in_shards(whole, tmp_path / "parts", 3)
    written = []
    for number, folder in enumerate((whole, parts)):
        directory, _, _ = solved_run("llama", CHOICE, folder=folder, name=f"run{number}")
        out = tmp_path / f"out{number}"
        export_run(directory, str(out), layout=layout)
        written.append(contents(out))
    assert written[0] == written[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_export_goes_on_from_its_parts(
    layout: str,
    solved_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config("llama")
    config.num_hidden_layers = 12
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    directory, _, _ = solved_run("llama", CHOICE, folder=tmp_path / "model")
    export_run(directory, str(tmp_path / "undisturbed"), layout=layout)
    out = tmp_path / "out"
    arguments = ["export", directory.path(""), "--out", str(out), "--format", layout]
    with WarmProcess(arguments, os.environ, ray_is_warm=False) as process:
        while not list(tmp_path.glob(".out.parts-*/part-00002.safetensors")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            assert process.returncode is None, process.communicate()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    (shards,) = tmp_path.glob(".out.parts-*")
    num_done = len(list(shards.glob("*.safetensors")))
    with packing(monkeypatch, layout) as sizes:
        export_run(directory, str(out), layout=layout)
    assert len(sizes) == 16 - num_done
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".out*"))


def test_export_with_other_arguments_does_not_go_on(
    solved_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _, _ = solved_run("llama", CHOICE)
    out = tmp_path / "out"
    write = PartFiles.write

    def interrupted(self: Any, name: str, *rest: Any) -> None:
        if name == "part-00002":
            raise KeyboardInterrupt
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_run(directory, str(out), layout="modelopt")
    with packing(monkeypatch, "compressed-tensors") as sizes:
        export_run(directory, str(out), layout="compressed-tensors")
    assert len(sizes) == 6
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_second_export_of_the_same_at_a_time_is_refused(tmp_path: Path) -> None:
    with parts_beside(tmp_path / "out", "0123"):
        second = parts_beside(tmp_path / "out", "0123")
        with pytest.raises(ConfigError, match="by another process; wait for it"):
            second.__enter__()
        with parts_beside(tmp_path / "out", "4567"):
            assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_export_that_fails_leaves_no_parts(
    solved_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _, _ = solved_run("llama", CHOICE)

    def fails(*_: Any, **__: Any) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(checkpoint, "check_checkpoint", fails)
    with pytest.raises(CheckpointError):
        export_run(directory, str(tmp_path / "out"), layout="modelopt")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("size", ["5", "0GB", "GB", "5 gigabytes", "-1GB"])
def test_size_that_is_none_is_refused(size: str, solved_run: Any, tmp_path: Path) -> None:
    directory, _, _ = solved_run("llama", CHOICE)
    with pytest.raises(ConfigError, match="give one such as 5GB"):
        export_run(directory, str(tmp_path / "out"), max_shard_size=size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "formats",
    [
        ("int4_g32", "wint8_aint8", "wfp8_afp8"),
        ("NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        ("int4_g32_mse", "fp8_mse", "int8_mse"),
    ],
)
def test_slices_of_a_weight_give_the_same_files(
    formats: tuple[str, ...],
    layout: str,
    solved_run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, third = formats
    choice = {"*": "none", "*self_attn.*": first, "*mlp.*": second, "lm_head": third}
    directory, _, _ = solved_run("llama", choice, formats)
    export_run(directory, str(tmp_path / "whole"), layout=layout)
    monkeypatch.setattr(modelopt_export, "MOST_ELEMENTS", 24 * 64)  # no row number divides by 24
    counts: list[int] = []
    join = modelopt_export.joined_slices

    def counted(parts: Any) -> Any:
        counts.append(len(parts))
        return join(parts)

    for module in (modelopt_export, compressed_tensors):
        monkeypatch.setattr(module, "joined_slices", counted)
    export_run(directory, str(tmp_path / "slices"), layout=layout)
    assert min(counts) > 1
    assert contents(tmp_path / "whole") == contents(tmp_path / "slices")
