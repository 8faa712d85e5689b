"""Formats under which a linear multiplies integers, and what ``torch._int_mm`` takes of them.

Where a weight has a scale per output channel, or a single one, and its input one per token, or a
single one, ``Xq Wq^T = s_x s_w (Xi Wi^T)``: sums of products of integers of 8 bits, which 32 bits
hold exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoquant_ray.formats.format import Attributes, Format

INT_MM_ROWS = 32
"""Rows to which ``torch._int_mm`` is filled up: on CUDA it takes no fewer than 17."""

_INT8 = "int8"
_SIZES_BY = 8  # on CUDA, of both sizes of a weight
_MOST_BITS = 8
_LARGEST_SUM, _LARGEST_TERM = 2**31 - 1, 2**14
_PLAIN = {"num_bits", "axis", "block_sizes", "type", "effective_bits", "calibrator"}
_PLAIN |= {"unsigned", "narrow_range"}
"""Attributes under which values are rounded to multiples of a scale, and nothing else is done."""


def with_integers(dtype: str) -> str:
    """The ``difference_dtype`` that multiplies integers where it can, and else in a type."""
    return f"{_INT8}+{dtype}"


def multiplies_integers(difference_dtype: str | None) -> bool:
    """Whether a ``difference_dtype`` multiplies integers where it can."""
    return difference_dtype is not None and difference_dtype.startswith(_INT8)


def without_integers(difference_dtype: str | None) -> str | None:
    """In what the others are multiplied; the value itself where it says nothing of integers."""
    return difference_dtype and difference_dtype.removeprefix(with_integers(""))


def has_integer_pair(formats: Iterable[Format]) -> bool:
    """Whether linears multiply integers under a format of a menu."""
    return any(map(is_integer_pair, formats))


def is_integer_pair(format_: Format) -> bool:
    """Whether both a linear's weight and its input are integers with scales as above."""
    return (
        format_.input is not None
        and _are_integers(format_.weight)
        and _are_integers(format_.input)
        and _has_row_scales(format_.weight)
        and (_has_one_scale(format_.input) or _is_per_token(format_.input))
    )


def fits_int_mm(shape: Sequence[int]) -> bool:
    """Whether a weight can be multiplied as integers, on whatever device.

    Args:
        shape: ``(out, in)``.
    """
    is_aligned = all(size % _SIZES_BY == 0 for size in shape)
    return is_aligned and shape[-1] * _LARGEST_TERM <= _LARGEST_SUM


def _are_integers(attributes: Attributes) -> bool:
    num_bits = attributes.get("num_bits", 8)
    is_plain = attributes.keys() <= _PLAIN and not attributes.get("unsigned")
    return is_plain and isinstance(num_bits, int) and num_bits <= _MOST_BITS


def _has_row_scales(attributes: Attributes) -> bool:
    is_static = attributes.get("type", "static") == "static" and not attributes.get("block_sizes")
    return is_static and attributes.get("axis") in (0, None)


def _has_one_scale(attributes: Attributes) -> bool:
    return _has_row_scales(attributes) and attributes.get("axis") is None


def _is_per_token(attributes: Attributes) -> bool:
    return attributes.get("type") == "dynamic" and attributes.get("block_sizes") == {-1: None}
