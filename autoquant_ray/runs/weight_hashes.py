"""One hash per group of a model's weights, so that a later run can name the layers that changed.

Scores cannot: a changed layer moves the scores of its neighbours, often more than its own. Read
from the safetensors files, tensor by tensor, without loading the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoquant_ray.errors import ModelError, one_line

OTHER = "weights outside the groups"
"""Embeddings, norms and whatever else belongs to no group."""

_WHOLE_LIMIT_BYTES = 8 * 2**30
_BLOCK_BYTES = 2**16
_BLOCKS_PER_TENSOR = 16


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """Where a tensor's bytes are."""

    name: str
    file: Path
    start: int
    size: int
    head: str


def hash_groups(folder: Path, modules: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Hash the weights of each group.

    Tensors are hashed whole up to 8 GiB in total; beyond that by 16 evenly spaced blocks of 64 KiB
    each, which sees a changed layer, and can miss a changed number.

    Args:
        folder: Model folder with safetensors files.
        modules: Group -> names of its modules.

    Returns:
        Group -> hash, in the order of the groups, with :data:`OTHER` last. A group whose tensors go
        by other names in the files is left out; without safetensors files, all are.

    Raises:
        ModelError: A file is damaged.
    """
    tensors = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in _read(file)]
    is_whole = sum(tensor.size for tensor in tensors) <= _WHOLE_LIMIT_BYTES
    group_of = {module: group for group, names in modules.items() for module in names}
    digests = {group: hashlib.blake2b(digest_size=8) for group in [*modules, OTHER]}
    seen = set()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        group = next((group_of[n] for n in _parents(tensor.name) if n in group_of), OTHER)
        seen.add(group)
        digests[group].update(f"{tensor.name}{tensor.head}".encode())
        for block in _blocks(tensor, is_whole):
            digests[group].update(block)
    return {group: digest.hexdigest() for group, digest in digests.items() if group in seen}


def _read(file: Path) -> Iterator[_Tensor]:
    """Tensors of a file, from its header: 8 bytes of length, then JSON with offsets."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is no safetensors file: {one_line(error)}") from None
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield _Tensor(
                name=name,
                file=file,
                start=8 + length + start,
                size=end - start,
                head=f"{entry['dtype']}{entry['shape']}",
            )


def _parents(name: str) -> Iterator[str]:
    """Names of the modules that a tensor may belong to, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _blocks(tensor: _Tensor, is_whole: bool) -> Iterator[bytes]:
    step = _BLOCK_BYTES if is_whole else max(_BLOCK_BYTES, tensor.size // _BLOCKS_PER_TENSOR)
    with tensor.file.open("rb") as stream:
        for offset in range(0, tensor.size, step):
            stream.seek(tensor.start + offset)
            yield stream.read(min(_BLOCK_BYTES, tensor.size - offset))
