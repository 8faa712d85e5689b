"""The KV cache in an exported checkpoint: formats by layer, and a scale for keys and values each.

ModelOpt 0.48 names one format for all caches (``kv_cache_quant_algo``), or, where they differ, the
format of each attention (``kv_cache_quantized_layers``). The scales of keys and values stand beside
``k_proj`` and ``v_proj``: their maximum over 448, the largest e4m3 number, whatever the format
(``modelopt/torch/export/quant_utils.py``). Both are written with 0.47 too.

compressed-tensors has one scheme for the caches of all attentions (``kv_cache_scheme``), which is
not written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import CheckpointError, FormatError
from autoquant_ray.export.layouts import MODELOPT
from autoquant_ray.formats.format import NONE
from autoquant_ray.wording import few

if TYPE_CHECKING:
    from autoquant_ray.quantize.calibration import Calibration

SCALES = ("k_scale", "v_scale")
"""Kinds of tensors; they stay in float32."""

_ALGOS = {"kv_fp8": "FP8", "kv_nvfp4": "NVFP4", "kv_fp8_nvfp4": "FP8_K_NVFP4_V"}
"""Format -> what ModelOpt calls it."""
_FOR_ALL = ("kv_fp8", "kv_nvfp4")
"""Formats that some engine reads, as the one of all caches."""
_LARGEST = 448.0
_TOLERANCE = 1e-5  # a scale is a float32 quotient
_MOST_NAMES = 4


def holds_caches(caches: Mapping[str, str], layout: str) -> bool:
    """Whether a layout of checkpoints has a place for the formats of the KV cache.

    Args:
        caches: Attention -> its cache's format, those in 16 bits among them.
        layout: Of ``LAYOUTS``, or a recipe.
    """
    return layout == MODELOPT or set(caches.values()) <= {NONE}


def require_caches(caches: Mapping[str, str], layout: str) -> None:
    """Check that a checkpoint can hold the formats of the KV cache.

    Args:
        caches: As above.
        layout: What is written.

    Raises:
        FormatError: It cannot; names caches and the remedy.
    """
    if holds_caches(caches, layout):
        return
    quantized = [name for name, format_ in caches.items() if format_ != NONE]
    raise FormatError(
        f"`format` {layout} cannot hold formats of the KV cache ({few(quantized, _MOST_NAMES)}); "
        f"give `format` {MODELOPT}, or solve with these groups in 16 bits (`allow` '*.kv=none')"
    )


def unread_reason(caches: Mapping[str, str]) -> str | None:
    """Why no released engine reads the formats of the KV cache; None where some engine may.

    Args:
        caches: As above.
    """
    names = set(caches.values())
    if len(names) > 1:
        return (
            "no released engine reads formats of the KV cache by layer (kv_cache_quantized_layers)"
        )
    if names <= {NONE, *_FOR_ALL}:
        return None
    return f"no released engine reads a KV cache in {', '.join(names)}"


def cache_algos(caches: Mapping[str, str]) -> dict[str, str | None]:
    """Attention -> what ModelOpt calls the format of its cache; None in 16 bits.

    Args:
        caches: As above.
    """
    return {name: None if format_ == NONE else _ALGOS[format_] for name, format_ in caches.items()}


def set_cache_maxima(model: Any, caches: Mapping[str, str], calibration: Calibration) -> None:
    """Give the quantizers of keys and values the scan's maxima.

    Args:
        model: As ``mtq.quantize`` made it.
        caches: Attention -> its cache's format.
        calibration: From the scan.
    """
    import torch

    for name, format_ in caches.items():
        for part in ("k_bmm", "v_bmm") if format_ != NONE else ():
            quantizer = getattr(model.get_submodule(name), f"{part}_quantizer")
            quantizer.amax = torch.tensor(calibration.of(name).maxima[f"{part}_amax"])


def check_caches(folder: Path, caches: Mapping[str, str], calibration: Calibration) -> None:
    """Check what was written of the KV cache.

    Args:
        folder: The checkpoint.
        caches: Attention -> its cache's format.
        calibration: From the scan.

    Raises:
        CheckpointError: Other formats than the allocation's, or other scales than the scan's.
    """
    from safetensors import safe_open

    scales: dict[str, float] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith(tuple(f".{kind}" for kind in SCALES)):
                    scales[name] = float(tensors.get_tensor(name).float())
    _check_formats(folder, caches, scales)
    for kind in SCALES:
        part = kind.replace("scale", "bmm_amax")
        quantized = [name for name, format_ in caches.items() if format_ != NONE]
        expected = [calibration.of(name).maxima[part] / _LARGEST for name in quantized]
        written = sorted(value for name, value in scales.items() if name.endswith(f".{kind}"))
        if len(written) != len(expected) or not all(
            math.isclose(a, b, rel_tol=_TOLERANCE)
            for a, b in zip(written, sorted(expected), strict=True)
        ):
            raise CheckpointError(
                f"the exporter wrote {len(written)} tensors {kind} with other values than the "
                f"{len(expected)} of the scan"
            )


def _check_formats(folder: Path, caches: Mapping[str, str], scales: Mapping[str, float]) -> None:
    """Check the formats as a reader finds them: of every scale that of its attention."""
    content = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    algo, layers = content.get("kv_cache_quant_algo"), content.get("kv_cache_quantized_layers")
    wanted = [algo for algo in cache_algos(caches).values() if algo is not None]
    if layers is None:
        written = [algo] * max(len(wanted), algo is not None)
    else:
        written = [entry["quant_algo"] for entry in layers.values()]
    if sorted(written, key=str) != sorted(wanted):
        raise CheckpointError(
            f"the exporter wrote a KV cache in {few(sorted(set(map(str, written))), _MOST_NAMES)} "
            f"instead of {few(sorted(set(wanted)), _MOST_NAMES) or '16 bits'}"
        )
    starts = tuple(f"{name}." for name in layers or ())
    lost = [name for name in scales if layers is not None and not name.startswith(starts)]
    if lost:
        raise CheckpointError(
            f"the exporter wrote no format of the KV cache for {few(lost, _MOST_NAMES)}"
        )
