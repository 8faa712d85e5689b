"""Names of layers in the files of a model, which for some families differ from those in memory.

Engines look for the names of the model's own files. transformers renames them on loading and may
join tensors (the experts of a layer) or transpose them; ModelOpt's exporter takes most of this
back. What it does not take back is refused here, because it would be written without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoquant_ray.errors import FormatError, one_line
from autoquant_ray.export.check import StoredTensors
from autoquant_ray.export.layouts import MODELOPT
from autoquant_ray.export.source import Source
from autoquant_ray.models.quantizable import quantizable_modules
from autoquant_ray.wording import few

_MOST_NAMES = 4


def as_stored(model: Any, source: Source) -> Source:
    """The source with its modules named as ModelOpt's exporter writes them.

    Raises:
        FormatError: The exporter cannot give the model's tensors the form of its own files.
    """
    from autoquant_ray.modelopt_export import stored_name_of

    with naming():
        name_of = stored_name_of(model)
    return source if name_of is None else source.renamed(name_of)


@contextmanager
def naming() -> Iterator[None]:
    """Inside, a ``ValueError`` says why ModelOpt cannot give tensors the names of the files.

    Raises:
        FormatError: It was raised.
    """
    try:
        yield
    except ValueError as error:
        raise FormatError(
            f"`format` {MODELOPT} cannot give this model's tensors the form of its own files "
            f"({one_line(error)}): ModelOpt's exporter does not take back what transformers does "
            "on loading"
        ) from None


def require_experts_as_stored(
    model: Any, source: Source, stored: Source, own_files: Path | None
) -> None:
    """Check that fused experts get the form that they have in the model's own files.

    ModelOpt's exporter writes them one by one, but for transposed ones (GPT-OSS), which it does
    not write as the scan quantizes them.

    Args:
        model: The loaded model.
        source: What is exported.
        stored: The same by stored names.
        own_files: Folder of the model's safetensors files; None: nothing to compare with.

    Raises:
        FormatError: They would get another.
    """
    transposed = {module.name for module in quantizable_modules(model) if module.is_transposed}
    wrong = [name for name in source.formats if name in transposed]
    if wrong:
        raise FormatError(
            f"`format` {MODELOPT} cannot hold transposed experts ({few(wrong, _MOST_NAMES)}); "
            "leave them in 16 bits (solve `allow` '*experts=none')"
        )
    file_sizes = StoredTensors.of(own_files).nbytes if own_files is not None else {}
    fused = [
        name
        for memory, name in zip(source.modules, stored.modules, strict=True)
        if file_sizes and stored.is_experts(name) and memory not in transposed
        if not any(f"{name.partition('.')[2]}.0." in tensor for tensor in file_sizes)
    ]
    if fused:
        raise FormatError(
            f"`format` {MODELOPT} cannot hold experts that the model's own files keep fused "
            f"({few(fused, _MOST_NAMES)}): ModelOpt writes them one by one, even in 16 bits, under "
            "names that readers of this model do not know"
        )
