"""What a checkpoint's own files say of its quantization: ``config.json``, ``hf_quant_config.json``.

Nothing is guessed from it about tensors; :mod:`~autoquant_ray.models.quantized_source` does that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from autoquant_ray.errors import ModelError
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.stored_tensors import read_json

MODELOPT_FILE = "hf_quant_config.json"
"""ModelOpt's description of a checkpoint, beside or instead of that in ``config.json``."""

_KEYS = ("quantization_config", "compression_config")
_NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "quanto": "quanto",
    "torchao": "torchao",
}
"""Method -> how people write it."""


def method_of(config: Mapping[str, Any]) -> str:
    """The method of a ``quantization_config``, in small letters; ``''`` where it names none."""
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    method = config.get("quant_method") or config.get("quantization_method")
    if method is None and isinstance(config.get("bits"), int) and "group_size" in config:
        return "mlx"
    return str(method or "").lower()


def method_name(method: str) -> str:
    """A method as people write it."""
    return _NAMES.get(method, repr(method) if method else "by a method that they do not name")


def stated_quantization(ref: ModelRef) -> dict[str, Any]:
    """The checkpoint's ``quantization_config``, with its method; empty where the files have none.

    Raises:
        ModelError: The files contradict each other, or are damaged.
    """
    if ref.gguf_file is not None:
        return {}
    config = read_json(ref, "config.json")
    stated = [entry for entry in _entries(config) if entry]
    in_mlx = config.get("quantization")  # MLX's key, with the same again under the usual one
    if not stated and isinstance(in_mlx, Mapping) and "bits" in in_mlx:
        stated = [in_mlx]
    layers = read_json(ref, MODELOPT_FILE).get("quantization")
    if isinstance(layers, Mapping):
        stated.append({"quant_method": "modelopt", **layers})
    methods = sorted({method_of(entry) for entry in stated})
    algos = {str(e["quant_algo"]) for e in stated if e.get("quant_algo") is not None}
    if len(methods) > 1 or len(algos) > 1:
        names = sorted(algos) if len(methods) == 1 else map(method_name, methods)
        raise ModelError(
            f"model {ref.name} says in several places how it is quantized, and not the same "
            f"({', '.join(names)}); correct config.json or {MODELOPT_FILE}, or give the model in "
            "16 bits"
        )
    merged = {key: value for entry in stated for key, value in entry.items()}
    return {**merged, "quant_method": methods[0]} if methods else {}


def _entries(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a config, or a part such as ``text_config``, has under the keys of quantization."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from [value] if key in _KEYS else _entries(value)


def without_entries(part: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json``, or of a part, without what it says of quantization."""
    return {
        key: without_entries(value) if isinstance(value, Mapping) else value
        for key, value in part.items()
        if key not in _KEYS
    }


def without_quantization(config: Any) -> Any:
    """A transformers config that says nothing of quantization, in none of its parts.

    Args:
        config: Is changed.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        for key in _KEYS:
            if part is not None and hasattr(part, key):
                delattr(part, key)
    return config
