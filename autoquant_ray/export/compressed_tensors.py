"""A model -> a folder in the compressed-tensors layout, packed by that package's own compressors.

Scales are those of ModelOpt's quantizers, as in the scan. Every layer is named in full in the one
group that its format makes, and every other linear is in ``ignore``: readers resolve patterns and
class names in different orders. Groups are sorted by their keys when the file is read and written,
so these are padded with zeros; that of experts is the first, because transformers unpacks all
experts by it (``findings/transformers_unpacks_experts_by_one_group.sh``). NVFP4's scale of a whole
weight is stored inverted there, as what values are multiplied with before they are rounded. Fused
experts are linears of each expert there, as in the model's own files.

Shape letters: O out features, I in features.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)

from autoquant_ray.export.carried import SixteenBits
from autoquant_ray.export.extra_heads import QuantizedHeads
from autoquant_ray.export.layouts import (
    COMPRESSED_AS,
    NO_ZERO,
    SIXTEEN_BITS,
    block_size,
    grids,
)
from autoquant_ray.export.model import as_saved, distinct_tensors, largest_input
from autoquant_ray.export.names import StoredLinear, by_stored_names, stored_linears
from autoquant_ray.export.parts import Part, outline
from autoquant_ray.export.source import Source
from autoquant_ray.formats.format import Format
from autoquant_ray.modelopt_api import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from autoquant_ray.modelopt_export import joined_slices, row_slices, some_rows
from autoquant_ray.models.dequantize import Read
from autoquant_ray.quantize.backends.block_formats import packed_static_scales
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.quantize.fitted_model import Factors
from autoquant_ray.quantize.quantizers import (
    make_quantizer,
    make_weight_quantizer,
    quantizer_of,
    rounded_weight,
)
from autoquant_ray.quantize.weight_search import WeightScales
from autoquant_ray.serving.compressed_formats import compressed_scheme
from autoquant_ray.serving.fused_names import EXPERTS, engine_modules, missing_parts
from autoquant_ray.serving.layer_formats import LayerAlgo
from autoquant_ray.serving.shared_scales import fused_layers

_PRESETS = {"NVFP4": "NVFP4", "W4A16_NVFP4": "NVFP4A16", "MXFP8": "MXFP8", "MXFP4": "MXFP4"}
"""Schemes of the package's own (``quantization/quant_scheme.py``)."""
_NVFP4_LARGEST = 6.0 * 448
_SEARCHED_BYTES = 2**26
"""Of the searches of layers that share a scale: they are in one part, and used there alone."""
_STRATEGIES = {"tensor": "tensor", "channel": "channel", "block": "group", "token": "token"}
_NUMBERS = {"fp8": ("float", 8), "int8": ("int", 8), "int4": ("int", 4)}


class CompressedPacker:
    """Packs a model part by part.

    Args:
        model: The loaded model, its weights in memory or on the meta device.
        source: Which formats.
        calibration: From the scan.
        sixteen_bits: Rounds what is not quantized; its type is that of the scales of blocks.

    Attributes:
        stored: The source by the names in the files.

    Raises:
        FormatError: Experts are quantized that the model's own files keep fused.
    """

    def __init__(
        self, model: Any, source: Source, calibration: Calibration, sixteen_bits: SixteenBits
    ) -> None:
        self._outline, self._source, self._calibration = outline(model), source, calibration
        self._sixteen_bits = sixteen_bits
        self._experts = stored_linears(model, source)
        self.stored = by_stored_names(source, self._experts)
        self._expert_linears = {linear.name: None for of in self._experts.values() for linear in of}
        self._schemes = _schemes(self.stored, self._expert_linears.keys())
        self._heads: QuantizedHeads | None = None
        self._fused_heads: Mapping[str, tuple[str, ...]] = {}
        self._largest_of_heads: dict[tuple[str, ...], torch.Tensor] = {}
        self._scales = WeightScales(model, calibration)
        self._scales.searched.resize(_SEARCHED_BYTES)
        self._linears = [
            name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        ]
        self._linears += self._expert_linears

    def pack(self, shell: Any, part: Part) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Pack a part whose weights are in memory.

        Args:
            shell: A model that holds it alone; it is changed.
            part: Which.

        Returns:
            Its tensors by the names in the files, and nothing else to remember.
        """
        formats = self._source.within(part.holds).formats
        scales, packed = self._scales, dict[str, torch.Tensor]()
        factors = Factors(shell, formats, scales)
        for name, format_ in formats.items():
            scales.largest((name,), format_)  # while all weights are there
        for name, scheme in self._packed_order(formats):
            format_, module = formats[name], shell.get_submodule(name)
            largest = self._largest_input(name, "input_amax", scheme)
            weight, divisor_O = factors.multiplied(name, module.weight), factors.divisor(name)
            quantizer = quantizer_of(format_, weight, scales, name)
            weight = rounded_weight(format_, quantizer, weight, scales, name)
            parts = _pack(weight, quantizer, format_, scheme, largest)
            if divisor_O is not None:  # the integers stay
                parts["weight_scale"] /= divisor_O[:, None]
            self._shorten_scales(parts, format_)
            packed |= {f"{name}.{kind}": tensor for kind, tensor in parts.items()}
            module.weight = None  # the packed one takes its place
        of_experts = self._pack_experts(shell, formats)
        factors.divide(formats)
        rest = {n: self._sixteen_bits.rounded(n, t) for n, t in distinct_tensors(shell)}
        return as_saved(self._outline, rest | packed) | of_experts, {}

    def add_heads(self, heads: QuantizedHeads) -> None:
        """Take extra heads among what is packed, and into ``stored``.

        Args:
            heads: Their linears.
        """
        self._heads, self.stored = heads, heads.added_to(self.stored)
        self._schemes = _schemes(self.stored, self._expert_linears.keys())
        if heads.format.has_shared_scale:
            self._fused_heads = fused_layers(heads.shapes)

    @torch.no_grad()
    def pack_head(self, module: str, read: Read) -> dict[str, torch.Tensor] | None:
        """Pack a linear of an extra head; None where it is not quantized.

        Args:
            module: By the names in the files.
            read: Gives their tensors.
        """
        if self._heads is None or module not in self._heads.shapes:
            return None
        format_, weight = self._heads.format, read(f"{module}.weight").float()
        fused = self._fused_heads.get(module, ())
        if fused and fused not in self._largest_of_heads:
            maxima = [read(f"{name}.weight").float().abs().max() for name in fused]
            self._largest_of_heads[fused] = torch.stack(maxima).max()
        largest = self._largest_of_heads.get(fused)
        quantizer = make_weight_quantizer(format_.weight, weight, largest=largest)
        first = next(iter(self._heads.shapes))
        scheme = next(scheme for scheme in self._schemes.values() if first in scheme.targets)
        parts = _pack(weight, quantizer, format_, scheme, None)
        self._shorten_scales(parts, format_)
        return {f"{module}.{kind}": tensor for kind, tensor in parts.items()}

    def _pack_experts(self, shell: Any, formats: Mapping[str, Format]) -> dict[str, torch.Tensor]:
        """Pack the experts of a part and take their weights out of it; by the names in the files.

        Every expert's parameter has a quantizer, its linears in the files have rows of it.
        """
        packed: dict[str, torch.Tensor] = {}
        schemes = {name: scheme for scheme in self._schemes.values() for name in scheme.targets}
        for module in [name for name in formats if name in self._experts]:
            format_ = formats[module]
            parameters = shell.get_submodule(module)._parameters
            linears = self._experts[module]
            for (parameter, expert), members in itertools.groupby(linears, _quantized_with):
                key = module, parameter, str(expert)
                weight = parameters[parameter][expert]
                quantizer = quantizer_of(format_, weight, self._scales, *key)
                weight = rounded_weight(format_, quantizer, weight, self._scales, *key)
                for linear in members:
                    scheme = schemes[linear.name]
                    largest = self._largest_input(module, f"{parameter}_input_amax", scheme)
                    of_rows, rows = some_rows(quantizer, weight, linear.first, linear.num_rows)
                    parts = _pack(rows, of_rows, format_, scheme, largest)
                    self._shorten_scales(parts, format_)
                    packed |= {f"{linear.name}.{kind}": tensor for kind, tensor in parts.items()}
            for parameter in {linear.parameter for linear in linears}:
                del parameters[parameter]
        return packed

    def _largest_input(
        self, module: str, statistic: str, scheme: QuantizationScheme
    ) -> float | None:
        """That of the calibration; None where inputs have no stored scale."""
        inputs = scheme.input_activations
        if inputs is None or inputs.dynamic is True:
            return None
        return largest_input(self._calibration, module, statistic)

    def _shorten_scales(self, parts: dict[str, torch.Tensor], format_: Format) -> None:
        """Those of blocks of integers have 16 bits."""
        if parts["weight_scale"].dtype == torch.float32 and block_size(format_) > 0:
            parts["weight_scale"] = parts["weight_scale"].to(self._sixteen_bits.dtype)

    def finish(self, folder: Path, parts: Sequence[Any], engine: str | None) -> None:
        """Describe the packed weights in a folder that holds the model's config.

        Args:
            folder: Of the checkpoint.
            parts: What was to be remembered of each part.
            engine: That will read it; None: any.
        """
        targets = {module for scheme in self._schemes.values() for module in scheme.targets}
        ignored = [name for name in self._linears if name not in targets]
        fused = _fused_by_sglang(self._linears) if engine == "sglang" else {}
        config = QuantizationConfig(
            config_groups={key: _with_fused(s, fused) for key, s in self._schemes.items()},
            format=_common_format(self._schemes),
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=[
                *ignored,
                # vLLM refuses fused layers of which some parts are ignored and others missing.
                *missing_parts(self._linears, ignored),
                *(name for name, parts in fused.items() if not targets & parts),
            ],
        )
        file = folder / "config.json"
        content = json.loads(file.read_text())
        content["quantization_config"] = config.model_dump(mode="json") | {"version": __version__}
        file.write_text(json.dumps(content, indent=2) + "\n")

    def _packed_order(
        self, formats: Mapping[str, Format]
    ) -> Iterator[tuple[str, QuantizationScheme]]:
        for scheme in self._schemes.values():
            yield from ((name, scheme) for name in scheme.targets if name in formats)


def _fused_by_sglang(names: Sequence[str]) -> dict[str, set[str]]:
    """Name of a fused layer -> its parts.

    SGLang finds it by these only where the model's class states which they are, and refuses the
    checkpoint where it finds none; by its own name it finds it everywhere.
    """
    return {
        module.path: set(module.members)
        for module in engine_modules(names, "sglang")
        if module.name != EXPERTS and len(module.members) > 1
    }


def _with_fused(scheme: QuantizationScheme, fused: Mapping[str, set[str]]) -> QuantizationScheme:
    """A scheme that names the fused layers too all of whose parts it names."""
    targets = set(scheme.targets)
    added = [name for name, parts in fused.items() if parts <= targets]
    return scheme.model_copy(update={"targets": [*scheme.targets, *added]})


def _quantized_with(linear: StoredLinear) -> tuple[str, int]:
    """What linears have in common that are rows of one expert's parameter."""
    return linear.parameter, linear.expert


def _schemes(source: Source, experts: Set[str]) -> dict[str, QuantizationScheme]:
    """One group per distinct format, in the order of the model, those of experts first."""
    members: dict[LayerAlgo, list[str]] = {}
    for module, format_ in source.formats.items():
        scheme = compressed_scheme(format_)
        assert scheme is not None  # checked before
        members.setdefault(scheme, []).append(module)
    ordered = sorted(members.items(), key=lambda entry: experts.isdisjoint(entry[1]))
    width = len(str(len(members)))
    return {
        f"group_{number:0{width}d}": _scheme(scheme, modules, source.formats[modules[0]])
        for number, (scheme, modules) in enumerate(ordered)
    }


def _scheme(scheme: LayerAlgo, modules: list[str], format_: Format) -> QuantizationScheme:
    stored = COMPRESSED_AS[scheme.algo]
    if (preset := _PRESETS.get(scheme.algo)) is not None:
        return preset_name_to_scheme(preset, modules).model_copy(update={"format": stored})
    weight, input_ = grids(format_)
    return QuantizationScheme(
        targets=modules,
        weights=_arguments(weight, scheme.group_size),
        input_activations=None if input_ == SIXTEEN_BITS else _arguments(input_),
        format=stored,
    )


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
    maximum: float | None,
) -> dict[str, torch.Tensor]:
    """The tensors of one packed layer, without its name.

    ``maximum`` is the largest of its inputs; None where they have no stored scale.
    """
    parts = [
        _pack_rows(rows, of_rows, format_, scheme, maximum)
        for of_rows, rows in row_slices(quantizer, weight_OI)
    ]
    packed = joined_slices(parts)
    if "weight_shape" in packed:
        packed["weight_shape"] = torch.tensor(weight_OI.shape)
    return packed


def _pack_rows(
    weight_OI: torch.Tensor,
    quantizer: Any,
    format_: Format,
    scheme: QuantizationScheme,
    maximum: float | None,
) -> dict[str, torch.Tensor]:
    stored = str(scheme.format)
    compressor = BaseCompressor.get_value_from_registry(stored)
    if stored == "nvfp4-pack-quantized":
        scales = _nvfp4_scales(weight_OI, quantizer)
    elif stored.startswith("mxfp"):
        scales = {"weight_scale": _power_of_two_scales(weight_OI, stored)}
    else:
        scales = {"weight_scale": _scales(weight_OI, quantizer, format_)}
    # Quantized before, so that a tie is not rounded the other way than in the scan.
    weight_OI = quantizer(weight_OI)
    packed = compressor.compress({"weight": weight_OI.float(), **scales}, scheme)
    if maximum is not None and stored == "nvfp4-pack-quantized":
        packed["input_global_scale"] = torch.tensor([_NVFP4_LARGEST / (maximum or NO_ZERO)])
    elif maximum is not None:
        largest = make_quantizer(format_.input or {}, weight_OI.device).maxbound
        # All zeros: any scale will do, but 0; this is ModelOpt's.
        packed["input_scale"] = torch.tensor([(maximum or largest) / largest])
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _scales(weight_OI: torch.Tensor, quantizer: Any, format_: Format) -> torch.Tensor:
    """Those of integers and FP8, float32."""
    scale: torch.Tensor = quantizer.amax.float() / quantizer.maxbound
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # all zeros: any scale will do
    if block_size(format_) > 0:
        return scale.reshape(len(weight_OI), -1)
    return scale.reshape(1) if scale.numel() == 1 else scale


def _nvfp4_scales(weight_OI: torch.Tensor, quantizer: Any) -> dict[str, torch.Tensor]:
    """Of blocks, e4m3 numbers in float32, and of the whole weight, inverted."""
    if quantizer.is_nvfp4_static:
        scale, second = packed_static_scales(quantizer)
    else:
        largest = quantizer.amax.float().clamp(min=NO_ZERO)
        second = largest / _NVFP4_LARGEST
        scale, _ = NVFP4QTensor.get_weights_scaling_factor(weight_OI, 16, second)
    return {
        "weight_scale": scale.float().reshape(len(weight_OI), -1),
        "weight_global_scale": (1 / second.float()).reshape(1),
    }


def _power_of_two_scales(weight_OI: torch.Tensor, stored: str) -> torch.Tensor:
    """Of the blocks of MX formats, float32."""
    if stored == "mxfp8-quantized":
        _, exponents = MXFP8QTensor.quantize(weight_OI.float())
    else:
        _, exponents = MXFP4QTensor.quantize(weight_OI.float(), 32)
    scale: torch.Tensor = torch.exp2(exponents.float() - 127)
    return scale.reshape(len(weight_OI), -1)
