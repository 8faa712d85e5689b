"""Types of GGUF files as formats: ``q4_k``, ``q6_k``, ``iq4_xs`` and so on.

Such a weight is quantized and dequantized by ggml's library itself, without an importance matrix,
as ``llama-quantize`` calls it (:mod:`autoquant_ray.quantize.backends.by_ggml`): what is scored
is what the tool writes. Types that need an importance matrix there (iq1, iq2, iq3_xxs) are left
out. Numbers and sizes are those of ggml's ``enum ggml_type`` and ``GGML_QUANT_SIZES`` of the
package ``gguf``; which type takes the place of another is read in ``tensor_type_fallback`` of
``src/llama-quant.cpp`` (b11434).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autoquant_ray.errors import FormatError

GGML_BACKEND = "autoquant_ray_ggml"
"""The ``backend`` of ModelOpt's quantizers whose weights ggml's library quantizes."""
PACKAGE = "libggml"
DISTRIBUTION = "libggml-python"
"""The package that holds the library, and its name on PyPI."""
_LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
_TYPE = "type"


@dataclass(frozen=True, kw_only=True)
class GgufType:
    """A type of a GGUF file's tensor.

    Attributes:
        number: In ``enum ggml_type``.
        block: Consecutive weights of a row that are stored together.
        num_bytes: Of a block.
        narrower: Type that llama.cpp takes where rows are no whole number of blocks.
    """

    number: int
    block: int
    num_bytes: int
    narrower: str | None = None


GGUF_TYPES: dict[str, GgufType] = {
    "q2_k": GgufType(number=10, block=256, num_bytes=84, narrower="q4_0"),
    "q3_k": GgufType(number=11, block=256, num_bytes=110, narrower="q4_0"),
    "q4_k": GgufType(number=12, block=256, num_bytes=144, narrower="q5_0"),
    "q5_k": GgufType(number=13, block=256, num_bytes=176, narrower="q5_1"),
    "q6_k": GgufType(number=14, block=256, num_bytes=210, narrower="q8_0"),
    "iq3_s": GgufType(number=21, block=256, num_bytes=110, narrower="iq4_nl"),
    "iq4_xs": GgufType(number=23, block=256, num_bytes=136, narrower="iq4_nl"),
    "iq4_nl": GgufType(number=20, block=32, num_bytes=18),
    "q4_0": GgufType(number=2, block=32, num_bytes=18),
    "q4_1": GgufType(number=3, block=32, num_bytes=20),
    "q5_0": GgufType(number=6, block=32, num_bytes=22),
    "q5_1": GgufType(number=7, block=32, num_bytes=24),
    "q8_0": GgufType(number=8, block=32, num_bytes=34),
}
"""Name, as ``--tensor-type`` of ``llama-quantize`` takes it -> type."""

GGUF_WEIGHTS: dict[str, dict[str, Any]] = {
    name: {
        "num_bits": int(name.removeprefix("i")[1]),
        "type": "dynamic",  # no scale is calibrated
        "effective_bits": 8 * type_.num_bytes / type_.block,
        "backend": GGML_BACKEND,
        "backend_extra_args": {_TYPE: name},
    }
    for name, type_ in GGUF_TYPES.items()
}
"""Name -> attributes of the weight's quantizer; inputs stay as they are."""


def gguf_type_of(attributes: Mapping[str, Any]) -> str | None:
    """The type that a weight's quantizer rounds to; None for other quantizers."""
    if attributes.get("backend") != GGML_BACKEND:
        return None
    return str((attributes.get("backend_extra_args") or {}).get(_TYPE))


def fitting_type(name: str, num_columns: int) -> str | None:
    """The type that a tensor gets which is to have a type, as ``llama-quantize`` chooses it.

    Args:
        name: Of the type.
        num_columns: Weights of a row.

    Returns:
        The type, or the one that takes its place; None where rows are no whole number of blocks of
        either: the tool would leave the tensor in 16 bits.
    """
    for candidate in (name, GGUF_TYPES[name].narrower):
        if candidate is not None and num_columns % GGUF_TYPES[candidate].block == 0:
            return candidate
    return None


def fits(attributes: Mapping[str, Any], shapes: Iterable[Sequence[int]]) -> bool:
    """Whether weights can have a type of GGUF files; others always can be quantized.

    Args:
        attributes: Of the weights' quantizer.
        shapes: ``(..., out, in)`` of each weight.
    """
    name = gguf_type_of(attributes)
    return name is None or all(fitting_type(name, shape[-1]) is not None for shape in shapes)


def check_gguf_type(owner: str, weight: Mapping[str, Any]) -> None:
    """Refuse a type that is none of :data:`GGUF_TYPES`.

    Args:
        owner: The format in words, for errors.
        weight: Attributes of its weight quantizer.

    Raises:
        FormatError: Names the type.
    """
    name = gguf_type_of(weight)
    if name is not None and name not in GGUF_TYPES:
        raise FormatError(
            f"{owner}: {name!r} is no type of GGUF files that can be scanned; take one of "
            f"{', '.join(GGUF_TYPES)}"
        )


def require_library(weights: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse formats that ggml's library quantizes where it is not installed.

    Args:
        weights: Format -> attributes of its weight quantizer.

    Raises:
        FormatError: Names the formats and the package.
    """
    names = [name for name, weight in weights.items() if gguf_type_of(weight) is not None]
    if names and library_file() is None:
        raise FormatError(
            f"{', '.join(names)}: such weights are quantized by ggml's own library, which is not "
            f"installed here; pip install {DISTRIBUTION} (on every node), or leave these formats "
            "out"
        )


def library_file() -> Path | None:
    """The library of ``libggml-python``; None where it is not installed."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in _LIBRARIES:
            if (file := next(Path(folder).rglob(name), None)) is not None:
                return file
    return None
