"""A quantized model -> a folder in ModelOpt's layout, written by ModelOpt's own exporter.

Weights are calibrated as in the scan; the input maxima and mean squares are the scan's. The
exporter writes every tensor in the type that the model computes in. Where that is float32, what is
not quantized is rounded to 16 bits here afterwards, and so are the scales of blocks: the manifest
counts both as 16 bits, and so do the kernels that read them.

``export_hf_checkpoint`` (ModelOpt 0.47) is always given the type: without it, it fails on a
``config.json`` that states one ("Invalid device string: 'bfloat16'"). It takes a format's name from
the weights and drops the inputs' part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.errors import FormatError, one_line
from autoquant_ray.export.kv_caches import SCALES, check_caches, set_cache_maxima
from autoquant_ray.export.layouts import MODELOPT, NO_ZERO, block_size
from autoquant_ray.export.model import SixteenBits
from autoquant_ray.export.names import names_required
from autoquant_ray.export.source import Source
from autoquant_ray.formats.algorithms import without_fits
from autoquant_ray.formats.numbers import has_tensor_scale
from autoquant_ray.modelopt_api import (
    export_checkpoint,
    mtq,
    needs_static_maximum,
    unfused_export,
    without_name_marks,
)
from autoquant_ray.models.stored_tensors import INDEX
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.fitted_model import FittedModel, QuantizedModule
from autoquant_ray.serving.fused_names import EXPERTS, engine_modules

_CONFIGS = ("hf_quant_config.json", "config.json")

_MOST_OF_ERROR = 200  # characters


def write_modelopt(model: Any, source: Source, calibration: Calibration, folder: Path) -> None:
    """Write the model's config and its packed weights, all in the type that the model has.

    Args:
        model: The loaded model; it is changed.
        source: Which formats.
        calibration: From the scan.
        folder: An empty folder.

    Raises:
        FormatError: ModelOpt would not write the names of the model's own files, or stops, or a
            module has no calibrated maximum.
    """
    modules = {
        name: QuantizedModule.of(name, source.modules[name], format_)
        for name, format_ in source.formats.items()
    }
    with _stops_named("mtq.quantize"):  # it cannot prepare every attention (Bloom's)
        mtq.quantize(model, without_fits(load_quantization_config(source.manifest)))
    fitted = FittedModel(model, modules, calibration)
    fitted.set_weights()
    _set_input_maxima(model, source, calibration)
    set_cache_maxima(model, source.caches, calibration)
    _quantize_weights(model, source)
    fitted.divide()  # rounded numbers stay, scales change
    # The type is given because the one that ModelOpt reads from a config.json is text, which its
    # packing of 4-bit integers takes for a device.
    with _stops_named("exporter"), names_required(), _scales_kept(source):
        export_checkpoint(model, dtype=next(model.parameters()).dtype, folder=folder)
    _correct_configs(folder)
    check_caches(folder, source.caches, calibration)


@contextmanager
def _stops_named(what: str) -> Iterator[None]:
    """Inside, what stops a part of ModelOpt on a model is an error of this package.

    Raises:
        FormatError: It stopped.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(
            f"`format` {MODELOPT} cannot hold this model: ModelOpt's {what} stops "
            f"({one_line(error, _MOST_OF_ERROR)})"
        ) from error


@contextmanager
def _scales_kept(source: Source) -> Iterator[None]:
    """Inside, ModelOpt's exporter gives no weights a scale in common, which they have already.

    It finds the linears that read one input, which are more than those that engines fuse, and sets
    their scales to the largest. In runs of earlier versions weights have scales of their own.
    """
    with_tensor_scale = [f for f in source.formats.values() if has_tensor_scale(f.weight)]
    are_shared = all(format_.shares_scale for format_ in with_tensor_scale)
    with unfused_export() if are_shared else nullcontext():
        yield


def round_to_16_bits(folder: Path, source: Source, sixteen_bits: SixteenBits) -> None:
    """Rewrite the weight files, one at a time.

    Args:
        folder: Holds them.
        source: Which formats, by the names in the files.
        sixteen_bits: Rounds what is not quantized, and the scales of blocks.
    """
    from safetensors.torch import load_file, save_file

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        rounded = {
            name: sixteen_bits.rounded(name, tensor) if _is_rounded(name, source) else tensor
            for name, tensor in tensors.items()
        }
        total += sum(tensor.nbytes for tensor in rounded.values())
        save_file(rounded, file, metadata={"format": "pt"})
    index = folder / INDEX
    if index.exists():
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = total
        index.write_text(json.dumps(content, indent=2))


def name_fused_layers(folder: Path, source: Source) -> None:
    """List fused layers by SGLang's names too, beside their parts.

    SGLang finds a fused layer by its parts only where the model's class states which these are, and
    many do not; by its own name it finds it everywhere.

    Args:
        folder: Holds the configs.
        source: Which formats, by the names in the files.
    """
    fused = [m for m in engine_modules(source.modules, "sglang") if m.name != EXPERTS]
    for name in _CONFIGS:
        content = json.loads((folder / name).read_text())
        layers = content.get("quantization", content.get("quantization_config", {})).get(
            "quantized_layers", {}
        )
        for module in fused:
            if len(module.members) > 1 and module.members[0] in layers:
                layers[module.path] = layers[module.members[0]]
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _set_input_maxima(model: Any, source: Source, calibration: Calibration) -> None:
    for name in source.formats:
        module = model.get_submodule(name)
        for prefix in source.modules[name]["prefixes"]:
            quantizer = getattr(module, f"{prefix}input_quantizer")
            if not quantizer.is_enabled or not needs_static_maximum(quantizer):
                continue
            maximum = calibration.of(name).maxima.get(f"{prefix}input_amax")
            if maximum is None:
                raise FormatError(
                    f"{name} saw no input in the scan's calibration, so its input has no scale; "
                    "scan with more samples, or pin its group to a format with inputs in 16 bits"
                )
            quantizer.amax = torch.tensor(maximum)


@torch.no_grad()
def _quantize_weights(model: Any, source: Source) -> None:
    """Put weights on their grid as the scan did, so that packing does not round a tie otherwise.

    Formats whose scales are made anew from the weights are left to the exporter, which divides by
    the largest weight.
    """
    for name in source.formats:
        for weight, quantizer in model.get_submodule(name).iter_weights_for_calibration():
            if quantizer.amax is not None and quantizer.amax.numel() == 1 and not quantizer.amax:
                quantizer.amax = torch.full_like(quantizer.amax, NO_ZERO)
            if needs_static_maximum(quantizer) and quantizer.num_bits != (2, 1):
                weight.copy_(quantizer(weight))


def _is_rounded(name: str, source: Source) -> bool:
    kind, module = name.rpartition(".")[2], source.owner(name)
    if kind in SCALES:
        return False
    if module is None or kind == "bias":
        return True
    return kind == "weight_scale" and block_size(source.formats[module]) > 0


def _correct_configs(folder: Path) -> None:
    """Say what is there: ModelOpt announces smoothing factors with every 4-bit integer format, and
    leaves marks in names."""
    for name in _CONFIGS:
        content = json.loads(without_name_marks((folder / name).read_text()))
        _set_all(content, "pre_quant_scale", False)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _set_all(content: Any, key: str, value: Any) -> None:
    """Replace a key's value wherever it is in nested mappings and lists."""
    inner = content.values() if isinstance(content, Mapping) else content
    if isinstance(content, dict) and key in content:
        content[key] = value
    if isinstance(content, dict | list):
        for item in inner:
            _set_all(item, key, value)
