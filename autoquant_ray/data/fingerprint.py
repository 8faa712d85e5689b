"""Content hashes of files: is this still the same model, the same data?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from autoquant_ray.config.sources import Data
from autoquant_ray.data.texts import PYDOC_SOURCE, read_pydoc
from autoquant_ray.runs.hashing import fingerprint_files


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
