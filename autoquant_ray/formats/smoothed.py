"""Formats whose inputs are scaled channel by channel before they are quantized.

SmoothQuant (https://arxiv.org/abs/2211.10438) and AWQ (https://arxiv.org/abs/2306.00978), as
ModelOpt's algorithms ``smoothquant`` and ``awq_lite`` define them: a linear's input is multiplied
by ModelOpt's ``pre_quant_scale``, one number per input channel, and its weight is divided by it.
Other modules (fused experts) are left to calibration by maximum, as ModelOpt leaves them.

``awq`` scales channels too, but its factors are folded into the weights around an input: nothing is
done to the input itself, and nothing more is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from autoquant_ray.formats.algorithms import (
    ALPHA_STEP,
    AWQ_LITE,
    BY_COLUMNS,
    FACTORS,
    FITTED,
    MAX,
    MSE,
    SMOOTHQUANT,
    WEIGHTED,
)
from autoquant_ray.formats.numbers import has_calibrated_maximum

if TYPE_CHECKING:
    from autoquant_ray.formats.format import Attributes, Format

SMOOTHING = (SMOOTHQUANT, AWQ_LITE)
"""ModelOpt's algorithms that scale channels."""

_SCALE_BITS = 16


def method_of(format_: Format) -> str:
    """The algorithm that calibrates a format, ``max`` where it names none."""
    return "max" if format_.algorithm is None else str(format_.algorithm["method"])


def is_smoothed(format_: Format) -> bool:
    """Whether inputs of linears are scaled channel by channel."""
    return method_of(format_) in SMOOTHING


def takes_factors(format_: Format) -> bool:
    """Whether weights are multiplied by factors that are folded into what makes their input."""
    return method_of(format_) in FACTORS


def has_free_rows(format_: Format) -> bool:
    """Whether a weight's rows may be divided by any numbers after it was rounded.

    They may where each scale belongs to one row and may be any number: the integers stay, and
    scales are divided.
    """
    weight = format_.weight
    blocks = dict(weight.get("block_sizes") or {})
    kinds = {blocks.pop("type", "static"), weight.get("type", "static")}
    has_own_scales = set(blocks) == {-1} or (not blocks and weight.get("axis") == 0)
    is_integer = isinstance(weight.get("num_bits", 8), int)
    keeps = method_of(format_) in (MAX, MSE, *FITTED)
    return is_integer and has_own_scales and kinds == {"static"} and keeps


def module_algorithm(format_: Format, *, is_linear: bool) -> Attributes | None:
    """The algorithm that calibrates one module; None for ``max``, to which ModelOpt leaves what is
    no linear under formats that scale channels."""
    return None if is_smoothed(format_) and not is_linear else format_.algorithm


def needs_channel_maxima(format_: Format) -> bool:
    """Whether a format needs the largest absolute input of every channel."""
    return is_smoothed(format_) and format_.input is not None


def needs_channel_squares(format_: Format) -> bool:
    """Whether a format needs the mean square of the input of every channel."""
    return method_of(format_) == WEIGHTED


def needs_hessians(format_: Format) -> bool:
    """Whether a format needs the second moments of the input of every linear and expert."""
    return method_of(format_) in BY_COLUMNS


def is_fitted(format_: Format) -> bool:
    """Whether something is fitted to the weights of a format, once for the whole run."""
    return needs_channel_squares(format_) or needs_hessians(format_)


def needs_channels(format_: Format) -> bool:
    """Whether a format needs statistics of every input channel."""
    return is_smoothed(format_) or needs_channel_squares(format_) or needs_search(format_)


def needs_search(format_: Format) -> bool:
    """Whether a format needs the mean absolute input of every channel, and a search with it."""
    return method_of(format_) in (AWQ_LITE, *FACTORS)


def num_search_products(format_: Format) -> int:
    """About how many products with its weight a linear takes in the search of a format."""
    if not needs_search(format_):
        return 0
    return 1 + round(1 / ((format_.algorithm or {}).get("alpha_step") or ALPHA_STEP))


def needs_calibration(formats: Iterable[Format]) -> bool:
    """Whether a menu needs a pass over the data before scores: for a scale that inputs, keys or
    values have stored, or for what weights are scaled or rounded by."""
    return any(
        needs_channels(format_)
        or needs_hessians(format_)
        or any(map(has_calibrated_maximum, filter(None, (format_.input, *format_.kv_parts))))
        for format_ in formats
    )


def smoothing_bits(format_: Format, shape: Sequence[int]) -> int:
    """Bits of the scales that a linear of ``(out, in)`` keeps."""
    return _SCALE_BITS * shape[-1] if is_smoothed(format_) else 0
