"""A model -> a folder in the compressed-tensors layout, packed by that package's own compressors.

Scales are those of ModelOpt's quantizers, as in the scan. Every layer is named in full in the one
group that its format makes, and every other linear is in ``ignore``: readers resolve patterns and
class names in different orders. Groups are sorted by their keys when the file is read and written,
so these are padded with zeros.

Shape letters: O out features, I in features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from autoquant_ray.export.layouts import (
    COMPRESSED_TENSORS,
    SIXTEEN_BITS,
    block_size,
    grids,
    stored_as,
)
from autoquant_ray.export.model import SixteenBits, distinct_tensors
from autoquant_ray.export.source import Source
from autoquant_ray.formats.format import Format
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.fitted_model import Factors
from autoquant_ray.quantize.quantizers import make_quantizer, quantizer_of, rounded_weight
from autoquant_ray.quantize.weight_search import WeightScales

_STRATEGIES = {"tensor": "tensor", "channel": "channel", "block": "group", "token": "token"}
_NUMBERS = {"fp8": ("float", 8), "int8": ("int", 8), "int4": ("int", 4)}


def write_compressed(
    model: Any, source: Source, calibration: Calibration, folder: Path, sixteen_bits: SixteenBits
) -> None:
    """Write the model's config and its packed weights.

    Args:
        model: The loaded model; it is changed.
        source: Which formats.
        calibration: From the scan.
        folder: An empty folder.
        sixteen_bits: Rounds what is not quantized; its type is that of the scales of blocks.
    """
    schemes = _schemes(source)
    targets = [module for scheme in schemes.values() for module in scheme.targets]
    packed: dict[str, torch.Tensor] = {}
    scales = WeightScales(model, calibration)
    factors = Factors(model, source.formats, scales)
    for name, format_ in source.formats.items():
        scales.largest((name,), format_)  # while all weights are there
    for scheme in schemes.values():
        for name in scheme.targets:
            format_, module = source.formats[name], model.get_submodule(name)
            maxima = calibration.of(name).maxima
            weight, divisor_O = factors.multiplied(name, module.weight), factors.divisor(name)
            quantizer = quantizer_of(format_, weight, scales, name)
            weight = rounded_weight(format_, quantizer, weight, scales, name)
            parts = _pack(weight, quantizer, format_, scheme, maxima)
            if divisor_O is not None:  # the integers stay
                parts["weight_scale"] /= divisor_O[:, None]
            if block_size(format_) > 0:
                parts["weight_scale"] = parts["weight_scale"].to(sixteen_bits.dtype)
            packed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            module.weight = None  # the packed one takes its place
    factors.divide(source.formats)
    rest = {name: sixteen_bits.rounded(name, tensor) for name, tensor in distinct_tensors(model)}
    model.save_pretrained(folder, state_dict=rest | packed)
    linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = QuantizationConfig(
        config_groups=schemes,
        format=_common_format(schemes),
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name in linears if name not in set(targets)],
    )
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] = config.model_dump(mode="json") | {"version": __version__}
    file.write_text(json.dumps(content, indent=2) + "\n")


def _schemes(source: Source) -> dict[str, QuantizationScheme]:
    """One group per distinct format, in the order of the model."""
    members: dict[tuple[str, str, int], list[str]] = {}
    for module, format_ in source.formats.items():
        members.setdefault((*grids(format_), block_size(format_)), []).append(module)
    width = len(str(len(members)))
    return {
        f"group_{number:0{width}d}": QuantizationScheme(
            targets=modules,
            weights=_arguments(weight, block),
            input_activations=None if input_ == SIXTEEN_BITS else _arguments(input_),
            format=stored_as(source.formats[modules[0]], COMPRESSED_TENSORS),
        )
        for number, ((weight, input_, block), modules) in enumerate(members.items())
    }


def _arguments(grid: str, block: int = 0) -> dict[str, Any]:
    number, shared_by = grid.split()
    type_, num_bits = _NUMBERS[number]
    return {
        "type": type_,
        "num_bits": num_bits,
        "strategy": _STRATEGIES[shared_by],
        "group_size": block or None,
        "symmetric": True,
        "dynamic": shared_by == "token",
    }


def _common_format(schemes: dict[str, QuantizationScheme]) -> str:
    formats = {str(scheme.format) for scheme in schemes.values()}
    return formats.pop() if len(formats) == 1 else "mixed-precision"


@torch.no_grad()
def _pack(
    weight_OI: torch.Tensor,
    quantizer: Any,
    format_: Format,
    scheme: QuantizationScheme,
    maxima: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """The tensors of one packed layer, without its name."""
    scale = quantizer.amax.float() / quantizer.maxbound
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # all zeros: any scale will do
    if block_size(format_) > 0:
        scale = scale.reshape(len(weight_OI), -1)
    elif scale.numel() == 1:
        scale = scale.reshape(1)
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    # Quantized before, so that a tie is not rounded the other way than in the scan.
    weight_OI = quantizer(weight_OI)
    packed = compressor.compress({"weight": weight_OI.float(), "weight_scale": scale}, scheme)
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        largest = make_quantizer(format_.input or {}, weight_OI.device).maxbound
        # All zeros: any scale will do, but 0; this is ModelOpt's.
        packed["input_scale"] = torch.tensor([(maxima["input_amax"] or largest) / largest])
    return {name: tensor.contiguous() for name, tensor in packed.items()}
