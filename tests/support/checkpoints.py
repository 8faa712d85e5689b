"""Checkpoints in tests: runs that can be exported, and packed layers read by the layouts' rules.

The unpacking here is written from the layouts alone and shares nothing with the exporters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from autoquant_ray.calibrate.files import channel_rows, maxima_rows, read_calibration, rounding_rows
from autoquant_ray.calibrate.maxima import ActivationMaxima
from autoquant_ray.calibrate.portions import collector_of
from autoquant_ray.calibrate.scale_search import ScaleSearch
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.export.source import read_source
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.formats.smoothed import is_fitted, needs_channels, needs_search
from autoquant_ray.modelopt_api import prepare_experts
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import load_model
from autoquant_ray.plan.fold import folds_of_summary
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import scored_modules
from autoquant_ray.quantize.awq import loss_rows
from autoquant_ray.quantize.calibration import NUM_HALVES
from autoquant_ray.quantize.modules import UNQUANTIZED, QuantizedLayers
from autoquant_ray.quantize.quantizers import fake_quantize_weight
from autoquant_ray.quantize.weight_cache import WeightCache
from autoquant_ray.score.fitting import LayerFitting
from autoquant_ray.score.residence import Resident

FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = (2, 1), (4, 3)
CUSTOM = {
    "int4_g32": {
        "weight": {"num_bits": 4, "block_sizes": {"-1": 32, "type": "static"}},
        "input": None,
    },
    "int4_g32_mse": {
        "weight": {"num_bits": 4, "block_sizes": {"-1": 32, "type": "static"}},
        "input": None,
        "algorithm": {"method": "mse"},
    },
    "int4_g32_weighted": {
        "weight": {"num_bits": 4, "block_sizes": {"-1": 32, "type": "static"}},
        "input": None,
        "algorithm": {"method": "weighted"},
    },
    "int4_g32_gptq": {
        "weight": {"num_bits": 4, "block_sizes": {"-1": 32, "type": "static"}},
        "input": None,
        "algorithm": {"method": "gptq"},
    },
    "int8_per_token": {
        "weight": {"num_bits": 8, "axis": 0},
        "input": {"num_bits": 8, "type": "dynamic", "block_sizes": {"-1": None}},
    },
    "int8_mse": {
        "weight": {"num_bits": 8, "axis": 0},
        "input": {"num_bits": 8, "axis": None},
        "algorithm": {"method": "mse", "start_multiplier": 0.6, "stop_multiplier": 1.2},
    },
    "fp8_mse": {
        "weight": {"num_bits": [4, 3], "axis": None},
        "input": {"num_bits": [4, 3], "axis": None},
        "algorithm": {"method": "mse"},
    },
}
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FORMATS = ("int4_g32", "wfp8_afp8", "wint8_aint8", "wint8_afp16", "wfp8_afp16")


def calibrated(directory: Any, folder: Path, formats: tuple[str, ...] = FORMATS) -> Any:
    """Write the ``calibration.parquet`` of a run of a small model; returns its maxima by module."""
    model = load_model(find_model(str(folder)), dtype="float32", device="cpu")
    prepare_experts(model)
    plan = build_plan(model, resolve_formats(formats, device="cpu", custom=CUSTOM))
    collector = ActivationMaxima(model, scored_modules(plan), plan.formats)
    generator = torch.Generator().manual_seed(7)
    with collector.collecting(), torch.no_grad():
        collector.set_mask(None)
        ids = torch.randint(0, 256, (2, 48), generator=generator)
        model(ids)
    calibration = collector.calibration()
    rows = maxima_rows(calibration)
    directory.write_table("calibration.parquet", rows)
    if any(map(needs_channels, plan.formats)):
        directory.write_table("channels.parquet", channel_rows(calibration))
    if any(map(needs_search, plan.formats)):
        search = ScaleSearch(model, [], scored_modules(plan), plan.formats)
        with search.searching(replace(calibration, folds=plan.folds)), torch.no_grad():
            search.set_mask(None)
            model(ids)
            search.settle()
        directory.write_table("search.parquet", loss_rows(search.losses()))
    if any(map(is_fitted, plan.formats)):
        fitting = LayerFitting(model, Resident(), [], scored_modules(plan), plan.formats)
        halves = [torch.randint(0, 256, (4, 64), generator=generator) for _ in range(NUM_HALVES)]

        def collect(block: Any) -> Any:
            moments = collector_of(block)
            with moments.collecting():
                for half, ids in enumerate(halves):
                    moments.begin(half)
                    model(ids)
            return moments

        merged = read_calibration(directory, plan.formats, plan.folds)
        rounding = fitting.fit([0], merged, collect)[0].rounding
        directory.write_table("rounding.parquet", rounding_rows(rounding, plan.formats))
    return {row["module"]: row["value"] for row in rows}


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What all engines compute as one, in the small models that are exported."""


def largest_of_fused(tensors: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    """Largest absolute weight of a linear and of those that engines fuse with it."""
    parent, _, part = module.rpartition(".")
    parts = next((parts for parts in FUSED if part in parts), (part,))
    names = [f"{parent}.{part}.weight" if parent else f"{part}.weight" for part in parts]
    return torch.stack([tensors[name].abs().max() for name in names]).max()


def fake_weight(folder: Path, module: str, format_: Any) -> torch.Tensor:
    """A weight as the scan quantizes it, by its maxima."""
    tensors = load_folder(folder)
    largest = None
    scale_bits = (format_.weight.get("block_sizes") or {}).get("scale_bits")
    if format_.weight == FP8 or (format_.weight["num_bits"], scale_bits) == NVFP4:
        largest = largest_of_fused(tensors, module)
    weight = tensors[f"{module}.weight"]
    return fake_quantize_weight(format_.weight, weight, format_.algorithm, largest=largest)


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def unpacked_by_the_library(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of all packed linears, by the package's own readers of config and of tensors."""
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors, weights = load_folder(folder), {}
    for scheme in QuantizationConfig.model_validate(content).config_groups.values():
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
        for name in scheme.targets:
            start = f"{name}."
            packed = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            if packed["weight_scale"].dtype == torch.bfloat16:  # products would be rounded to it
                packed["weight_scale"] = packed["weight_scale"].float()
            weights[name] = compressor.decompress(packed, scheme)["weight"]
    return weights


def unpack_modelopt(tensors: Mapping[str, torch.Tensor], module: str, algo: str) -> torch.Tensor:
    """A layer's weight from ModelOpt's layout, in float32."""
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"].float()
    if algo == "FP8":
        assert weight.dtype == torch.float8_e4m3fn
        return weight.float() * scale
    if algo in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        assert weight.dtype == torch.int8
        return weight.float() * scale.reshape(-1, 1)
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        assert weight.dtype == torch.float8_e4m3fn
        return weight.float() * scale.reshape(-1, 1)
    if algo == "MXFP8":  # a byte of exponent per block of 32
        return weight.float() * (2.0 ** (scale - 127)).repeat_interleave(32, dim=1)
    if algo in ("NVFP4", "W4A16_NVFP4"):  # each byte: two numbers of one row
        scale = scale * tensors[f"{module}.weight_scale_2"]
        codes = torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1).long()
        numbers = _E2M1[codes & 7] * torch.where(codes > 7, -1, 1)
        return numbers * scale.repeat_interleave(16, dim=1)
    assert algo == "W4A16_AWQ"
    assert weight.dtype == torch.uint8
    pairs = weight.to(torch.int16)  # each byte: two rows of one column, the first in the low half
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=1).reshape(-1, weight.shape[1])
    numbers = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    return numbers * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], dim=1)


def logits_of_solution(directory: Any, solution: str, ids_BS: torch.Tensor) -> torch.Tensor:
    """Logits of the run's model under a solution, as ``evaluate`` quantizes it."""
    source = read_source(directory, solution)
    scan = ScanConfig.model_validate(source.state.record.config)
    model = load_model(find_model(scan.model), dtype="float32", device="cpu")
    prepare_experts(model)
    menu = resolve_formats(scan.formats, device="cpu", custom=scan.custom_formats)
    modules = scored_modules(build_plan(model, menu, scan.disable))
    index = {format_.name: number for number, format_ in enumerate(menu)}
    groups = {scored.group: scored.planned.name for scored in modules}
    choice = tuple(
        index[source.formats[groups[g]].name] if groups[g] in source.formats else UNQUANTIZED
        for g in sorted(groups)
    )
    folds = folds_of_summary(source.state.plan)
    calibration = read_calibration(directory, menu, folds)
    quantized = QuantizedLayers(model, [], modules, menu, calibration)
    with quantized.quantized(0, choice, WeightCache(2**40)), torch.no_grad():
        logits: torch.Tensor = model(ids_BS).logits
    return logits
