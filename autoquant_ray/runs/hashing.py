"""Digests of files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

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
