"""What stands beside the weights: the model's own files as they came, and what of them must change.

Exporters write a ``config.json`` and a ``generation_config.json`` anew: values that are not theirs
change on the way (sampling that was off is on, positions get other keys that older readers do not
know). So the model's own files are taken, byte for byte; in ``config.json`` only the values change
that describe the new weights, and the log names them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.quantized_config import MODELOPT_FILE, without_entries
from autoquant_ray.models.stored_tensors import find_file
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.wording import few

logger = logging.getLogger(__name__)

CONFIG, GENERATION = "config.json", "generation_config.json"
_TYPES = ("dtype", "torch_dtype")
_PARTS = ("text_config", "vision_config")
_UNTIED = "tie_word_embeddings"
_WEIGHTS = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
    ".ot",
)
"""Ends of names of files that hold weights, or list them."""
_OF_SOURCE = (CONFIG, MODELOPT_FILE, "quantize_config.json", "quant_config.json", "recipe.yaml")
"""Files that describe the weights of the model that was scanned."""
_FOLDERS = ("additional_chat_templates",)
_MOST_NAMES = 6


def finish_folder(folder: Path, ref: ModelRef, dtype: str) -> None:
    """Complete a written folder with what stands beside the weights.

    Args:
        folder: Holds ``config.json`` and the weights.
        ref: The model that they are from.
        dtype: 16-bit type of what is not quantized, such as ``bfloat16``.
    """
    config = json.loads((folder / CONFIG).read_text())
    config_file = None if ref.gguf_file is not None else find_file(ref, CONFIG)
    if config_file is None or ref.weights_folder is None:
        load_tokenizer(TokenizerRef.of(ref, "")).save_pretrained(folder)
    if config_file is None:
        _state_type(config, dtype)
    else:
        if ref.weights_folder is not None:
            (folder / GENERATION).unlink(missing_ok=True)  # of the exporter; the model has none
        _copy(config_file.parent, folder)
        config = _merged(json.loads(config_file.read_text(encoding="utf-8")), config, dtype)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _copy(source: Path, folder: Path) -> None:
    """Copy the files of a model's folder that describe no weights."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and _is_copied(path.name):
            shutil.copyfile(path, folder / path.name)


def _is_copied(name: str) -> bool:
    return not (name.startswith(".") or name in _OF_SOURCE or name.endswith(_WEIGHTS))


def _merged(source: dict[str, Any], written: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The model's own config with what the exporter's says of the new weights.

    Where another class was loaded than the config describes (the text model of one with images), it
    is the exporter's.
    """
    if source.get("model_type") != written.get("model_type"):
        logger.info("%s is written anew: it is that of the text model alone", CONFIG)
        config = dict(written)
        _state_type(config, dtype)
        return config
    config = without_entries(source)
    if "quantization_config" in written:
        config["quantization_config"] = written["quantization_config"]
    if written.get("architectures"):
        config["architectures"] = written["architectures"]
    _state_type(config, dtype)
    for part, new in _pairs(config, written):
        if new.get(_UNTIED) is False:
            part[_UNTIED] = False
    changed = [key for key in {**source, **config} if source.get(key) != config.get(key)]
    logger.info("%s: changed %s", CONFIG, few(changed, _MOST_NAMES))
    return config


def _state_type(config: dict[str, Any], dtype: str) -> None:
    """Name the type of the weights wherever the config names one, and once at least."""
    for part, _ in _pairs(config, config):
        for key in _TYPES:
            if part.get(key) is not None:
                part[key] = dtype
    if not any(config.get(key) for key in _TYPES):
        config["dtype"] = dtype


def _pairs(
    config: dict[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """The config and its parts, each with the same part of another."""
    yield config, other
    for name in _PARTS:
        if isinstance(config.get(name), dict) and isinstance(other.get(name), Mapping):
            yield config[name], other[name]
