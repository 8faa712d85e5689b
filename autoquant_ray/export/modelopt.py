"""A quantized model -> a folder in ModelOpt's layout, packed by ModelOpt's own exporter.

Weights are calibrated as in the scan; the input maxima and mean squares are the scan's. The
exporter is given the model part by part, each as a model of its own that is not whole: it packs a
layer from that layer alone. The config names all layers, so it is made at the end, by the exporter
too.

Every tensor comes in the type that the model computes in. Where that is float32, what is not
quantized is rounded to 16 bits here, and so are the scales of blocks: the manifest counts both as
16 bits, and so do the kernels that read them.

The exporter (ModelOpt 0.47) is always given the type: without it, it fails on a ``config.json``
that states one ("Invalid device string: 'bfloat16'"). It takes a format's name from the weights and
drops the inputs' part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from autoquant_ray.calibrate.modelopt_config import load_quantization_config
from autoquant_ray.errors import FormatError, one_line
from autoquant_ray.export.carried import SixteenBits, add_ignored
from autoquant_ray.export.check import unlisted
from autoquant_ray.export.kv_caches import SCALES, cache_algos, check_caches, set_cache_maxima
from autoquant_ray.export.layouts import MODELOPT, NO_ZERO, block_size
from autoquant_ray.export.model import largest_input
from autoquant_ray.export.names import naming
from autoquant_ray.export.parts import Part, outline, parted
from autoquant_ray.export.source import Layers, Source, needs_whole
from autoquant_ray.formats.algorithms import algorithm_of_part, without_fits
from autoquant_ray.formats.format import NONE
from autoquant_ray.modelopt_api import (
    calibrate,
    needs_static_maximum,
    plain_attentions,
    prepare_quantizers,
)
from autoquant_ray.modelopt_export import (
    as_stored_tensors,
    pack_model,
    row_slices,
    without_name_marks,
    write_export_config,
)
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.fitted_model import FittedModel, QuantizedModule
from autoquant_ray.serving.fused_names import EXPERTS, engine_modules

_CONFIGS = ("hf_quant_config.json", "config.json")

_MOST_OF_ERROR = 200  # characters


class ModelOptPacker:
    """Packs a model part by part.

    Args:
        model: The loaded model, its weights in memory or on the meta device; it is changed.
        source: Which formats.
        stored: The same by the names in the files.
        calibration: From the scan.
        sixteen_bits: Rounds what is not quantized, and the scales of blocks.

    Raises:
        FormatError: ModelOpt cannot prepare the model.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        stored: Source,
        calibration: Calibration,
        sixteen_bits: SixteenBits,
    ) -> None:
        self._outline, self._source, self._stored = outline(model), source, stored
        self._calibration, self._sixteen_bits = calibration, sixteen_bits
        self._dtype = next(model.parameters()).dtype
        config = without_fits(load_quantization_config(source.manifest))
        self._algorithm = config["algorithm"]
        has_caches = any(name != NONE for name in source.caches.values())
        with _stops_named("mtq.quantize"), nullcontext() if has_caches else plain_attentions():
            prepare_quantizers(model, config["quant_cfg"])

    def pack(self, shell: Any, part: Part) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Pack a part whose weights are in memory.

        Args:
            shell: A model that holds it alone; its weights are changed.
            part: Which.

        Returns:
            Its tensors by the names in the files, and its share of the checkpoint's config.

        Raises:
            FormatError: ModelOpt would not write the names of the model's own files, or stops, or a
                module has no calibrated maximum.
        """
        source = self._source.within(part.holds)
        modules = {
            name: QuantizedModule.of(name, source.modules[name], format_)
            for name, format_ in source.formats.items()
        }
        with _stops_named("mtq.quantize"):
            calibrate(shell, algorithm_of_part(self._algorithm, part.holds), None)
        fitted = FittedModel(shell, modules, self._calibration)
        fitted.set_weights()
        _set_input_maxima(shell, source, self._calibration)
        set_cache_maxima(shell, source.caches, self._calibration)
        _quantize_weights(shell, source)
        fitted.divide()  # rounded numbers stay, scales change
        with _stops_named("exporter"):
            tensors, config = pack_model(shell, dtype=self._dtype, fuses=needs_whole(self._source))
        with naming():
            tensors = as_stored_tensors(self._outline, tensors)
        rounded = {
            name: self._sixteen_bits.rounded(name, tensor)
            if _is_rounded(name, self._stored)
            else tensor
            for name, tensor in tensors.items()
        }
        return rounded, config

    def finish(self, folder: Path, parts: Sequence[Mapping[str, Any]], engine: str | None) -> None:
        """Describe the packed weights in a folder that holds them and the model's config.

        Args:
            folder: Of the checkpoint.
            parts: What :meth:`pack` gave of each part's config, in their order.
            engine: That will read it; None: any.
        """
        write_export_config(self._outline, parts, folder, cache_algos(self._source.caches))
        _correct_configs(folder)
        check_caches(folder, self._source.caches, self._calibration)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        add_ignored(unlisted(config, self._stored), folder, MODELOPT)
        if engine == "sglang":
            name_fused_layers(folder, self._stored)
            if "quantized_layers" not in config:  # MXFP8's reader takes names alone, no patterns
                kept = [name for name in self._stored.modules if name not in self._stored.formats]
                add_ignored(kept, folder, MODELOPT)


def require_preparable(model: Any, layers: Layers) -> None:
    """Check that ModelOpt prepares a model for packing, and leaves what is in its files.

    Args:
        model: A skeleton; it is changed.
        layers: Those that may be quantized.

    Raises:
        FormatError: It stops, or makes other weights, or would leave experts fused.
    """
    plain, before = outline(model), {name for name, _ in model.named_parameters()}
    with _stops_named("mtq.quantize"), plain_attentions(), redirect_stdout(StringIO()):
        prepare_quantizers(model, [{"quantizer_name": "*", "enable": False}])
    after = dict(model.named_parameters())
    new = [name for name in after if name not in before]
    if new:
        raise parted(new[0])
    packed = {name for name in layers.modules if layers.is_experts(name)}
    rest = {name: p for name, p in after.items() if name.rpartition(".")[0] not in packed}
    with naming():
        as_stored_tensors(plain, rest)


@contextmanager
def _stops_named(what: str) -> Iterator[None]:
    """Inside, what stops a part of ModelOpt on a model is an error of this package.

    Raises:
        FormatError: It stopped.
    """
    try:
        yield
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise FormatError(
            f"`format` {MODELOPT} cannot hold this model: ModelOpt's {what} stops "
            f"({one_line(error, _MOST_OF_ERROR)})"
        ) from error


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
            maximum = largest_input(calibration, name, f"{prefix}input_amax")
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
                for of_rows, rows in row_slices(quantizer, weight):
                    rows.copy_(of_rows(rows))


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
