"""A manifest's ``quantization_config`` as ``mtq.quantize`` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from autoquant_ray.formats.algorithms import by_sets, on_cpu
from autoquant_ray.formats.format import attributes_from_json
from autoquant_ray.formats.numbers import is_scaled_by_block, is_static_nvfp4


def load_quantization_config(
    manifest: Mapping[str, Any], *, device: Literal["auto", "cpu", "cuda"] = "auto"
) -> dict[str, Any]:
    """Give a manifest's ``quantization_config`` the Python types that ``mtq.quantize`` checks.

    ModelOpt runs NVFP4 and the MX formats by CUDA kernels only. For a model on CPU their quantizers
    name the ``backend`` that this package registers with ModelOpt
    (:mod:`autoquant_ray.quantize.block_formats`); on CUDA such a quantizer still runs ModelOpt's
    kernels. Where layers are calibrated by different algorithms, the mode that this package
    registers with ModelOpt (:mod:`autoquant_ray.quantize.calibration_mode`) runs ModelOpt's own,
    one after another.

    Args:
        manifest: Content of ``manifest.json``.
        device: Where the model is. ``cuda`` never names the backend, so that what is saved
            needs ModelOpt alone. ``auto``: ``cpu`` where this machine has no CUDA device.

    Returns:
        ``{"quant_cfg": [...], "algorithm": ...}`` with integer block axes and tuples.

    Raises:
        ValueError: The manifest has none, because it was imported.
    """
    config = manifest["quantization_config"]
    if config is None:
        raise ValueError("this manifest was imported and does not name all quantized modules")
    entries = [
        entry | ({"cfg": attributes_from_json(entry["cfg"])} if "cfg" in entry else {})
        for entry in config["quant_cfg"]
    ]
    return _runnable({"quant_cfg": entries, "algorithm": config["algorithm"]}, device)


def _runnable(config: dict[str, Any], device: str) -> dict[str, Any]:
    """The config with what it needs registered with ModelOpt; on CPU, with its backend named."""
    quantizers = [entry.get("cfg") or {} for entry in config["quant_cfg"]]
    by_block = any(map(is_scaled_by_block, quantizers)) and _is_on_cpu(device)
    if by_block and any(map(is_static_nvfp4, quantizers)):
        config["algorithm"] = on_cpu(config["algorithm"])
    if by_sets(config["algorithm"]):
        import autoquant_ray.quantize.calibration_mode  # noqa: F401
    if not by_block:
        return config
    from autoquant_ray.quantize.block_formats import for_cpu

    return for_cpu(config)


def _is_on_cpu(device: str) -> bool:
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())
