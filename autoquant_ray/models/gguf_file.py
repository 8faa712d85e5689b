"""Opens GGUF files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoquant_ray.errors import ModelError, one_line


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The reader of a file, to be used within the context; making it takes seconds.

    Raises:
        ModelError: The file cannot be read, or the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(f"GGUF file {file} needs the package gguf: pip install gguf") from None
    try:
        yield gguf.GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"GGUF file {file} cannot be read: {one_line(error)}") from None
