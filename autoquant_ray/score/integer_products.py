"""Products of integers: ``Xq Wq^T = s_x s_w (Xi Wi^T)``.

``torch._int_mm`` adds up products of codes without an error; only the result is scaled.

Shape letters: T tokens, I in features, O out features.
"""

from __future__ import annotations

import torch

from autoquant_ray.errors import ConfigError
from autoquant_ray.formats.integer_pairs import INT_MM_ROWS
from autoquant_ray.quantize.grid import Integers

_CHECKED_ROWS, _CHECKED_WIDTH = 64, 2048


def multiplied(inputs: Integers, weight: Integers, out: torch.Tensor) -> torch.Tensor:
    """``Xq Wq^T``.

    Args:
        inputs: T rows.
        weight: O rows, of which :func:`~autoquant_ray.formats.integer_pairs.fits_int_mm` holds.
        out: Takes the result, float32 ``(T, O)``.
    """
    sums_TO = _sums(inputs.codes_RI, weight.codes_RI)
    has_same_unit = len(inputs.unit_R) == 1
    scale_O = weight.unit_R * inputs.unit_R if has_same_unit else weight.unit_R
    if sums_TO.is_cuda:
        torch.mul(sums_TO, scale_O, out=out)
    else:
        out.copy_(sums_TO).mul_(scale_O)  # where the types differ, ``mul`` copies on a CPU
    return out if has_same_unit else out.mul_(inputs.unit_R[:, None])


def require_exact_sums(device: torch.device) -> None:
    """Refuse a device on which torch adds up products of integers wrongly, as it did on CPUs
    without VNNI before torch 2.6, and on CUDA 12.1.

    Args:
        device: Where modules are scored.

    Raises:
        ConfigError: It does.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, _CHECKED_ROWS, _CHECKED_WIDTH)
    codes = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator).to(device)
    exact = codes[0].double() @ codes[1].double().T
    if not torch.equal(_sums(codes[0], codes[1]).double(), exact):
        raise ConfigError(
            f"difference_dtype int8: torch {torch.__version__} adds up products of integers "
            f"wrongly on this {device.type} device; give float32 or bfloat16"
        )


def _sums(codes_TI: torch.Tensor, codes_OI: torch.Tensor) -> torch.Tensor:
    """``Xi Wi^T``, int32 ``(T, O)``."""
    num_rows = len(codes_TI)
    missing = max(0, INT_MM_ROWS - num_rows)
    if missing:
        codes_TI = torch.nn.functional.pad(codes_TI, (0, 0, 0, missing))
    return torch._int_mm(codes_TI, codes_OI.T)[:num_rows]
