"""Formats that cannot be scanned as they are, refused with the reason before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from autoquant_ray.errors import FormatError
from autoquant_ray.formats.algorithms import AWQ_LITE, MSE, SMOOTHQUANT, check_method
from autoquant_ray.formats.gguf_types import check_gguf_type
from autoquant_ray.formats.numbers import is_static_nvfp4
from autoquant_ray.formats.smoothed import has_free_rows, is_smoothed, method_of, takes_factors

if TYPE_CHECKING:
    from autoquant_ray.formats.format import Attributes, Format


def check_quantizers(format_: Format) -> None:
    """Refuse quantizers whose calibration or batching this package does not reproduce.

    Raises:
        FormatError: Names the format and what would be needed.
    """
    name, input_ = format_.name, format_.input
    check_gguf_type(f"format {name}", format_.weight)
    if format_.algorithm is not None:
        check_method(f"format {name}", format_.weight, format_.algorithm)
    _check_smoothing(format_)
    _check_factors(format_)
    for attributes in (format_.weight, input_ or {}):
        if attributes.get("unsigned") or attributes.get("calibrator", "max") != "max":
            raise FormatError(
                f"format {name}: only signed quantizers calibrated by 'max' are known"
            )
    if input_ is None:
        return
    blocks = input_.get("block_sizes") or {}
    if input_.get("type") == "dynamic" and not blocks:
        raise FormatError(
            f"format {name} scales each input tensor by its own maximum; its score would "
            "depend on how samples are batched. Use a static or per-token input quantizer"
        )
    is_dynamic = "dynamic" in (input_.get("type"), blocks.get("type"))
    if not is_dynamic and (blocks or input_.get("axis") is not None):
        raise FormatError(
            f"format {name} has a static input quantizer per channel or block; a static input "
            "quantizer must be per tensor (axis: null, no block_sizes)"
        )


def caution(formats: Iterable[Format]) -> str | None:
    """What was measured to go wrong with formats of a menu; None if nothing is known."""
    risky = [
        format_.name
        for format_ in formats
        if format_.algorithm is not None
        and format_.algorithm["method"] == MSE
        and format_.weight.get("num_bits") in (3, 4)
    ]
    if not risky:
        return None
    return (
        f"{', '.join(risky)}: scales by plain squared error (mse) measured worse than max on 4-bit "
        "integers; use NAME:weighted (docs/formats.md)"
    )


def _check_smoothing(format_: Format) -> None:
    """Refuse what ModelOpt's algorithm would skip, or cannot do."""
    method = method_of(format_)
    if is_smoothed(format_) and is_static_nvfp4(format_.weight):
        raise FormatError(
            f"format {format_.name}: {method} with static NVFP4 weights is not known; set "
            "block_sizes.type to dynamic"
        )
    if method == SMOOTHQUANT:
        for part, attributes in (("weights", format_.weight), ("inputs", format_.input)):
            if attributes is None or attributes.get("num_bits", 8) != 8 or _has_blocks(attributes):
                raise FormatError(
                    f"format {format_.name}: smoothquant needs 8-bit integer {part} without "
                    f"blocks (num_bits: 8); choose awq_lite, or another format for {part}"
                )
    if method == AWQ_LITE:
        blocks = format_.weight.get("block_sizes") or {}
        axes = [axis for axis in blocks if isinstance(axis, int)]
        if axes not in ([], [-1]):
            raise FormatError(
                f"format {format_.name}: awq_lite needs weights in blocks of the last axis (-1) or "
                f"without blocks, not of the axes {axes}"
            )


def _check_factors(format_: Format) -> None:
    """Refuse weights of which it is not known how factors are folded."""
    if not takes_factors(format_):
        return
    method = method_of(format_)
    if format_.input is not None:
        raise FormatError(
            f"format {format_.name}: {method} is for inputs in 16 bits; take a format such as "
            "wint4_afp16, or another method"
        )
    if not has_free_rows(format_):
        raise FormatError(
            f"format {format_.name}: {method} needs integers with stored scales, one per row or "
            "per block of a row (wint4_afp16, wint8_afp16); take such a format, or another method"
        )


def _has_blocks(attributes: Attributes) -> bool:
    return bool(attributes.get("block_sizes"))
