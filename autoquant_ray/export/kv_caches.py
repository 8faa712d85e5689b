"""The KV cache in an exported checkpoint: one format for all of it, and a scale per attention.

ModelOpt's exporter names the format once (``kv_cache_quant_algo``) and writes the scales of keys
and values beside ``k_proj`` and ``v_proj``, as their maximum over 448, the largest e4m3 number
(``modelopt/torch/export/quant_utils.py``). So what can be exported is ``kv_fp8`` everywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.errors import CheckpointError, FormatError
from autoquant_ray.formats.format import NONE
from autoquant_ray.wording import few

if TYPE_CHECKING:
    from autoquant_ray.quantize.calibration import Calibration

SCALES = ("k_scale", "v_scale")
"""Kinds of tensors; they stay in float32."""

_EXPORTED = "kv_fp8"
_LARGEST = 448.0
_TOLERANCE = 1e-5  # a scale is a float32 quotient
_MOST_NAMES = 4


def require_caches(caches: Mapping[str, str], layout: str, *, holds_caches: bool) -> None:
    """Check that a checkpoint can hold the formats of the KV cache.

    Args:
        caches: Attention -> its cache's format, those in 16 bits among them.
        layout: What is written, for the error.
        holds_caches: Whether it has a place for them.

    Raises:
        FormatError: It cannot; names caches and the remedy.
    """
    used = set(caches.values())
    if used <= {NONE} or (holds_caches and used == {_EXPORTED}):
        return
    quantized = [name for name, format_ in caches.items() if format_ != NONE]
    named = few(quantized, _MOST_NAMES)
    if not holds_caches:
        raise FormatError(
            f"`format` {layout} cannot hold formats of the KV cache ({named}); give `format` "
            "modelopt, or solve with these groups in 16 bits (`allow` '*.kv=none')"
        )
    raise FormatError(
        f"`format` {layout} holds the KV cache in {_EXPORTED} for all attentions or in 16 bits, "
        f"and this solution has {', '.join(sorted(used))} ({named}); solve with `allow` "
        f"'*.kv={_EXPORTED}'"
    )


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
        CheckpointError: Another format than the allocation's, or other scales than the scan's.
    """
    from safetensors import safe_open

    wanted = "FP8" if _EXPORTED in caches.values() else None
    content = json.loads((folder / "hf_quant_config.json").read_text())
    algo = content["quantization"].get("kv_cache_quant_algo")
    if algo != wanted:
        raise CheckpointError(f"the exporter wrote a KV cache in {algo} instead of {wanted}")
    scales: dict[str, list[float]] = {kind: [] for kind in SCALES}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name.endswith(tuple(f".{kind}" for kind in SCALES)):
                    value = tensors.get_tensor(name)
                    scales[name.rpartition(".")[2]].append(float(value.float()))
    for kind in SCALES:
        part = kind.replace("scale", "bmm_amax")
        quantized = [name for name, format_ in caches.items() if format_ != NONE]
        expected = [calibration.of(name).maxima[part] / _LARGEST for name in quantized]
        written = sorted(scales[kind])
        if len(written) != len(expected) or not all(
            math.isclose(a, b, rel_tol=_TOLERANCE)
            for a, b in zip(written, sorted(expected), strict=True)
        ):
            raise CheckpointError(
                f"the exporter wrote {len(written)} tensors {kind} with other values than the "
                f"{len(expected)} of the scan"
            )
