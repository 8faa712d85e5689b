"""Where the tensors of a model lie in its safetensors files, and what their headers say of them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from autoquant_ray.errors import ModelError, one_line
from autoquant_ray.models.find import ModelRef
from autoquant_ray.wording import few, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not quantized."""
_MOST_FILES = 512
_POINTER = b"version https://git-lfs."
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself takes no longer one."""


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """A tensor as the header of its file describes it.

    Attributes:
        file: Holds it.
        dtype: As safetensors names it: ``BF16``, ``F8_E4M3``, ``I32``.
        shape: As it is stored.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_file(ref: ModelRef, name: str) -> Path | None:
    """A file of the model's folder, or of the local cache of the hub; None where it is not."""
    if Path(ref.path).is_dir():
        file = Path(ref.path) / name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(ref.path, name)
    return Path(cached) if isinstance(cached, str) else None


def read_json(ref: ModelRef, name: str) -> dict[str, Any]:
    """A JSON file of the model; empty where there is none, or where it is no object.

    Raises:
        ModelError: The file is damaged.
    """
    file = find_file(ref, name)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name} of model {ref.name}: {one_line(error)}") from None
    return content if isinstance(content, dict) else {}


def fetch_weights(ref: ModelRef) -> None:
    """Bring the weight files of a hub id into the local cache, as loading it would."""
    if ref.gguf_file is not None or Path(ref.path).is_dir():
        return
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False}
    if cached_file(ref.path, SINGLE, **quiet) is None and cached_file(ref.path, INDEX, **quiet):
        for part in _parts(ref):
            cached_file(ref.path, part)


def require_weights(ref: ModelRef) -> None:
    """Check that a local folder holds weights that may be read, all of them.

    Raises:
        ModelError: It holds none in safetensors or GGUF, or files of an index are not there.
    """
    folder = Path(ref.path)
    if not folder.is_dir() or ref.gguf_file or (folder / SINGLE).is_file():
        return
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model folder {ref.name} holds no safetensors or GGUF weights; convert other formats "
            "with save_pretrained(..., safe_serialization=True)"
        )
    parts = _parts(ref)
    if not parts:
        raise ModelError(
            f"model folder {ref.name} holds neither {SINGLE} nor {INDEX}, which lists the files "
            "of the weights; get the folder whole"
        )
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise ModelError(
            f"model folder {ref.name} lacks {few(missing, 3)} of the {len(parts)} files that its "
            "index lists; get the folder whole"
        )


def stored_tensors(ref: ModelRef) -> dict[str, TensorHeader]:
    """All tensors of the files that transformers would read; empty for GGUF and where none is here.

    Raises:
        ModelError: A file or the index is damaged.
    """
    if ref.gguf_file is not None:
        return {}
    single = find_file(ref, SINGLE)
    files = [find_file(ref, part) for part in _parts(ref)] if single is None else [single]
    return {
        name: header for file in files if file is not None for name, header in _read(file).items()
    }


def _parts(ref: ModelRef) -> list[str]:
    """Names of the files that the index lists."""
    names = read_json(ref, INDEX).get("weight_map", {})
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ModelError(
            f"{INDEX} of model {ref.name}: its weight_map, {shown(names)}, does not name the file "
            "of each weight; get the folder anew"
        )
    return sorted(set(names.values()))


def _read(file: Path) -> dict[str, TensorHeader]:
    """Tensors of a file, from its header, which is read once for every state of the file."""
    try:
        state = file.stat()
    except OSError as error:
        raise ModelError(f"{file} is no safetensors file: {one_line(error)}") from None
    return _read_header(file, state.st_mtime_ns, state.st_size)


def _why(file: Path, error: Exception) -> str:
    """Why a file's header is not read, and what to do."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            return (
                "it is a pointer that Git LFS left in its place; run `git lfs pull` in its folder"
            )
    return f"{one_line(error)}; fetch it again"


@lru_cache(maxsize=_MOST_FILES)
def _read_header(file: Path, _modified: int, size: int) -> dict[str, TensorHeader]:
    """A header is 8 bytes of length, then JSON; tensors follow it up to the end of the file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _LONGEST_HEADER)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {
            name: TensorHeader(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
            for name, entry in entries.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (
        *(OSError, ValueError, KeyError, IndexError),
        *(OverflowError, TypeError, AttributeError, RecursionError),
    ) as error:
        raise ModelError(f"{file} is no safetensors file: {_why(file, error)}") from None
    if size != end:
        raise ModelError(
            f"{file} holds {size:,} bytes, but its tensors end at {end:,}: it is no whole copy; "
            "fetch it again"
        )
    return tensors
