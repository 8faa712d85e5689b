"""The package's door to ModelOpt's exporter, versions 0.47 and 0.48, beside
:mod:`autoquant_ray.modelopt_api`.

The exporter writes a model that is in memory as a whole. Its steps are taken here one by one, so
that a model can be packed in parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modelopt.torch.export import quant_utils, unified_export_hf
from modelopt.torch.export.quant_aware_conversion import (
    QuantConversionUnsupportedError,
    build_reverse_name_mapper,
    revert_quant_config_names,
    revert_weight_conversion_quant_aware,
)

_LAYERS = "layers"
"""Among what :func:`pack_model` gives, the formats of layers."""
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
        if not fuses:
            name = "requantize_resmooth_fused_llm_layers"
            stack.enter_context(_replaced(unified_export_hf, name, lambda *_, **__: None))
        tensors, config = unified_export_hf._export_transformers_checkpoint(model, dtype)
    return tensors, config["quantization"]


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
    return stored


def write_export_config(model: Any, parts: Sequence[Mapping[str, Any]], folder: Any) -> None:
    """Write the description of packed weights: ``hf_quant_config.json``, and in ``config.json``.

    Args:
        model: As transformers loaded it; its weights need not be there.
        parts: What :func:`pack_model` gave for each part, in the order of the model.
        folder: Holds the ``config.json`` of the model.
    """
    layers = {name: value for part in parts for name, value in part[_LAYERS].items()}
    process = quant_utils.process_layer_quant_config
    with _replaced(quant_utils, "process_layer_quant_config", lambda _: process(layers)):
        config = quant_utils.get_quant_config(torch.nn.Module())
    for part in parts:
        config["quantization"] |= {n: v for n, v in part.items() if n != _LAYERS and v is not None}
    revert_quant_config_names(config["quantization"], build_reverse_name_mapper(model))
    unified_export_hf._write_hf_export_config(model, config, folder)


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def stored_name_of(model: Any) -> Callable[[str], str] | None:
    """What gives the name in the model's own files of a module in memory; None: the same.

    Raises:
        ValueError: The exporter cannot give tensors the form of the files; the reason.
    """
    try:
        name_of = build_reverse_name_mapper(model)
    except QuantConversionUnsupportedError as error:
        raise ValueError(str(error)) from None
    return None if name_of is None else lambda name: without_name_marks(name_of(name))


def without_name_marks(text: str) -> str:
    """Without a mark that ModelOpt 0.47 puts behind names while it maps them, and leaves there
    where one of the model's patterns fits the mark itself (``model.`` does)."""
    return _NAME_MARK.sub("", text)
