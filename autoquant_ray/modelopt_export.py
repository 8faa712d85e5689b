"""The package's door to ModelOpt's exporter, versions 0.47 and 0.48, beside
:mod:`autoquant_ray.modelopt_api`.

The exporter writes a model that is in memory as a whole. Its steps are taken here one by one, so
that a model can be packed in parts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modelopt.torch.export import quant_utils, unified_export_hf
from modelopt.torch.export.quant_aware_conversion import (
    QuantConversionUnsupportedError,
    _build_reverse_rules,
    apply_reverse_rules,
    build_reverse_name_mapper,
    revert_weight_conversion_quant_aware,
)
from modelopt.torch.export.registry import PrepareMoEInputsRegistry
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.utils.core_utils import is_quantized_linear

MOST_ELEMENTS = 2**22
"""Of a weight that are quantized or packed at once."""
_LINEAR = "QuantLinear"
"""The exporter packs a linear whose class is named so, and leaves others as they are
(``QuantFalconLinear``)."""
_WEIGHT = ".weight"
_SCALES = ("weight_scale", "weight_scale_2", "input_scale")
_MOST_PARTS = 2520
"""Rows that any small number of parts divides."""
_LAYERS = "layers"
"""Among what :func:`pack_model` gives, the formats of layers."""
_MIXED = "MIXED_PRECISION"
_CACHE = "kv_cache_"
"""How all that a config says of the KV cache begins."""
_CACHE_ALGO, _CACHE_LAYERS = f"{_CACHE}quant_algo", f"{_CACHE}quantized_layers"
_CACHE_FLAT = (_MIXED, "FP8_K_NVFP4_V")
"""What ``config.json`` names as it is; other algorithms of the KV cache are its scheme."""
_NAME_MARK = re.compile(r"\.(\x00|\\u0000).*?sentinel")
"""What 0.47 puts behind names while it maps them, in a text or in JSON
(``modelopt/torch/export/quant_aware_conversion.py``)."""


def pack_model(
    model: Any, *, dtype: torch.dtype, fuses: bool
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Pack a quantized model, or a part of one, as ``export_hf_checkpoint`` does before it writes.

    Args:
        model: Calibrated; it is changed.
        dtype: In which the model computes.
        fuses: Whether linears that read one input get scales in common. It finds them by running
            the model, which must be whole.

    Returns:
        The tensors by their names in memory, and what the checkpoint's config is made of
        (:func:`write_export_config`): plain values.
    """
    with ExitStack() as stack:
        # The formats of layers are put together when those of all parts are there.
        stack.enter_context(
            _replaced(quant_utils, "process_layer_quant_config", lambda layers: {_LAYERS: layers})
        )
        name = "_export_quantized_weight"
        in_slices = _export_in_slices(getattr(unified_export_hf, name))
        stack.enter_context(_replaced(unified_export_hf, name, in_slices))
        for kind in {type(module) for module in model.modules() if is_quantized_linear(module)}:
            if _LINEAR not in kind.__name__:
                stack.enter_context(_replaced(kind, "__name__", _LINEAR))
        has_inputs = _with_prepared_inputs(unified_export_hf.is_moe)
        stack.enter_context(_replaced(unified_export_hf, "is_moe", has_inputs))
        if not fuses:
            name = "requantize_resmooth_fused_llm_layers"
            stack.enter_context(_replaced(unified_export_hf, name, lambda *_, **__: None))
        tensors, config = unified_export_hf._export_transformers_checkpoint(model, dtype)
    return tensors, config["quantization"]


def row_slices(quantizer: Any, weight_OI: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor]]:
    """The rows of a large weight in slices, each with a quantizer that has its maxima.

    Quantizing or packing makes several copies in float32, of which large ones would take more
    memory than a decoder layer. The results are the same to the bit: no row depends on another
    once the maxima are there.

    Args:
        quantizer: The weight's, calibrated.
        weight_OI: The weight; slices are views of it.
    """
    num_rows = len(weight_OI)
    size = max(2, MOST_ELEMENTS // weight_OI[0].numel() // 2 * 2)  # 4-bit rows are packed in pairs
    if num_rows <= size or not _is_divided(quantizer, num_rows):
        yield quantizer, weight_OI
        return
    for start in range(0, num_rows, size):
        yield some_rows(quantizer, weight_OI, start, size)


def some_rows(
    quantizer: Any, weight_OI: torch.Tensor, start: int, size: int
) -> tuple[Any, torch.Tensor]:
    """Some rows of a weight, a view of it, with a quantizer that has their maxima.

    Args:
        quantizer: The weight's, calibrated; its blocks are within rows.
        weight_OI: The weight.
        start: The first of the rows.
        size: How many; fewer at the end.
    """
    num_rows, maxima = len(weight_OI), quantizer.amax
    assert _is_divided(quantizer, num_rows)
    rows, of_rows = weight_OI[start : start + size], copy.deepcopy(quantizer)
    if maxima is not None and maxima.numel() > 1:
        del of_rows._amax  # another shape is refused
        part = maxima.reshape(num_rows, -1)[start : start + size]
        of_rows.amax = part.reshape(-1, *maxima.shape[1:]).clone()
    for name in ("_original_shape", "_amax_shape_for_export"):  # of the weight that it has seen
        if (shape := getattr(of_rows, name, ())) and shape[0] == num_rows:
            setattr(of_rows, name, torch.Size([len(rows)]) + tuple(shape[1:]))
    return of_rows, rows


def _is_divided(quantizer: Any, num_rows: int) -> bool:
    """Whether each of a quantizer's maxima is that of one row, or part of one, or of all."""
    maxima = quantizer.amax
    if maxima is None or maxima.numel() == 1:
        return True
    return -2 not in (quantizer.block_sizes or {}) and maxima.shape[0] % num_rows == 0


def joined_slices(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Packed slices of a weight as one: rows in their order, what all of them share once."""
    first = parts[0]
    return {
        name: tensor if tensor.numel() == 1 else torch.cat([part[name] for part in parts])
        for name, tensor in first.items()
    }


def _export_in_slices(export: Callable[..., None]) -> Callable[..., None]:
    """The exporter's packing of a weight, slice by slice."""

    def export_slices(module: Any, dtype: torch.dtype, weight_name: str = "weight") -> None:
        weight, quantizer = getattr(module, weight_name), getattr(module, "weight_quantizer", None)
        is_matrix = weight_name == "weight" and weight.dim() == 2
        if not is_matrix or not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
            export(module, dtype, weight_name)
            return
        parts = []
        for of_rows, rows in row_slices(quantizer, weight.detach()):
            if len(rows) == len(weight):
                export(module, dtype)
                return
            part = torch.nn.Module()
            part.weight = torch.nn.Parameter(rows, requires_grad=False)
            part.weight_quantizer, part.input_quantizer = of_rows, module.input_quantizer
            export(part, dtype)
            parts.append(
                {"weight": part.weight.detach(), **dict(part.named_buffers(recurse=False))}
            )
        joined = joined_slices(parts)
        module.weight = torch.nn.Parameter(joined.pop("weight"), requires_grad=False)
        for name, tensor in joined.items():
            module.register_buffer(name, tensor)

    return export_slices


def _with_prepared_inputs(is_moe: Callable[..., bool]) -> Callable[..., bool]:
    """The exporter's rule for blocks whose experts' inputs it prepares.

    It refuses a model with experts for which it has no preparation (Aria, LongCat), though nothing
    is to be prepared in those that are not quantized.
    """

    def is_prepared(module: Any, *model_type: Any) -> bool:
        experts = getattr(module, "experts", None)
        if not is_moe(module, *model_type) or not isinstance(experts, torch.nn.Module):
            return is_moe(module, *model_type)
        quantizers = (part for part in experts.modules() if isinstance(part, TensorQuantizer))
        is_quantized = any(quantizer.is_enabled for quantizer in quantizers)
        return is_quantized or PrepareMoEInputsRegistry.match(experts) is not None

    return is_prepared


def as_stored_tensors(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Packed tensors by the names in the model's own files.

    Args:
        model: As transformers loaded it; its weights need not be there.
        tensors: Of the model or of a part, by the names in memory.

    Raises:
        ValueError: The exporter cannot give them the form of the files; the reason.
    """
    try:
        stored: dict[str, torch.Tensor] = revert_weight_conversion_quant_aware(model, tensors)
    except (QuantConversionUnsupportedError, RuntimeError, LookupError, TypeError) as error:
        raise ValueError(str(error)) from None
    if any(_is_scale(name) and _weight_of(name) not in stored for name in stored):
        _follow_weights(model, tensors, stored)
    return stored


def _follow_weights(
    model: Any, tensors: Mapping[str, torch.Tensor], stored: dict[str, torch.Tensor]
) -> None:
    """Give scales the names of their weights, where a rule is for the whole name of a weight."""
    renamed, _ = _reversal(model)
    names_of = stored_names_of(model)
    for name in filter(_is_scale, tensors):
        module, _, kind = name.rpartition(".")
        given = renamed({name: tensors[name]})
        wanted = [f"{new}.{kind}" for new in names_of(module)]
        for wrong, right in zip(given, wanted, strict=True):
            stored[right] = stored.pop(wrong)


def _reversal(
    model: Any,
) -> tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], Callable[[str], bool]]:
    """What takes tensors apart that transformers joined and gives them the names in the files, and
    what says whether a tensor would be joined with others for the files (0.48 knows rules of that).
    """
    rules: Any = _build_reverse_rules(model)
    if len(rules) == 3:  # 0.47
        splits, renames, _ = rules
        return lambda tensors: apply_reverse_rules(tensors, splits, renames), lambda _: False
    splits, merges, renames, _, in_files = rules
    apply: Any = apply_reverse_rules
    return (
        lambda tensors: apply(tensors, splits, renames, source_keys=in_files),
        lambda name: any(m.converter.rename_source_key(name)[1] is not None for m in merges),
    )


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in _SCALES


def _weight_of(name: str) -> str:
    return f"{name.rpartition('.')[0]}{_WEIGHT}"


def write_export_config(
    model: Any,
    parts: Sequence[Mapping[str, Any]],
    folder: Any,
    caches: Mapping[str, str | None] | None = None,
) -> None:
    """Write the description of packed weights: ``hf_quant_config.json``, and in ``config.json``.

    What it says of the KV cache is what 0.48 writes, with 0.47 too.

    Args:
        model: As transformers loaded it; its weights need not be there.
        parts: What :func:`pack_model` gave for each part, in the order of the model.
        folder: Holds the ``config.json`` of the model.
        caches: Attention -> algorithm of its KV cache, as 0.48 names it; None in 16 bits.
    """
    layers = {name: value for part in parts for name, value in part[_LAYERS].items()}
    process = quant_utils.process_layer_quant_config
    with _replaced(quant_utils, "process_layer_quant_config", lambda _: process(layers)):
        config = quant_utils.get_quant_config(torch.nn.Module())
    quantization = config["quantization"]
    for part in parts:  # which know of no other caches than their own
        quantization |= {
            name: value
            for name, value in part.items()
            if name != _LAYERS and not name.startswith(_CACHE) and value is not None
        }
    names_of = stored_names_of(model)
    _rename(quantization, names_of)
    stored = {new: algo for name, algo in (caches or {}).items() for new in names_of(name)}
    quantization |= _cache_entries(stored, is_mixed=quantization["quant_algo"] == _MIXED)
    convert = _with_caches(unified_export_hf.convert_hf_quant_config_format)
    with _replaced(unified_export_hf, "convert_hf_quant_config_format", convert):
        unified_export_hf._write_hf_export_config(model, config, folder)


def _cache_entries(caches: Mapping[str, str | None], *, is_mixed: bool) -> dict[str, Any]:
    """What ``hf_quant_config.json`` says of the KV cache, as 0.48's ``get_quant_config`` has it.

    Where attentions of one algorithm stand beside others in 16 bits, that names the algorithm
    alone, and readers would take it for all; here the layers are named then too.

    Args:
        caches: Attention -> algorithm; None in 16 bits.
        is_mixed: Whether the weights have several algorithms.
    """
    algos = set(caches.values())
    if algos <= {None}:
        return {}
    if len(algos) == 1:
        return {_CACHE_ALGO: algos.pop()}
    layers = {name: {"quant_algo": algo} for name, algo in caches.items() if algo is not None}
    unread = {} if is_mixed else {f"{_CACHE}deployment_supported": False}
    return unread | {
        _CACHE_ALGO: _MIXED,
        _CACHE_LAYERS: layers,
        f"{_CACHE}schema_version": 1,
    }


def _with_caches(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What makes the config in ``config.json`` of the other, with what 0.48 says of the cache."""

    def converted(config: Any) -> Any:
        flat, details = convert(config), config["quantization"]
        if details.get(_CACHE_ALGO) in _CACHE_FLAT:
            flat.pop(f"{_CACHE}scheme", None)
            flat |= {name: value for name, value in details.items() if name.startswith(_CACHE)}
        return flat

    return converted


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def stored_names_of(model: Any) -> Callable[[str], list[str]]:
    """What gives the names in the model's own files of a module in memory.

    They are several where the files hold parts of what transformers joins on loading, and are those
    that :func:`as_stored_tensors` gives its weight. (ModelOpt's mapper of names is for patterns: it
    knows no parts, and no rule for a whole name, as DeepSeek-V4 has of its head.)

    Raises:
        ValueError: The exporter cannot give tensors the form of the files; the reason.
    """
    try:
        renamed, is_merged = _reversal(model)
        name_of = build_reverse_name_mapper(model)
    except QuantConversionUnsupportedError as error:
        raise ValueError(str(error)) from None

    def names_of(name: str) -> list[str]:
        weight = f"{name}{_WEIGHT}"
        stored = []
        if "*" not in name and not is_merged(weight):
            stored = [*renamed({weight: torch.empty(_MOST_PARTS, 0, device="meta")})]
        if stored and all(tensor.endswith(_WEIGHT) for tensor in stored):
            return [tensor.removesuffix(_WEIGHT) for tensor in stored]
        return [name if name_of is None else without_name_marks(name_of(name))]

    return names_of


def _rename(quantization: dict[str, Any], names_of: Callable[[str], list[str]]) -> None:
    """Give what a config lists its names in the files."""
    ignored, layers = quantization.get("exclude_modules"), quantization.get("quantized_layers")
    if ignored:
        quantization["exclude_modules"] = [new for name in ignored for new in names_of(name)]
    if layers:
        quantization["quantized_layers"] = {
            new: layer for name, layer in layers.items() for new in names_of(name)
        }


def without_name_marks(text: str) -> str:
    """Without a mark that ModelOpt 0.47 puts behind names while it maps them, and leaves there
    where one of the model's patterns fits the mark itself (``model.`` does)."""
    return _NAME_MARK.sub("", text)
