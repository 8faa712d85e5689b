"""Content hashes of files: is this still the same model, the same data?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from autoquant_ray.data_sources import Data
from autoquant_ray.texts import PYDOC_SOURCE, read_pydoc

_WHOLE_LIMIT_BYTES = 8 * 2**30
_BLOCK_BYTES = 2**20
_BLOCKS_PER_FILE = 64


def fingerprint_files(files: Sequence[Path]) -> str:
    """Hash names, sizes and contents.

    Files are hashed whole up to 8 GiB in total; beyond that by size and 64 evenly spaced blocks
    of 1 MiB per file, which can miss a change between blocks.
    """
    digest = hashlib.blake2b(digest_size=16)
    whole = sum(file.stat().st_size for file in files) <= _WHOLE_LIMIT_BYTES
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        step = _BLOCK_BYTES if whole else max(_BLOCK_BYTES, size // _BLOCKS_PER_FILE)
        with file.open("rb") as stream:
            for offset in range(0, size, step):
                stream.seek(offset)
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def fingerprint_source(source: str) -> str:
    """Hash a data source: a file, a folder, or else its name (a hub id, ``pydoc``)."""
    path = Path(source).expanduser()
    if path.is_file():
        return fingerprint_files([path])
    if path.is_dir():
        return fingerprint_files(sorted(file for file in path.rglob("*") if file.is_file()))
    if source == PYDOC_SOURCE:
        text = "\0".join(read_pydoc())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return f"name:{source}"


def fingerprint_data(data: Data) -> str:
    """Hash all sources of a scan's data, with the names of those that have one."""
    if isinstance(data, str):
        return fingerprint_source(data)
    named = {name: fingerprint_source(source) for name, source in data.items()}
    text = json.dumps(named, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
