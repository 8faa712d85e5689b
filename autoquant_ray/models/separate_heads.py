"""Heads with a weight of their own in the files, though the config ties them to the embedding.

Where a checkpoint holds both weights, transformers (5.14, ``tie_weights``) compares them when it
loads it: it ties equal ones, keeps different ones, and leaves the config as it is. So a head that
was saved twice is tied here too, and one that differs is a layer like any other. A skeleton, made
from the config alone, must be told by the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant_ray.models.find import ModelRef
from autoquant_ray.models.gguf_config import read_facts

if TYPE_CHECKING:
    import torch

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS_AT_ONCE = 4096


def separate_head(model: Any) -> str | None:
    """Name of the head that the config ties to the embedding and that has a weight of its own.

    Args:
        model: A loaded model, or a skeleton that :func:`untie_as_files` has seen.
    """
    name, embedding = _head_name(model), model.get_input_embeddings()
    is_shared = embedding is None or model.get_output_embeddings().weight is embedding.weight
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    return None if is_shared or f"{name}.weight" not in ties else name


def describe_separate(head: str) -> str:
    """What people are told of such a head."""
    return (
        f"{head} is a layer of its own: the config ties it to the input embedding, but the files "
        "hold another weight for it"
    )


def untie_as_files(model: Any, ref: ModelRef) -> None:
    """Give a tied head a weight of its own where the files hold one.

    Args:
        model: A skeleton, or the loaded model: rounded to fewer bits, two weights may be equal that
            differ in the files.
        ref: Where the files are; of a hub id, those in the local cache count.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if embedding is None or head.weight is not embedding.weight:
        return
    name = f"{_head_name(model)}.weight"
    embedding_name = next(n for n, m in model.named_modules() if m is embedding)
    if not _differ_in_files(ref, name, f"{embedding_name}.weight", tuple(head.weight.shape)):
        return
    give_weight(model)


def give_weight(model: Any) -> None:
    """Untie the head: a copy of the embedding's weight becomes its own."""
    import torch

    head = model.get_output_embeddings()
    weight = head.weight
    head.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    name, tied = f"{_head_name(model)}.weight", model.all_tied_weights_keys
    model.all_tied_weights_keys = {n: source for n, source in tied.items() if n != name}


def _head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def _differ_in_files(ref: ModelRef, head: str, embedding: str, shape: tuple[int, ...]) -> bool:
    """Whether the files hold both weights, and these differ."""
    if ref.gguf_file is not None:
        return read_facts(Path(ref.path) / ref.gguf_file).has_separate_head
    files = _tensor_files(ref)
    names = [_stored_name(name, files) for name in (head, embedding)]
    if names[0] is None or names[1] is None or names[0] == names[1]:
        return False
    return _differ(files[names[0]], names[0], files[names[1]], names[1], shape)


def _tensor_files(ref: ModelRef) -> dict[str, Path]:
    """Tensor -> the safetensors file that transformers reads it from."""
    from safetensors import safe_open

    if (single := _find(ref, _SINGLE)) is not None:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    if (index := _find(ref, _INDEX)) is None:
        return {}
    names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {name: file for name, part in names.items() if (file := _find(ref, part)) is not None}


def _find(ref: ModelRef, name: str) -> Path | None:
    """A file of the model's folder, or of the local cache of the hub."""
    if Path(ref.path).is_dir():
        file = Path(ref.path) / name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(ref.path, name)
    return Path(cached) if isinstance(cached, str) else None


def _stored_name(name: str, stored: Iterable[str]) -> str | None:
    """A parameter's name in the files, where prefixes may differ: its own, else the shortest."""
    end = ".".join(name.split(".")[-2:])
    fitting = [other for other in stored if other == end or other.endswith(f".{end}")]
    return name if name in fitting else min(fitting, key=len, default=None)


def _differ(
    file: Path, name: str, other_file: Path, other_name: str, shape: tuple[int, ...]
) -> bool:
    """Whether two stored tensors of a shape differ; of another shape they are no pair."""
    import torch
    from safetensors import safe_open

    with (
        safe_open(file, framework="pt") as tensors,
        safe_open(other_file, framework="pt") as others,
    ):
        rows, other_rows = tensors.get_slice(name), others.get_slice(other_name)
        if tuple(rows.get_shape()) != shape or tuple(other_rows.get_shape()) != shape:
            return False
        for start in range(0, shape[0], _ROWS_AT_ONCE):
            parts: list[torch.Tensor] = [
                part[start : start + _ROWS_AT_ONCE] for part in (rows, other_rows)
            ]
            if not torch.equal(parts[0].float(), parts[1].float()):
                return True
    return False
