"""What stands beside the weights: the model's own files as they came, and what of them must change.

Exporters write a ``config.json`` and a ``generation_config.json`` anew: values that are not theirs
change on the way (sampling that was off is on, positions get other keys that older readers do not
know). So the model's own files are taken, byte for byte; in ``config.json`` only the values change
that describe the new weights, and the log names them. A model that has no model card gets one, of
how it was quantized.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.allocate.candidate import SOLUTION
from autoquant_ray.allocate.losses import allocation_key
from autoquant_ray.formats.format import NONE
from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.quantized_config import MODELOPT_FILE, without_entries
from autoquant_ray.models.stored_tensors import find_file
from autoquant_ray.models.tokenizer import TokenizerRef, load_tokenizer
from autoquant_ray.report.task_scores.section import difference_text, metric_name
from autoquant_ray.runs.names import EVALUATION_FILE, TASKS_FILE
from autoquant_ray.version import VERSION
from autoquant_ray.wording import few, printable, with_error

if TYPE_CHECKING:
    from autoquant_ray.export.source import Source

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
CARD = "README.md"
"""The model card."""


def finish_folder(folder: Path, ref: ModelRef, dtype: str, card: str = "") -> None:
    """Complete a written folder with what stands beside the weights.

    Args:
        folder: Holds ``config.json`` and the weights.
        ref: The model that they are from.
        dtype: 16-bit type of what is not quantized, such as ``bfloat16``.
        card: Model card for a model that has none.
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
    if card and not (folder / CARD).exists():
        (folder / CARD).write_text(card, encoding="utf-8")


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


def model_card(source: Source, layout: str) -> str:
    """How the weights were quantized: formats, predicted and measured loss, data, versions.

    Names are those of files alone, without the folders of the machine that they lay on; they stand
    where Markdown takes them for text.

    Args:
        source: The solution.
        layout: Of the checkpoint.
    """
    record, solution = source.state.record, source.manifest["solution"]
    name = _last(record.model["name"])
    counts = Counter(format_.name for format_ in source.formats.values())
    num_other = len(source.modules) - sum(counts.values())
    data = record.dataset
    versions = {**(record.versions or {}), "autoquant-ray": VERSION}
    facts = [
        ("model", name),
        ("layout", layout),
        *((f"layers in {format_}", f"{count}") for format_, count in counts.most_common()),
        *([("layers in 16 bits", f"{num_other}")] if num_other else []),
        ("stored bits per searched weight", f"{solution['effective_bits']:.4f}"),
        ("weights of the whole model", f"{round(solution['weight_bytes']):,} bytes"),
        ("predicted loss", _loss(solution["predicted_kl_nats"])),
        *_measured(source),
        *_tasks(source),
        ("calibration data", f"{_last(str(data.get('name', 'unknown')))}, {_amount(data)}"),
        ("versions", ", ".join(f"{package} {version}" for package, version in versions.items())),
    ]
    width = max(len(label) for label, _ in facts)
    lines = [printable(f"{label:{width}}  {' '.join(value.split())}") for label, value in facts]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [quantized]",
            "---",
            "",
            "# Quantized weights",
            "",
            "Chosen layer by layer and written by autoquant-ray. Losses are KL divergences from "
            "the model in 16 bits, in nats per token.",
            "",
            "```text",
            *lines,
            "```",
            "",
        ]
    )


def _last(name: str) -> str:
    """A hub id as it is; of a path, the last part."""
    is_id = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
    return name if is_id else name.rstrip("/").rpartition("/")[2]


def _loss(nats: float | None) -> str:
    return "unknown" if nats is None else f"{nats:.4g}"


def _amount(data: Mapping[str, Any]) -> str:
    return (
        f"{data.get('num_samples', 'unknown')} samples, {data.get('num_tokens', 'unknown')} tokens"
    )


def _measured(source: Source) -> list[tuple[str, str]]:
    """Measured losses of the solution, one for each data set that it was measured on."""
    directory = source.state.directory
    if not directory.exists(EVALUATION_FILE):
        return []
    rows = directory.read_table(EVALUATION_FILE).to_pylist()
    key = _key(source)
    return [
        (
            "measured loss",
            f"{row['kl_mean']:.4g} on {row['num_tokens']:,} tokens of {_last(row['dataset'])}",
        )
        for row in rows
        if row["name"] == SOLUTION and row["allocation"] == key
    ]


def _tasks(source: Source) -> list[tuple[str, str]]:
    """Scores of benchmark tasks, each beside that of the model in 16 bits."""
    directory = source.state.directory
    if not directory.exists(TASKS_FILE):
        return []
    rows, key = directory.read_table(TASKS_FILE).to_pylist(), _key(source)
    # The same formats may be those of several solutions.
    solutions = {
        (row["task"], row["metric"], row["filter"]): row["solution"]
        for row in rows
        if row["name"] == SOLUTION and row["allocation"] == key
    }
    return [
        (
            metric_name(row),
            f"{with_error(row['value'], row['stderr'])} ({difference_text(row)} against 16 bits)",
        )
        for row in rows
        if row["name"] == SOLUTION
        and solutions.get((row["task"], row["metric"], row["filter"])) == row["solution"]
    ]


def _key(source: Source) -> str:
    """Digest of the searched groups' formats, as measurements have it."""
    names = {module: format_.name for module, format_ in source.formats.items()} | dict(
        source.caches
    )
    unsearched = source.state.plan["unsearched"]
    chosen = {group: names.get(module, NONE) for module, group in source.groups.items()}
    return allocation_key({group: f for group, f in chosen.items() if group not in unsearched})
