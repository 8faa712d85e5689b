"""A family's plan in FP8 and 16 bits as a checkpoint: written as ``export`` does, then read back.

The reader is transformers: the packed layers are multiplied with their scales by the layout's
rules alone and loaded under the names that stand in the files, so that a layer under a name that
the model's own files do not know is found missing.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_folder, unpack_modelopt
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D
from written_runs import made_up_config, made_up_run

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.calibrate.files import maxima_rows
from autoquant_ray.errors import AutoQuantError
from autoquant_ray.export.checkpoint import export_run
from autoquant_ray.formats.format import NONE
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model, fingerprint_model
from autoquant_ray.models.quantizable import with_plain_linears
from autoquant_ray.plan.plan import Plan, build_plan
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.quantizers import fake_quantize_weight
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.serving.shared_scales import fused_layers
from autoquant_ray.solve import solve_run

FORMAT = "wfp8_afp8"
_LARGEST = 448
_PARTS = ("weight_scale", "input_scale")


def require_export(
    folder: Path, model: Any, calibration: Calibration, *, sixteen_bits: str = ""
) -> None:
    """Export a model in FP8 and 16 bits, and compare what is read with what was planned.

    Args:
        folder: The model's own.
        model: As it is there, in float32.
        calibration: Of the inputs.
        sixteen_bits: Pattern of groups that stay in 16 bits.

    Raises:
        AutoQuantError: The export is refused, and left nothing behind.
        AssertionError: It holds something else than was planned.
    """
    plan = build_plan(with_linears(model), resolve_formats((FORMAT,), device="cpu"))
    quantized = [name for name in _mixed(plan) if not fnmatch.fnmatch(name, sixteen_bits)]
    with tempfile.TemporaryDirectory() as place:
        directory = _solved_run(folder, Path(place) / "run", plan, quantized, calibration)
        out = Path(place) / "out"
        try:
            export_run(directory, str(out))
        except AutoQuantError:
            assert [path.name for path in Path(place).iterdir()] == ["run"], "something is left"
            raise
        tensors = load_folder(out)
        loaded = _loaded(tensors, out, type(model))
    expected = _fake_quantized(model, plan, quantized)
    assert loaded.keys() == expected.keys()
    exact = model.state_dict()
    for name, tensor in loaded.items():
        if tensor.dim() < 2 and torch.equal(tensor, exact[name]):  # what a router adds may be so
            continue
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-6, atol=1e-7, msg=f"{name} holds other values"
        )
    modules = [m for group in plan.searched if group.name in quantized for m in group.modules]
    planned = {
        value / _LARGEST
        for module in modules
        for value in calibration.of(module.name).maxima.values()
    }
    stored = {t.item() for name, t in tensors.items() if name.endswith(".input_scale")}
    assert sorted(stored) == pytest.approx(sorted(planned), rel=1e-6), "other scales of inputs"


def with_linears(model: Any) -> Any:
    """The model as it is loaded: a copy where it has a ``Conv1D``, which becomes a linear."""
    if any(isinstance(module, Conv1D) for module in model.modules()):
        model = copy.deepcopy(model)
        with_plain_linears(model)
    return model


def _mixed(plan: Plan) -> list[str]:
    """Groups in FP8: every other one of its kind, so that every kind is there."""
    kinds: dict[str, list[str]] = {}
    for group in plan.searched:
        kinds.setdefault(group.name.rpartition(".")[2], []).append(group.name)
    chosen = {name for i, names in enumerate(kinds.values()) for name in names[i % 2 :: 2] or names}
    if len(chosen) == len(plan.searched):
        chosen.remove(plan.searched[-1].name)
    return [group.name for group in plan.searched if group.name in chosen]


def _solved_run(
    folder: Path, out: Path, plan: Plan, quantized: list[str], calibration: Calibration
) -> RunDirectory:
    config = made_up_config(folder, out, (FORMAT,))
    fingerprint = fingerprint_model(find_model(str(folder)))
    directory = made_up_run(config, plan, folder.name, fingerprint)
    directory.write_table("calibration.parquet", maxima_rows(calibration))
    pins = {group.name: FORMAT if group.name in quantized else NONE for group in plan.searched}
    solve_run(directory, SolveOptions(bytes=2**40, pins=pins), folder="")
    return directory


def _fake_quantized(model: Any, plan: Plan, quantized: list[str]) -> dict[str, torch.Tensor]:
    """The planned weights by their names in memory; what is not quantized is in bfloat16."""
    weights = {
        name: tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    (format_,) = plan.formats
    fused = fused_layers(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    for group in plan.searched:
        for module in group.modules if group.name in quantized else ():
            for parameter in module.parameters:
                name = f"{module.name}.{parameter}"
                exact = model.get_parameter(name)
                slices = [exact] if exact.dim() == 2 or module.is_transposed else list(exact)
                layers = fused.get(module.name, ())
                largest = [model.get_submodule(layer).weight.abs().max() for layer in layers]
                common = max(largest) if largest else None
                fake = [
                    fake_quantize_weight(format_.weight, slice_, largest=common)
                    for slice_ in slices
                ]
                weights[name] = torch.stack(fake).reshape(exact.shape)
    return weights


def _loaded(tensors: dict[str, torch.Tensor], out: Path, kind: Any) -> dict[str, torch.Tensor]:
    """What transformers makes of a folder's tensors once they are unpacked, in float32."""
    packed = [name for name in tensors if tensors[name].dtype == torch.float8_e4m3fn]
    plain = {n: t.float() for n, t in tensors.items() if n.rpartition(".")[2] not in _PARTS}
    for name in packed:
        plain[name] = unpack_modelopt(tensors, name.removesuffix(".weight"), "FP8")
    unpacked = out.with_name("unpacked")
    unpacked.mkdir()
    save_file(plain, unpacked / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (unpacked / "config.json").write_text(json.dumps(config))
    model, problems = kind.from_pretrained(unpacked, dtype="float32", output_loading_info=True)
    faults = {key: sorted(names) for key, names in problems.items() if names}
    assert not faults, f"transformers does not find its weights: {faults}"
    state: dict[str, torch.Tensor] = model.state_dict()
    return state
